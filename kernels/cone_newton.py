"""Primal-dual interior-point Newton for the ReLU program: 15 to 25 steps, each dearer than ADMM's.

The Newton matrix is block diagonal, 2 m blocks d x d, plus the fit, of rank min(n, m d): one
factor of that size a step. On correlated features it certifies 1e-6 where ADMM shows 1e-1.
"""

import math
import time

import numpy as np

from edgesolve.kernels import barrier
from edgesolve.kernels.cones import Incumbent, ReluProgram, ReluSolution, starting_point
from edgesolve.kernels.solution import Status

MOST_FLOATS = 1 << 28
"""Most numbers of one step (2 GiB); a larger program is for `relu_admm`."""

FIRST_NORM, FIRST_MU = 10.0, 10.0
"""The start, in units of P(0): its penalty, and its complementarity. Larger than the optimum's on
purpose: from a smaller start the first ten steps were cut to a tenth by the boundary."""

FIRST_FIT = 10.0
"""Nor may a vector of the start fit more than this times y: a small lam would allow any length."""

LEAST_CURVATURE = 1e-6
"""Share of X's mean square added to each block before Woodbury, which cancels where a block is
singular without the fit: 1e-9 stalled at lam = 1e-5 lam_max. Refinement takes it off again."""

REFINEMENTS = 4

NEAR_BOUNDARY = 0.99


def relu_newton(
    X, D, G, Y, lam, *, intercept=True, U0=None, tol=1e-6, max_iter=80, seconds=math.inf
) -> ReluSolution:
    """The ReLU program of `cones.py`, solved output by output to a certified relative gap `tol`.

    X (n, d), D (n, m) bool = X G >= 0, G (d, m), Y (n, c), lam > 0, as in `ReluProgram.of`. U0 :
    (v, w), each (m, d, c), such as `decompose` returns: not a start, an interior point can't use
    one, but the answer is never worse. seconds : budget for all outputs together. max_iter : steps
    per output. ValueError: bad input, or a step beyond 2 GiB.

    Cost of a step: 2 m n d^2 + n m d min(n, m d) + min(n, m d)^3; memory n m d + min(n, m d)^2.
    Mehrotra 1992 for the corrector; Andersen et al. 2000 for the norms.
    """
    began = time.perf_counter()
    n, d, m = *np.shape(X), np.shape(D)[-1]
    floats = 2 * n * m * d + 3 * min(n, m * d) ** 2 + 6 * m * d * d
    if floats > MOST_FLOATS:
        raise ValueError(
            f"a Newton step for n={n}, d={d}, m={m} takes {floats * 8 / 2**30:.0f} GiB, at most "
            f"{MOST_FLOATS * 8 >> 30} are allowed: use relu_admm, or fewer gates."
        )
    program = ReluProgram.of(X, D, G, Y, lam, intercept)
    best = Incumbent(program)
    start = starting_point(program, U0)
    if start is not None:
        best.look(start)
    statuses, n_iter, c = [], 0, len(program.lam)
    for k in range(c):
        single = Incumbent(program.output(k))
        with np.errstate(all="ignore"):  # what overflows is caught as ILL_CONDITIONED
            status, steps = _solve(single, tol, max_iter, began + seconds)
        at = [k, k + c]
        if single.objective[0] <= best.objective[k]:
            best.u[:, at], best.objective[k] = single.u, single.objective[0]
        best.bound[k] = max(best.bound[k], single.bound[0])
        statuses.append(status)
        n_iter = max(n_iter, steps)
    status = Status.CONVERGED
    if (best.relative_gap > tol).any():
        status = next(s for s in statuses if s is not Status.CONVERGED)
    return best.solution(status, n_iter, began)


def _solve(best, tol, max_iter, deadline):
    """Improves `best`, of a single output, until its gap is within tol; (status, steps)."""
    program = best.program
    (n, d), m, lam = program.X.shape, program.D.shape[1], program.lam[0]
    at_zero = best.at_zero[0]
    if best.relative_gap[0] <= tol:
        return Status.CONVERGED, 0
    S = np.hstack([program.S, program.S])
    size = min(0.5 * FIRST_NORM * at_zero / (lam * m), FIRST_FIT / math.sqrt(np.mean(program.X**2)))
    u = np.hstack([program.inside, program.inside]) * size
    # A zero row's inequality is 0 >= 0: a slack of its own keeps it out of the way.
    s = np.where(program.X.any(axis=1)[:, None], S * (program.X @ u), 1.0)
    mu = FIRST_MU * at_zero / (2 * m * n)
    eta, p = mu / s, barrier.SmoothNorm(u, u, lam, mu).pull
    for step in range(max_iter + 1):
        pushed = program.X.T @ (S * eta)
        R = best.look(u.reshape(d, 2, m), pushed.reshape(d, 2, m))
        if best.relative_gap[0] <= tol:
            best.switch_off(tol)
            return Status.CONVERGED, step
        if step == max_iter:
            return Status.MAX_ITER, step
        if time.perf_counter() > deadline:
            return Status.OUT_OF_TIME, step
        grad = program.adjoint(R).reshape(d, -1) / n
        total = np.vdot(eta, s) + np.sum(lam * np.linalg.norm(u, axis=0)) - np.vdot(p, u)
        # Far below the tolerance complementarity only worsens the conditioning.
        floor = 0.02 * tol * best.objective[0] / (2 * m * n)
        norm = barrier.SmoothNorm(u, p, lam, mu)
        try:
            system = _System(program, S, norm, eta / s)
        except np.linalg.LinAlgError:
            return Status.ILL_CONDITIONED, step

        def direction(mu, correction, u=u, s=s, p=p, eta=eta, grad=grad, system=system, norm=norm):
            target = mu / s - correction
            pull = barrier.SmoothNorm(u, p, lam, mu).pull
            du = system.solve(grad - pull + program.X.T @ (S * target))
            ds = S * (program.X @ du)
            return du, ds, target - eta - eta / s * ds, pull - p + norm.times(du)

        du, ds, deta, dp = direction(0.01 * total / (2 * m * n), 0.0)
        primal, dual = _lengths(s, ds, eta, deta, p, dp, lam, 1.0)
        left = np.vdot(eta + dual * deta, s + primal * ds) / np.vdot(eta, s)
        mu = max(np.clip(left**3, 1e-3, 0.5) * total / (2 * m * n), floor)
        du, ds, deta, dp = direction(mu, deta * ds / s)
        primal, dual = _lengths(s, ds, eta, deta, p, dp, lam, NEAR_BOUNDARY)
        # s is carried on, not recomputed: H u would lose the digits of the smallest slacks.
        u, s, eta, p = u + primal * du, s + primal * ds, eta + dual * deta, p + dual * dp
        if not (np.isfinite(u).all() and np.isfinite(eta).all()):
            return Status.ILL_CONDITIONED, step


def _lengths(s, ds, eta, deta, p, dp, lam, share):
    """Primal and dual step lengths: `share` of the way to the boundary, at most 1."""
    primal = share * barrier.to_boundary(s, ds).min()
    dual = share * min(barrier.to_boundary(eta, deta).min(), barrier.to_sphere(p, dp, lam).min())
    return min(1.0, primal), min(1.0, dual)


class _System:
    """(blockdiag(H_i' diag(eta/s) H_i + norm) + A'A/n) du = rhs, factored once, solved often.

    With N_i = M_vi^{-1} + M_wi^{-1} = L_i L_i' and B = [D_i X L_i], Woodbury leaves n I + B B', or
    n I + B'B where m d < n.
    """

    def __init__(self, program, S, norm, weight):
        self.program, self.S, self.norm, self.weight = program, S, norm, weight
        n, m = program.D.shape
        self.root = barrier.inverse_factors(
            barrier.weighted_grams(program.X, weight) + norm.hessian(),
            LEAST_CURVATURE * np.mean(program.X**2),
        )
        inverse = self.root.transpose(0, 2, 1) @ self.root
        N = inverse[:m] + inverse[m:]
        diagonal = np.arange(N.shape[1])
        N[:, diagonal, diagonal] += 4 * barrier.EPS * np.trace(N, axis1=1, axis2=2)[:, None]
        L = np.linalg.cholesky(N)
        B = np.empty((n, m, N.shape[1]))
        for i in range(m):
            np.multiply(program.X @ L[i], program.D[:, i, None], out=B[:, i])
        B = program.project(B.reshape(n, -1))
        self.B, self.L_inverse = (B, np.linalg.inv(L)) if B.shape[1] < n else (None, None)
        K = B @ B.T if self.B is None else B.T @ B
        K.flat[:: len(K) + 1] += n
        self.small = np.linalg.inv(K)

    def solve(self, rhs):
        """du (d, 2m), refined against the operator itself while that helps."""
        du = self._woodbury(rhs)
        rest = rhs - self._times(du)
        size = np.linalg.norm(rest)
        for _ in range(REFINEMENTS):
            if not size > 1e-12 * np.linalg.norm(rhs):
                break
            better = du + self._woodbury(rest)
            rest = rhs - self._times(better)
            if not np.linalg.norm(rest) < size:
                break
            du, size = better, np.linalg.norm(rest)
        return du

    def _woodbury(self, rhs):
        x = barrier.divide(self.root, rhs)
        a = self._fit(x)
        if self.B is None:
            pushed = self._adjoint(self.small @ a)
        else:
            # A'(n I + B B')^{-1} a without the difference of nearly equal vectors that is a's part.
            z = (self.small @ (self.B.T @ a)).reshape(len(self.L_inverse), -1).T
            half = barrier.times(self.L_inverse.transpose(0, 2, 1), z)
            pushed = np.hstack([half, -half])
        return barrier.divide(self.root, rhs - pushed)

    def _times(self, x):
        Hx = self.S * (self.program.X @ x)
        inequalities = self.program.X.T @ (self.S * (self.weight * Hx))
        n = len(Hx)
        return self._adjoint(self._fit(x)) / n + inequalities + self.norm.times(x)

    def _fit(self, x):
        return self.program.fit((self.program.X @ x).reshape(len(self.S), 2, -1))

    def _adjoint(self, q):
        return self.program.adjoint(q).reshape(self.program.X.shape[1], -1)
