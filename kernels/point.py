"""A point with its certificate: what every solver of this folder tests and returns."""

import math
from dataclasses import dataclass

import numpy as np

from edgesolve.kernels import gap
from edgesolve.kernels.solution import Solution, Status


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """U (D, c) float64, V = A'R/n there, P(U), its duality gap, and that gap relative to P(U)."""

    U: np.ndarray
    V: np.ndarray
    objective: float
    gap: float
    relative_gap: float

    @classmethod
    def at(cls, loss, penalty, U: np.ndarray) -> "Point":
        """One product with A and one with its adjoint."""
        V, rr, ry = loss.residual(U)
        objective = 0.5 * rr + 0.5 * loss.ridge * float(np.vdot(U, U)) + penalty.value(U)
        found = gap.gap_of_residual(loss, penalty, U, (V, rr, ry))
        return cls(U, V, objective, found, gap.relative(loss, found, objective))

    @property
    def finite(self) -> bool:
        return math.isfinite(self.objective) and math.isfinite(self.gap)

    def solution(self, loss, penalty, status: Status, n_iter: int, seconds: float) -> Solution:
        """What is handed back, every figure evaluated here."""
        scale = float(np.linalg.norm(loss.grad(np.zeros(loss.shape))))
        kkt = penalty.kkt(self.U, loss.ridge * self.U - self.V)
        return Solution(
            weights=self.U,
            intercept=loss.intercept(self.U),
            status=status,
            objective=self.objective,
            kkt=kkt / scale if scale > 0 else kkt,
            relative_gap=self.relative_gap,
            n_iter=n_iter,
            seconds=seconds,
        )


def check_start(loss, U0) -> None:
    """ValueError, with one sentence, for a warm start that isn't None or finite and (D, c)."""
    if U0 is not None and np.shape(U0) != loss.shape:
        raise ValueError(f"U0 must be {loss.shape}, got {np.shape(U0)}.")
    if U0 is not None and not np.isfinite(U0).all():
        raise ValueError("U0 holds NaN or inf: start from None.")


def check_problem(loss, penalty, U0, tol: float, seconds: float) -> None:
    """ValueError, with one sentence, for what `newton` and `variational` can't take."""
    lam = getattr(penalty, "lam", 0.0)
    if not lam > 0 or not hasattr(penalty, "restrict"):
        name = type(penalty).__name__
        raise ValueError(f"this solver takes `GroupL2` with lam > 0, got {name} with lam = {lam}.")
    if penalty.starts[-1] != loss.shape[0]:
        raise ValueError(f"starts must end at D = {loss.shape[0]}, got {penalty.starts[-1]}.")
    check_start(loss, U0)
    if not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol}.")
    if not seconds > 0:
        raise ValueError(
            f"seconds must be positive, got {seconds}: a budget of nothing buys nothing."
        )
