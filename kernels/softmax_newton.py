"""Newton's method for the softmax loss: a squared problem of `newton.py` around every iterate."""

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from edgesolve.kernels.designs import Design
from edgesolve.kernels.newton import newton
from edgesolve.kernels.penalties import GroupL2
from edgesolve.kernels.point import check_problem
from edgesolve.kernels.softmax import MU_B, Softmax
from edgesolve.kernels.solution import Solution, Status

SHORTEST = 1e-4
"""A step below this share of the full one ends the solve: rounding decides there."""

ROUNDING = 1e-13
"""Objectives that differ by less, relatively, are equal."""


def softmax_newton(
    loss: Softmax,
    penalty: GroupL2,
    U0=None,
    *,
    tol=1e-6,
    max_iter=60,
    seconds=math.inf,
    callback=None,
) -> Solution:
    """argmin of loss(U) + penalty(U); arguments and certificate as `newton`.

    Each round takes the loss's true second-order model, the intercept eliminated, lets `newton` take
    one round on it, and halves the step until the objective falls. Three to nine times as fast as
    FISTA to a gap of 1e-6 (n = 1500, D = 1152 to 3840, c = 1 to 10; x86). Memory: as `newton`,
    and 6 n c numbers. Lee, Sun, Saunders 2014 (inexact proximal Newton).
    """
    check_problem(loss, penalty, U0, tol, seconds)
    began = time.perf_counter()
    U = np.zeros(loss.shape) if U0 is None else np.array(U0, np.float64)
    n_iter, status = 0, None
    gap, objective = loss.duality_gap(penalty, U)
    while status is None:
        relative = gap / objective if gap > 0 else 0.0
        if not math.isfinite(objective + gap):
            status = Status.NOT_FINITE
            break
        if callback is not None:
            callback(n_iter, U, objective, relative)
        left = seconds - (time.perf_counter() - began)
        if relative <= tol:
            status = Status.CONVERGED
        elif not left > 0:
            status = Status.OUT_OF_TIME
        elif n_iter >= max_iter:
            status = Status.MAX_ITER
        else:
            n_iter += 1
            step = _Model.of(loss, U)
            step = newton(step, penalty, U, tol=0.0, max_iter=1, seconds=left).weights - U
            moved = _descend(loss, penalty, U, step, objective, gap)
            if moved is None:
                status = Status.ILL_CONDITIONED
            else:
                U = moved
                gap, objective = loss.duality_gap(penalty, U)
    scale = float(np.linalg.norm(loss.grad(np.zeros(loss.shape))))
    kkt = penalty.kkt(U, loss.grad(U)) if status is not Status.NOT_FINITE else math.nan
    return Solution(
        weights=U,
        intercept=loss.intercept(U),
        status=status,
        objective=objective,
        kkt=kkt / scale if scale > 0 else kkt,
        relative_gap=relative,
        n_iter=n_iter,
        seconds=time.perf_counter() - began,
    )


def _descend(loss, penalty, U, step, objective, gap):
    """U + a step, a = 1, 1/2, ..., of a smaller objective, or of half the gap where rounding hides which
    is smaller; None where there is none."""
    a = 1.0
    while a > SHORTEST:
        tried = U + a * step
        rise = loss.value(tried) + penalty.value(tried) - objective
        if rise < 0.0:
            return tried
        if rise <= ROUNDING * objective and loss.duality_gap(penalty, tried)[0] < 0.5 * gap:
            return tried
        a *= 0.5
    return None


@dataclass(frozen=True, slots=True, eq=False)
class _Model:
    """The quadratic model of a `Softmax` at U_0, as a loss that `newton` takes.

    Z = A U_0, p the probabilities, R = T - p: (n, c). omega (n, 1) row weights. b the intercept and
    C (c, c) the inverse of the Hessian in it: at every U the model's own best intercept is taken.
    Second derivatives: W = diag(p) - pp' per row, p(1 - p) for one logit.
    """

    design: Design
    Z: np.ndarray
    p: np.ndarray
    R: np.ndarray
    omega: np.ndarray
    b: np.ndarray
    C: np.ndarray
    ridge: float

    @classmethod
    def of(cls, loss, U):
        fit, c = loss.fit(U), loss.shape[1]
        p = np.ascontiguousarray(fit.p[-c:].T)
        C = np.linalg.inv(loss.curvature(fit.p)) if loss.centre else np.zeros((c, c))
        Z = loss.design.forward(fit.U)
        return cls(loss.design, Z, p, fit.R, loss.omega[:, None], fit.b, C, loss.ridge)

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.design.starts[-1]), self.p.shape[1]

    @property
    def n(self) -> int:
        return self.design.n

    @property
    def dtype(self) -> np.dtype:
        return self.Z.dtype

    @property
    def mean_t(self) -> np.ndarray:
        return np.zeros(self.shape[1])

    def residual(self, U):
        """A' of the model's gradient, and sums that make half the second one the model, up to a constant."""
        bent, beta = self._bent(self.design.forward(np.asarray(U, self.dtype)) - self.Z)
        rest = self.R - bent
        V = self.design.adjoint(self.omega * rest)
        share = self.p * (1.0 - self.p) if self.shape[1] == 1 else self.p
        share = np.maximum(share, np.finfo(np.float32).tiny)
        rr = float(np.sum(self.omega * rest * rest / share))
        rr += MU_B * float(np.sum((self.b + beta) ** 2))
        return V, rr, rr + float(np.vdot(V, U))

    def value(self, U):
        return 0.5 * self.residual(U)[1] + 0.5 * self.ridge * float(np.vdot(U, U))

    def grad(self, U):
        return self.ridge * U - self.residual(U)[0]

    def product(self, U):
        return self.design.adjoint(self.omega * self._bent(self.design.forward(U))[0])

    def intercept(self, U):
        return self.b

    def restrict(self, starts, gates):
        return replace(self, design=self.design.restrict(gates))

    def astype(self, dtype):
        arrays = {k: getattr(self, k).astype(dtype) for k in ("Z", "p", "R", "omega", "b", "C")}
        return replace(self, design=self.design.astype(dtype), **arrays)

    def kronecker(self, starts):
        mean = float(np.sum(self.omega * self.p * (1.0 - self.p))) / self.shape[1]
        return [(gates, mean * Gamma, S) for gates, Gamma, S in self.design.kronecker()]

    def _bent(self, change):
        """(W applied to a change of the logits and of the intercept that follows it, that change)."""
        bent = self._curved(change)
        beta = -(self.C @ (self.omega * bent).sum(axis=0))
        return bent + self._curved(np.broadcast_to(beta, change.shape)), beta

    def _curved(self, change):
        if self.shape[1] == 1:
            return self.p * (1.0 - self.p) * change
        return self.p * (change - np.sum(self.p * change, axis=1, keepdims=True))
