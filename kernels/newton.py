"""Newton's method for group-l2 penalties: the default solver, from rows or from moments.

Three loops. Outside, the certificate over all gates and the choice of the gates to work on. Then a
few accelerated proximal steps in the metric of `surrogate.py`, which find out which gates are on.
Then Newton steps on those: there the objective is smooth, and its system is solved by conjugate
gradients whose preconditioner is the surrogate's Hessian, gates that would cross zero being pinned
there and the rest solved again.

Products inside a direction are in float32: it only has to be a good direction. What is returned,
its objective and its certificate are in float64.
"""

import math
import time

import numpy as np

from edgesolve.kernels.designs import columns_of
from edgesolve.kernels.fista import next_momentum
from edgesolve.kernels.penalties import GroupL2
from edgesolve.kernels.point import Point, check_problem
from edgesolve.kernels.solution import Solution, Status
from edgesolve.kernels.surrogate import Surrogate

FIRST_STEPS = 15
"""Proximal steps before the first Newton step; later rounds take 5 to 60, as Newton fares."""

WARM_STEPS = 2
"""The same from a warm start: it only has to find the gates that enter."""

CLOSE_GAP = 1e-2
"""A warm start below this relative gap that no gate enters goes to Newton at once."""

ROUGH_GAP = 1e-3
"""Down to this relative gap proximal steps are taken in float32."""

MAX_CG = 60

WORSE = 1e-3
"""A round that ends this much above the best point is not gone on from: FISTA is no descent."""


def newton(
    loss, penalty: GroupL2, U0=None, *, tol=1e-6, max_iter=60, seconds=math.inf, callback=None
) -> Solution:
    """argmin of loss(U) + penalty(U), both in the scaling of `losses.py`.

    loss : `SquaredMoments` or `SquaredRows`. U0 (D, c) : warm start, not written to. tol : on the
    *relative duality gap*, so that CONVERGED is a proof. max_iter : rounds, each of which looks at
    all gates once. seconds : time budget. callback(n_iter, U, objective, relative_gap) : every round.

    Returns the point that met `tol`, else that of the smallest objective seen, with its own gap.
    Memory beside the loss: `peak.peak_mib`. NaN or overflow on the way is the status NOT_FINITE.
    ValueError: another penalty or lam = 0 (use `ridge` or `fista`), groups or U0 that don't fit the
    loss, NaN in U0, tol < 0, seconds <= 0.

    Proximal Newton on an identified support: Lee, Sun, Saunders 2014; preconditioner: surrogate.py.
    """
    check_problem(loss, penalty, U0, tol, seconds)
    began = time.perf_counter()
    work = None
    U = np.zeros(loss.shape) if U0 is None else np.array(U0, np.float64)
    best, status, n_iter = Point.at(loss, penalty, U), None, 0
    steps = FIRST_STEPS if U0 is None else WARM_STEPS
    point = best
    if U0 is not None:
        zero = Point.at(loss, penalty, np.zeros(loss.shape))
        best = point = zero if zero.objective < best.objective else best
    while True:
        if not point.finite:
            status = Status.NOT_FINITE
            break
        if point.objective <= best.objective:
            best = point
        if callback is not None:
            callback(n_iter, point.U, point.objective, point.relative_gap)
        if point.relative_gap <= tol:
            # Not `best`: of two points equal up to rounding the other may have the larger gap.
            best, status = point, Status.CONVERGED
        elif time.perf_counter() - began > seconds:
            status = Status.OUT_OF_TIME
        elif n_iter >= max_iter:
            status = Status.MAX_ITER
        if status is not None:
            break
        n_iter += 1
        start = point if point.objective <= best.objective * (1 + WORSE) else best
        try:
            if work is None:
                work = _Work(loss, penalty, lambda: time.perf_counter() - began > seconds)
            U, good = work.round(start, steps, n_iter == 1 and U0 is None)
        except np.linalg.LinAlgError:  # a factor of what overflowed
            status = Status.NOT_FINITE
            break
        steps = 5 if good else min(max(2 * steps, 10), 60)
        point = Point.at(loss, penalty, U)
    return best.solution(loss, penalty, status, n_iter, time.perf_counter() - began)


class _Work:
    """What the rounds of one solve share."""

    def __init__(self, loss, penalty, late):
        self.loss, self.penalty, self.late = loss, penalty, late
        self.starts = penalty.starts
        self.rough = loss.astype(np.float32)
        self.surrogate = Surrogate.of(loss, penalty.starts)

    def round(self, point, steps, first):
        """(U, did Newton take a long step at the end) from one choice of gates."""
        penalty, starts = self.penalty, self.starts
        on = penalty.norms(point.U) > 0
        pull = penalty.norms(point.V - self.loss.ridge * point.U)
        # At the first look many gates wait that will not stay; later ones must violate their limit.
        near = pull > (0.8 if first else 1.0 - 1e-9) * penalty.limit
        gates = np.flatnonzero(on | near)
        if not len(gates):  # a gap of rounding at zero
            return point.U, False
        columns, _ = columns_of(starts, gates)
        part = _Part(self.loss, self.rough, penalty, self.surrogate).restrict(gates)
        rough = point.relative_gap > ROUGH_GAP
        loss = part.rough if rough else part.loss
        U, V = point.U[columns], point.V[columns]
        if steps != WARM_STEPS or point.relative_gap > CLOSE_GAP or not on[gates].all():
            U, V = _proximal_steps(part, loss, U, V, steps, self.late)
        U, good = self._newton_steps(part, U, V, point, rough)
        out = np.zeros_like(point.U)
        out[columns] = U
        return out, good

    def _newton_steps(self, part, U, V, point, rough):
        """Up to four steps from U, where V = A'R/n; each follows V along its step."""
        columns, good = np.arange(len(U)), False
        out = U
        for _ in range(4):
            on = np.flatnonzero(part.penalty.norms(U) > 0)
            if not len(on) or self.late():
                break
            here, _ = columns_of(part.penalty.starts, on)
            part, columns, U, V = part.restrict(on), columns[here], U[here], V[here]
            loss = part.rough if rough else part.loss
            U, V, length, gain = _newton_step(part, loss, U, V, point.relative_gap)
            if not gain > 0:
                break
            out = np.zeros_like(out)
            out[columns] = U
            good = length > 0.5
            if not good or gain < max(1e-9, 1e-3 * point.relative_gap) * point.objective:
                break
        return out, good


class _Part:
    """A problem in some of the gates: the loss in both precisions, the penalty and the surrogate."""

    def __init__(self, loss, rough, penalty, surrogate):
        self.loss, self.rough, self.penalty, self.surrogate = loss, rough, penalty, surrogate

    def restrict(self, gates):
        starts = self.penalty.starts
        if len(gates) == len(starts) - 1:
            return self
        return _Part(
            self.loss.restrict(starts, gates),
            self.rough.restrict(starts, gates),
            self.penalty.restrict(gates),
            self.surrogate.restrict(starts, gates),
        )


def _proximal_steps(part, loss, U, V, steps, late):
    """FISTA in the surrogate's metric from U, where V = A'R/n; L grows where it must. Both at the end."""
    dtype = loss.dtype.type
    U, V = U.astype(dtype), V.astype(dtype)
    L = part.surrogate.lipschitz()
    Z, V_Z, t = U, V, 1.0
    for _ in range(steps):
        if late():
            break
        while True:
            U_next = part.surrogate.prox(
                V_Z + dtype(L) * part.surrogate.metric(Z), L, part.penalty.limit
            )
            V_next, _, _ = loss.residual(U_next)
            move = U_next - Z
            bend = float(np.vdot(move, V_Z - V_next))
            weighed = part.surrogate.metric(move)
            length = float(np.vdot(move, weighed))
            if not bend > L * length * (1.0 + 1e-3):
                break
            L = max(1.1 * bend / length, 1.1 * L)
        if float(np.vdot(weighed, U_next - U)) < 0:
            t = 1.0
        t_next = next_momentum(t)
        beta = dtype((t - 1.0) / t_next)
        Z, V_Z = U_next + beta * (U_next - U), V_next + beta * (V_next - V)
        U, V, t = U_next, V_next, t_next
    return U.astype(np.float64), V.astype(np.float64)


def _newton_step(part, loss, U, V, relative_gap):
    """(new U, new V, step length, decrease of the objective) from a point all of whose gates are on."""
    penalty, limit = part.penalty, part.penalty.limit
    norms = penalty.norms(U)
    spread = penalty.spread
    grad = loss.ridge * U - V + spread(limit / norms) * U
    direction, pinned = _direction(part, U, norms, grad, relative_gap)
    bent = loss.product(direction.astype(loss.dtype)).astype(np.float64)
    slope = float(np.vdot(direction, loss.ridge * U - V))
    curve = float(np.vdot(direction, bent) + loss.ridge * np.vdot(direction, direction))
    along, squared = penalty.inner(U, direction), penalty.inner(direction, direction)

    def change(a):
        moved = np.sqrt(np.maximum(norms**2 + 2 * a * along + a * a * squared, 0.0))
        moved[pinned] = np.abs(1.0 - a) * norms[pinned]
        return a * slope + 0.5 * a * a * curve + float(limit @ (moved - norms))

    length = _line(norms, along, squared, slope, curve, limit, pinned)
    if pinned.any() and change(1.0) <= change(length):
        length = 1.0
    W = U + length * direction
    if length == 1.0:
        W[spread(pinned)[:, 0]] = 0.0
    return W, V - length * bent, length, -change(length)


def _direction(part, U, norms, grad, relative_gap):
    """(Newton direction float64, gates pinned at zero by it)."""
    limit, spread, inner = part.penalty.limit, part.penalty.spread, part.penalty.inner
    f32 = np.float32
    solve = part.surrogate.preconditioner(U, norms, limit)
    unit = (U / spread(norms)).astype(f32)
    pull, ridge = spread(limit / norms).astype(f32), f32(part.loss.ridge)

    def hessian(p):
        across = p - unit * spread(inner(unit, p)).astype(f32)
        return part.rough.product(p) + ridge * p + pull * across

    tol = min(0.1, max(1e-4, 0.3 * math.sqrt(relative_gap)))
    free, x = np.ones(len(norms), bool), np.zeros_like(unit)
    rest, right = -grad.astype(f32), -grad.astype(f32)
    for _ in range(3):
        keep = spread(free)
        goal = tol * _norm(right * keep)
        x = _conjugate_gradient(hessian, solve, x, rest * keep, keep, goal, 1e4 * _norm(U))
        crossing = free & (inner(U + x, unit) <= 0.02 * norms)
        if not crossing.any():
            break
        x = np.where(spread(crossing), -U.astype(f32), x)
        free &= ~crossing
        if not free.any():
            break
        rest = right - hessian(x)
    return np.where(spread(free), x, -U), ~free


def _conjugate_gradient(product, solve, x, rest, keep, goal, far):
    """x + the approximate solution for the residual `rest`, in the entries of `keep` alone.

    far : no step is longer than that.
    """
    p = z = solve(rest) * keep
    rho = float(np.vdot(rest, z))
    for _ in range(MAX_CG):
        if not _norm(rest) > goal:
            break
        q = product(p) * keep
        curvature = float(np.vdot(p, q))
        # Where the objective is flat along p float32 would overflow: what there is has to do.
        if not (curvature > 0 and 0 < rho and rho * _norm(p) < far * curvature):
            break
        a = np.float32(rho / curvature)
        x, rest = x + a * p, rest - a * q
        z = solve(rest) * keep
        before, rho = rho, float(np.vdot(rest, z))
        p = z + np.float32(rho / before) * p
    return x


def _line(norms, along, squared, slope, curve, limit, pinned):
    """The minimiser over [0, 2], or [0, 1] with pinned gates, of the objective on the ray."""
    low, high = 0.0, 1.0 if pinned.any() else 2.0
    pinned_slope = -float(limit[pinned] @ norms[pinned])
    rest = ~pinned
    n2, b, c, w = norms[rest] ** 2, along[rest], squared[rest], limit[rest]
    for _ in range(40):
        a = 0.5 * (low + high)
        length = np.sqrt(np.maximum(n2 + 2 * a * b + a * a * c, np.finfo(float).tiny))
        rising = slope + a * curve + pinned_slope + float(w @ ((b + a * c) / length)) > 0
        low, high = (low, a) if rising else (a, high)
    return 0.5 * (low + high)


def _norm(v):
    return math.sqrt(float(np.vdot(v, v)))
