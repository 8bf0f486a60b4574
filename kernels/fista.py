"""Accelerated proximal gradient with restart, for any loss and penalty of this folder."""

import math
import time

import numpy as np

from edgesolve.kernels import gap
from edgesolve.kernels.solution import Solution, Status

CHECK_EVERY = 10
"""Iterations between two looks at optimality: each look costs two more products."""


def fista(
    loss, penalty, U0=None, *, tol=1e-8, max_iter=2000, seconds=math.inf, callback=None
) -> Solution:
    """argmin of loss(U) + penalty(U), both in the scaling of `losses.py`.

    loss : `SquaredMoments`, `SquaredRows` or `Softmax`. penalty : any `Penalty`. U0 (D, c) : warm start, not
    written to; default zeros. tol : on `kkt`, relative to ||grad(0)||. seconds : time budget.
    callback(n_iter, U, objective, kkt) : called at every check.

    Optimality is tested at the point returned. Without convergence the best point seen is
    returned, so a warm start never ends higher. ValueError: U0 of another shape than the loss's.
    Beck and Teboulle 2009; gradient restart: O'Donoghue and Candes 2015.
    """
    began = time.perf_counter()
    U = _start(loss, U0)
    scale = float(np.linalg.norm(loss.grad(np.zeros(loss.shape))))
    look = _Look(loss, penalty, scale, callback)
    L = loss.lipschitz()
    status = look.at(0, U, tol)
    if not math.isfinite(L):
        status = Status.NOT_FINITE
    step = 1.0 / L if L > 0 else 1.0
    Z, t, n_iter = U, 1.0, 0
    while status is None:
        n_iter += 1
        U_next = penalty.prox(Z - step * loss.grad(Z), step)
        if np.vdot(Z - U_next, U_next - U) > 0:  # the momentum points uphill
            t = 1.0
        t_next = next_momentum(t)
        Z = U_next + (t - 1.0) / t_next * (U_next - U)
        U, t = U_next, t_next
        late = time.perf_counter() - began > seconds
        if late or n_iter % CHECK_EVERY == 0 or n_iter >= max_iter:
            status = look.at(n_iter, U, tol)
            if status is None and late:
                status = Status.OUT_OF_TIME
            elif status is None and n_iter >= max_iter:
                status = Status.MAX_ITER
    return look.solution(status, n_iter, began)


def next_momentum(t: float) -> float:
    """The larger root of s^2 - s = t^2. Law: s^2 - s <= t^2, which the rate of FISTA rests on."""
    return 0.5 * (1.0 + math.sqrt(1.0 + 4.0 * t * t))


class _Look:
    """Tests points for optimality and keeps the one to return: the last tested, or the best."""

    def __init__(self, loss, penalty, scale, callback):
        self.loss, self.penalty, self.scale, self.callback = loss, penalty, scale, callback
        self.U, self.objective, self.kkt = None, math.inf, math.inf

    def at(self, n_iter, U, tol):
        """The status that ends the solve at U, or None."""
        objective = self.loss.value(U) + self.penalty.value(U)
        kkt = self.penalty.kkt(U, self.loss.grad(U))
        kkt = kkt / self.scale if self.scale > 0 else kkt
        if not (math.isfinite(objective) and math.isfinite(kkt)):
            return Status.NOT_FINITE
        if self.callback is not None:
            self.callback(n_iter, U, objective, kkt)
        if kkt <= tol or objective < self.objective:
            self.U, self.objective, self.kkt = U, objective, kkt
        return Status.CONVERGED if kkt <= tol else None

    def solution(self, status, n_iter, began):
        relative_gap = math.nan
        if self.U is None:
            self.U, self.objective, self.kkt = np.zeros(self.loss.shape), math.nan, math.nan
        else:
            relative_gap = gap.relative_gap(self.loss, self.penalty, self.U)
        return Solution(
            weights=self.U,
            intercept=self.loss.intercept(self.U),
            status=status,
            objective=self.objective,
            kkt=self.kkt,
            relative_gap=relative_gap,
            n_iter=n_iter,
            seconds=time.perf_counter() - began,
        )


def _start(loss, U0):
    if U0 is None:
        return np.zeros(loss.shape)
    U0 = np.asarray(U0, np.float64)
    if U0.shape != loss.shape:
        raise ValueError(f"U0 must be {loss.shape}, got {U0.shape}.")
    return U0
