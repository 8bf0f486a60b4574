"""The referee: the objective and the duality gap of returned weights, in NumPy, float64. It imports no solver."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Verdict:
    """objective P(U); gap, so that P(U) - gap <= P* <= P(U); both in the problem's own scaling."""

    objective: float
    gap: float

    @property
    def bound(self) -> float:
        """A lower bound on P*."""
        return self.objective - self.gap

    @property
    def relative_gap(self) -> float:
        return self.gap / self.objective if self.objective > 0 else 0.0


def judge(problem, U: np.ndarray, dual: np.ndarray | None = None) -> Verdict:
    """Verdict on weights U (m, d, c).

    The dual points are the scaled residual and, where a solver hands one over, its own `dual` (n, c): any array,
    made feasible here by scaling. The better one counts.
    """
    U = np.asarray(U, np.float64)
    if U.shape != problem.shape:
        raise ValueError(f"weights must be {problem.shape}, got {U.shape}.")
    if not np.isfinite(U).all():
        return Verdict(np.inf, np.inf)
    R = problem.Y - forward(problem, U)
    objective = 0.5 * np.vdot(R, R) / len(R) + problem.lam * group_norms(problem, U).sum()
    gap = min(_gap(problem, U, R, point) for point in (R, dual) if point is not None)
    return Verdict(float(objective), float(gap))


def _gap(problem, U, R, point):
    """The gap with dual point s `point` / n, s the best feasible factor.

    As a sum of terms >= 0, so that no two large numbers are subtracted: with E = R - s `point`,
    ||E||^2 / (2n) + sum_g lam ||U_g|| - s <U_g, V_g>.
    """
    n = len(R)
    V = adjoint(problem, point) / n
    largest = group_norms(problem, V).max()
    s_max = problem.lam / largest if largest > 0 else np.inf
    size = np.vdot(point, point)
    s = np.clip(np.vdot(point, problem.Y) / size if size > 0 else 0.0, -s_max, s_max)
    E = R - s * point
    axes = 1 if problem.by_output else (1, 2)
    brackets = problem.lam * group_norms(problem, U) - s * (U * V).sum(axis=axes)
    return max(0.5 * np.vdot(E, E) / n + brackets.sum(), 0.0)


def forward(problem, U: np.ndarray) -> np.ndarray:
    """sum_i D_i X U_i, (n, c)."""
    return np.stack([(problem.D * (problem.X @ u.T)).sum(axis=1) for u in np.moveaxis(U, 2, 0)], 1)


def adjoint(problem, R: np.ndarray) -> np.ndarray:
    """X' D_i R for every gate, (m, d, c)."""
    return np.stack([(problem.X.T @ (problem.D * r[:, None])).T for r in R.T], axis=2)


def group_norms(problem, U: np.ndarray) -> np.ndarray:
    """(m,) or, by output, (m, c)."""
    return np.linalg.norm(U, axis=1) if problem.by_output else np.linalg.norm(U, axis=(1, 2))
