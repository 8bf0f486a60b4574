"""Few rows, many weights: the group-l2 program as a smooth one in one variable per gate.

    limit ||U_i|| = min over t >= 0 of (limit/2)(||U_i||^2/t + t)

turns it into: minimise over t >= 0 the convex

    h(t) = 1/2 <Y, (K + nI)^-1 Y> + 1/2 sum_i limit_i t_i,     K = sum_i w_i A_iA_i',
    w_i = t_i / (limit_i + ridge t_i),

n x n whatever D and c are: the gates' Hessian uses one factor for all outputs. Projected Newton
needs about ten steps to a gap of 1e-9 from any start (convex.md, section 2; the identity is that of
Micchelli, Morales, Pontil 2013).
"""

import math
import time

import numpy as np

from edgesolve.kernels.designs import Explicit, Masked, Pooled
from edgesolve.kernels.gated import gated_pool
from edgesolve.kernels.losses import SquaredRows
from edgesolve.kernels.penalties import GroupL2
from edgesolve.kernels.point import Point, check_problem
from edgesolve.kernels.solution import Solution, Status

ROUNDING = 1e-14
"""Below this share of h two values can't be told apart: there the smaller gap decides."""


def variational(
    loss: SquaredRows,
    penalty: GroupL2,
    U0=None,
    *,
    tol=1e-6,
    max_iter=60,
    seconds=math.inf,
    callback=None,
) -> Solution:
    """argmin of loss(U) + penalty(U) for few rows; arguments and certificate as `newton`.

    Each step costs about 2 n^3 + 2 n^2 m c multiply-adds for `Masked` designs (others: n^2 D + 2 n D
    c), none of which depends on the number of inputs d. Memory: 7 n^2 + 4 n m c numbers.
    callback(n_iter, U, objective, relative_gap) : every step; it costs the making of U.
    """
    check_problem(loss, penalty, U0, tol, seconds)
    if not isinstance(loss, SquaredRows):
        raise ValueError("variational works on rows; for moments there is `newton`.")
    began = time.perf_counter()
    work = _Dual(loss, penalty)
    t = np.zeros(len(penalty.limit)) if U0 is None else penalty.norms(np.asarray(U0, np.float64))
    here = work.at(t if t.any() else work.uniform())
    if math.isinf(here.value):
        here = work.at(np.zeros(len(t)))
    best, status, n_iter = here, None, 0
    while status is None:
        if not math.isfinite(here.value + here.objective + here.gap):
            status = Status.NOT_FINITE
            break
        best = here if _better(here, best) else best
        if callback is not None:
            point = Point.at(loss, penalty, work.weights(here))
            callback(n_iter, point.U, point.objective, point.relative_gap)
        if here.gap <= 0.9 * tol * here.objective:  # the rest is for rounding
            best, status = here, Status.CONVERGED
        elif time.perf_counter() - began > seconds:
            status = Status.OUT_OF_TIME
        elif n_iter >= max_iter:
            status = Status.MAX_ITER
        else:
            n_iter += 1
            moved = work.step(here)
            if moved is None:
                status = Status.ILL_CONDITIONED
            else:
                here = moved
    point = Point.at(loss, penalty, work.weights(best))
    if status is not Status.CONVERGED:
        # Where rounding rules, the U of a t may be worse than what h says of it.
        for U in (np.zeros(loss.shape), U0):
            other = point if U is None else Point.at(loss, penalty, np.array(U, np.float64))
            point = other if other.objective < point.objective or not point.finite else point
    if status is Status.CONVERGED and not point.relative_gap <= tol:
        status = Status.ILL_CONDITIONED
    return point.solution(loss, penalty, status, n_iter, time.perf_counter() - began)


def _better(one, other):
    """Whether its objective is smaller, or its gap where the objectives differ by rounding only."""
    if abs(one.objective - other.objective) <= ROUNDING * other.objective:
        return one.gap <= other.gap
    return one.objective < other.objective


class _At:
    """h and all it takes at one t. K with n added; alpha (n, c) = R/n; q_i = ||A_i'alpha||^2; B_i = A_iA_i'alpha."""

    def __init__(self, t, value, K, alpha):
        self.t, self.value, self.K, self.alpha = t, value, K, alpha
        self.q = self.B = self.objective = self.gap = None


class _Dual:
    def __init__(self, loss, penalty):
        self.loss, self.limit, self.ridge, self.n = loss, penalty.limit, loss.ridge, loss.n
        self.kernel, self.design = kernel_of(loss.design), loss.design

    def uniform(self):
        """The best t whose entries are all alike, by one eigendecomposition; zeros if that is best."""
        K = self._centred(self.kernel.gram(1.0 / self.limit))
        if not np.isfinite(K).all():
            return np.zeros(len(self.limit))
        values, vectors = np.linalg.eigh(K)
        along = np.square(vectors.T @ self.loss.Y).sum(axis=1)
        # h(t) is at least limit t / 2, so that no larger t can be better than h(0).
        top = along.sum() / (self.n * self.limit.sum())
        grid = top * np.r_[0.0, np.geomspace(1e-8, 1.0, 300)]
        shared = grid / (1.0 + grid * self.ridge / self.limit.mean())
        fit = (along / (np.maximum(values, 0.0) * shared[:, None] + self.n)).sum(axis=1)
        h = 0.5 * fit + 0.5 * self.limit.sum() * grid
        return np.full(len(self.limit), grid[np.argmin(h)])

    def at(self, t):
        """An `_At` with its certificate."""
        return self._complete(self._value(t))

    def weights(self, here):
        """U_i = w_i A_i'alpha, (D, c)."""
        pulled = self.design.adjoint(here.alpha)
        return np.repeat(self._w(here.t), np.diff(self.design.starts))[:, None] * pulled

    def step(self, here):
        """The next `_At`, of smaller h; None where rounding ends the descent."""
        below = self.limit + self.ridge * here.t
        slope = self.limit / below**2  # dw/dt
        grad = 0.5 * (self.limit - here.q * slope)
        bend = here.q * self.ridge * self.limit / below**3
        # More gates than n c leave the Hessian singular: damp it where its step leads nowhere.
        for damping in (1e-14, 1e-8, 1e-4, 1.0):
            free = np.flatnonzero((here.t > 0) | (grad < 0))
            while len(free):
                move = -self._newton(here, free, slope, bend, grad, damping)
                stuck = (here.t[free] <= 0) & (move < 0)
                if not stuck.any():
                    break
                free = free[~stuck]
            if not len(free):
                return None
            found = self._search(here, free, move, grad) if np.isfinite(move).all() else None
            if found is not None:
                return found
        return None

    def _search(self, here, free, move, grad):
        """The first of the shorter and shorter steps that descends, projected on t >= 0; or None."""
        length = 1.0
        while length > 1e-8:
            t = here.t.copy()
            t[free] = np.maximum(t[free] + length * move, 0.0)
            tried = self._value(t)
            if tried.value <= here.value + 1e-4 * float(grad @ (t - here.t)):
                return self._complete(tried)
            if tried.value - here.value <= ROUNDING * here.value:
                tried = self._complete(tried)
                if tried.gap < 0.5 * here.gap:
                    return tried
            length *= 0.5
        return None

    def _complete(self, here):
        here.q, here.B = self.kernel.squares(here.alpha)
        if self.loss.centre:
            here.B -= here.B.mean(axis=0)
        here.objective, here.gap = self._certificate(here)
        return here

    def _newton(self, here, free, slope, bend, grad, damping):
        k, (n, c) = len(free), here.alpha.shape
        B = np.ascontiguousarray(here.B[:, free]) * slope[free, None]
        # By LU for each: half the price of an inverse, and most trial points need no Hessian.
        solved = np.linalg.solve(here.K, B.reshape(n, k * c)).reshape(n, k, c)
        H = np.einsum("nic,njc->ij", B, solved, optimize=True)
        H.flat[:: k + 1] += bend[free] + damping * np.trace(H) / k + np.finfo(float).tiny
        return np.linalg.solve(H, grad[free])

    def _value(self, t):
        on = np.flatnonzero(t > 0)
        K = self._centred(self.kernel.gram(self._w(t)[on], on))
        K.flat[:: self.n + 1] += self.n
        try:
            alpha = np.linalg.solve(K, self.loss.Y)
        except np.linalg.LinAlgError:
            return _At(t, math.inf, K, np.zeros_like(self.loss.Y))
        fit = float(np.vdot(alpha, self.loss.Y))
        if fit < 0.0:  # t is so large that n is below the rounding of K
            fit = math.inf
        return _At(t, 0.5 * fit + 0.5 * float(self.limit @ t), K, alpha)

    def _certificate(self, here):
        """(P(U), gap): `gap.py`'s formulas, where U_i = w_i A_i'alpha leaves norms alone."""
        v = np.sqrt(np.maximum(here.q, 0.0))
        u = self._w(here.t) * v
        rr = self.n * float(np.vdot(here.alpha, here.alpha))
        objective = 0.5 * rr + float(self.limit @ u) + 0.5 * self.ridge * float(u @ u)
        if self.ridge > 0:
            excess = np.maximum(v - self.limit, 0.0)
            slack = u * (self.limit - v) + 0.5 * self.ridge * u * u + excess**2 / (2 * self.ridge)
            return objective, float(slack.sum())
        top = float(np.max(v / self.limit, initial=0.0))
        ry = float(np.vdot(here.alpha, self.loss.Y))
        s = min(max(ry / rr, 0.0) if rr > 0 else 1.0, 1.0 / top if top > 0 else math.inf)
        return objective, 0.5 * (1.0 - s) ** 2 * rr + float((u * (self.limit - s * v)).sum())

    def _w(self, t):
        return t / (self.limit + self.ridge * t)

    def _centred(self, K):
        if self.loss.centre:
            K = K - K.mean(axis=0) - K.mean(axis=1)[:, None] + K.mean()
        return K


def kernel_of(design):
    """gram(w, on) = sum_i w_i A_iA_i' (n, n), and squares(alpha), whichever way is the cheaper one.

    `Pooled` rows are written out, n D numbers: they are few here.
    """
    if isinstance(design, Masked):
        return _MaskedKernel(design)
    if isinstance(design, Pooled):
        design = Explicit(gated_pool(design.z.astype(np.float64), design.D), design.starts)
    return _RowsKernel(design)


class _MaskedKernel:
    """A_iA_i' = (XX') * (D_i D_i'): one n x n product for all gates, whatever d is."""

    def __init__(self, design):
        X = design.X.astype(np.float64, copy=False)
        self.XX, self.D = X @ X.T, design.D.astype(np.float64)

    def gram(self, w, on=slice(None)):
        D = self.D[:, on]
        return self.XX * ((D * w) @ D.T)

    def squares(self, alpha):
        n, c = alpha.shape
        spread = (self.D[:, :, None] * alpha[:, None]).reshape(n, -1)
        B = (self.XX @ spread).reshape(n, -1, c) * self.D[:, :, None]
        return np.einsum("nmc,nc->m", B, alpha), B


class _RowsKernel:
    """The same from explicit rows, blocks of any size."""

    def __init__(self, design):
        self.A, self.starts = design.A.astype(np.float64, copy=False), design.starts
        self.sizes = np.diff(design.starts)

    def gram(self, w, on=slice(None)):
        every = np.zeros(len(self.sizes))
        every[on] = w
        return (self.A * np.repeat(every, self.sizes)) @ self.A.T

    def squares(self, alpha):
        pulled = self.A.T @ alpha
        q = np.add.reduceat(np.square(pulled).sum(axis=1), self.starts[:-1])
        blocks = zip(self.starts[:-1], self.starts[1:], strict=True)
        B = np.stack([self.A[:, a:b] @ pulled[a:b] for a, b in blocks], axis=1)
        return q, B
