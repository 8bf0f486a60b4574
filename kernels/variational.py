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

from edgesolve.kernels.designs import Explicit, Masked, Pooled, columns_of
from edgesolve.kernels.gap import relative
from edgesolve.kernels.gated import gated_pool
from edgesolve.kernels.losses import SquaredRows
from edgesolve.kernels.penalties import GroupL2
from edgesolve.kernels.point import Point, check_problem
from edgesolve.kernels.prox import group_norms
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
    if status is Status.CONVERGED:
        return work.solution(best, tol, n_iter, began)
    point = Point.at(loss, penalty, work.weights(best))
    # Where rounding rules, the U of a t may be worse than what h says of it.
    for U in (np.zeros(loss.shape), U0):
        other = point if U is None else Point.at(loss, penalty, np.array(U, np.float64))
        point = other if other.objective < point.objective or not point.finite else point
    return point.solution(loss, penalty, status, n_iter, time.perf_counter() - began)


def _better(one, other):
    """Whether its objective is smaller, or its gap where the objectives differ by rounding only."""
    if abs(one.objective - other.objective) <= ROUNDING * other.objective:
        return one.gap <= other.gap
    return one.objective < other.objective


class _At:
    """h and all it takes at one t. K with n added; alpha (n, c) = R/n; q_i = ||A_i'alpha||^2."""

    def __init__(self, t, value, K, alpha):
        self.t, self.value, self.K, self.alpha = t, value, K, alpha
        self.q = self.objective = self.gap = None


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

    def solution(self, here, tol, n_iter, began):
        """The weights of `here`, where the residual is formed anew and alpha is the dual point.

        A'alpha is what the weights are made of: only open gates cost products of their size.
        """
        loss, n, w = self.loss, self.n, self._w(here.t)
        on = np.flatnonzero(w) if w.any() else np.arange(1)
        part = self.design.restrict(on)
        U, sizes = part.adjoint(here.alpha), np.diff(part.starts)
        v = np.sqrt(np.maximum(here.q, 0.0))
        v[on] = group_norms(U, part.starts)
        U *= np.repeat(w[on], sizes)[:, None]
        AU = part.forward(U)
        offset = AU.mean(axis=0) if loss.centre else np.zeros(AU.shape[1])
        R = loss.Y - (AU - offset)
        objective, gap = self._certificate(here, v, R)
        # grad = ridge U - A'alpha - A'(R/n - alpha), where the last term is rounding.
        kkt = np.where(w > 0, v - self.limit - self.ridge * w * v, np.maximum(v - self.limit, 0.0))
        rest = self.kernel.squares(R / n - here.alpha)
        kkt = math.sqrt(float(kkt @ kkt) + max(float(rest.sum()), 0.0))
        scale = math.sqrt(max(float(self.kernel.squares(loss.Y).sum()), 0.0)) / n
        weights = np.zeros(loss.shape)
        weights[columns_of(self.design.starts, on)[0]] = U
        found = relative(loss, gap, objective)
        return Solution(
            weights=weights,
            intercept=loss.mean_t - offset,
            status=Status.CONVERGED if found <= tol else Status.ILL_CONDITIONED,
            objective=objective,
            kkt=kkt / scale if scale > 0 else kkt,
            relative_gap=found,
            n_iter=n_iter,
            seconds=time.perf_counter() - began,
        )

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
        here.q = self.kernel.squares(here.alpha)
        v = np.sqrt(np.maximum(here.q, 0.0))
        here.objective, here.gap = self._certificate(here, v, self.n * here.alpha)
        return here

    def _newton(self, here, free, slope, bend, grad, damping):
        k, (n, c) = len(free), here.alpha.shape
        B = self.kernel.images(here.alpha, free) * slope[free, None]
        if self.loss.centre:
            B -= B.mean(axis=0)
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
        if self.loss.centre:
            alpha -= alpha.mean(axis=0)
        fit = float(np.vdot(alpha, self.loss.Y))
        if fit < 0.0:  # t is so large that n is below the rounding of K
            fit = math.inf
        return _At(t, 0.5 * fit + 0.5 * float(self.limit @ t), K, alpha)

    def _certificate(self, here, v, R):
        """(P(U), gap) for U_i = w_i A_i'alpha, v_i = ||A_i'alpha|| and R = Y - A U: norms are enough.

        The dual point is s alpha: `gap.py`'s formulas, of another residual than the point's own.
        """
        n, limit, ridge, alpha = self.n, self.limit, self.ridge, here.alpha
        w = self._w(here.t)
        u = w * v
        objective = 0.5 * float(np.vdot(R, R)) / n + float(limit @ u) + 0.5 * ridge * float(u @ u)
        top = float(np.max(v * (1.0 - ridge * w) / limit, initial=0.0))
        feasible = 1.0 / top if top > 0 else math.inf
        if ridge > 0:
            scales = {1.0, min(1.0, feasible)}
        else:
            aa = n * float(np.vdot(alpha, alpha))
            scales = {min(max(np.vdot(alpha, self.loss.Y) / aa, 0.0) if aa > 0 else 1.0, feasible)}
        gaps = []
        for s in scales:
            left = R - (s * n) * alpha
            slack = u * (limit - s * v)
            if ridge > 0:
                slack += 0.5 * ridge * u * u + np.maximum(s * v - limit, 0.0) ** 2 / (2 * ridge)
            gaps.append(0.5 * float(np.vdot(left, left)) / n + float(slack.sum()))
        return objective, min(gaps)

    def _w(self, t):
        return t / (self.limit + self.ridge * t)

    def _centred(self, K):
        if self.loss.centre:
            K = K - K.mean(axis=0) - K.mean(axis=1)[:, None] + K.mean()
        return K


def kernel_of(design):
    """gram(w, on) = sum_i w_i A_iA_i' (n, n), squares(alpha) = ||A_i'alpha||^2 (m,), and
    images(alpha, gates) = A_iA_i'alpha (n, k, c), whichever way is the cheaper one.

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
        return np.einsum("nm,nm->m", (self.XX * (alpha @ alpha.T)) @ self.D, self.D)

    def images(self, alpha, gates):
        n, c = alpha.shape
        D = self.D[:, gates, None]
        spread = (D * alpha[:, None]).reshape(n, -1)
        return (self.XX @ spread).reshape(n, -1, c) * D


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
        return np.add.reduceat(np.square(pulled).sum(axis=1), self.starts[:-1])

    def images(self, alpha, gates):
        blocks = [self.A[:, self.starts[i] : self.starts[i + 1]] for i in gates]
        return np.stack([A @ (A.T @ alpha) for A in blocks], axis=1)
