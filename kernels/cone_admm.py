"""ADMM for the ReLU program: cheap steps that all outputs share, for what Newton can't hold.

Splits z = u (shrunk) and T = X u (into the cones). (2 D_i - I)^2 = I, so every gate and sign has
H_i'H_i = X'X: one d x d factor M serves all, and Woodbury adds one n x n matrix, whatever m and c
(Boyd et al. 2011 for ADMM). It slows down where many rows press on a cone: see `cone_newton.py`.
"""

import math
import time

import numpy as np

from edgesolve.kernels.cones import Incumbent, ReluProgram, ReluSolution, starting_point
from edgesolve.kernels.interior import product
from edgesolve.kernels.solution import Status

CHECK_EVERY = 20
"""Iterations between two certificates; each costs about one iteration."""

FACTOR_ROWS = 2048
"""Up to this n the n x n matrix is inverted (32 MiB each copy), beyond it CG replaces it."""

RELAXATION = 1.7
FIRST_ADAPTATION = 20


def relu_admm(
    X, D, G, Y, lam, *, intercept=True, U0=None, tol=1e-6, max_iter=5000, seconds=math.inf
) -> ReluSolution:
    """The ReLU program of `cones.py`, all outputs together, to a certified relative gap `tol`.

    X (n, d), D (n, m) bool = X G >= 0, G (d, m), Y (n, c), lam > 0, as in `ReluProgram.of`. U0 :
    (v, w), each (m, d, c), a warm start such as `decompose` returns; the answer is never worse.
    seconds : time budget. The point returned is repaired into the cones and its gap is of that
    point, however the solve ended. ValueError: bad input.

    Cost of an iteration: 6 n m d c + n^2 c; memory 10 n m c + n^2 floats. The two step parameters
    are balanced at iterations 20, 40, 80, ...: each time costs one factor.
    """
    began = time.perf_counter()
    program = ReluProgram.of(X, D, G, Y, lam, intercept)
    best = Incumbent(program)
    state = _State(program, starting_point(program, U0))
    best.look(state.z)
    next_balance, n_iter = FIRST_ADAPTATION, 0
    status = Status.CONVERGED if (best.relative_gap <= tol).all() else None
    while status is None:
        n_iter += 1
        balancing = n_iter == next_balance
        state.step(balancing)
        if balancing:
            next_balance *= 2
        late = time.perf_counter() - began > seconds
        if late or n_iter % CHECK_EVERY == 0 or n_iter >= max_iter:
            best.look(state.z, state.push())
            if (best.relative_gap <= tol).all():
                status = Status.CONVERGED
            elif late or n_iter >= max_iter:
                status = Status.OUT_OF_TIME if late else Status.MAX_ITER
    return best.solution(status, n_iter, began)


class _State:
    """The iterates: z (d, 2c, m) and T (n, 2c, m), their scaled duals phi and psi."""

    def __init__(self, program, start):
        self.program = program
        self.n, d = program.X.shape
        spectrum, self.basis = np.linalg.eigh(program.X.T @ program.X)
        self.spectrum = np.maximum(spectrum, 0.0)
        # The curvature of the fit sets both scales, these factors were the best of six tried.
        self.rho_z, self.rho_t = 0.3 * max(spectrum.mean(), 1e-300) / self.n, 5.0 / self.n
        self.z = np.zeros((d, 2 * len(program.lam), program.D.shape[1]))
        if start is not None:
            self.z = start
        self.T = product(program.X, self.z)
        self.phi, self.psi = np.zeros_like(self.z), np.zeros_like(self.T)
        self.low = np.where(program.D, 0.0, -np.inf)[:, None, :]
        self.high = np.where(program.D, np.inf, 0.0)[:, None, :]
        self.target = program.adjoint(program.Y) / self.n
        self.q = np.zeros_like(program.Y)
        self.overlap = None
        if self.n <= FACTOR_ROWS:
            counts = program.D.astype(np.float64)
            self.overlap = counts @ counts.T
        self.factor()

    def factor(self):
        """M^{-1} from the eigenbasis of X'X, and the inverse of n I + 2 (X M^{-1} X') o (D D')."""
        X, M = self.program.X, self.rho_z + self.rho_t * self.spectrum
        self.inverse = (self.basis / M) @ self.basis.T
        if self.overlap is not None:
            K = 2.0 * (X @ self.inverse @ X.T) * self.overlap
            K = self.program.project(self.program.project(K).T)
            K.flat[:: self.n + 1] += self.n
            self.small = np.linalg.inv(K)

    def step(self, balance):
        """One iteration; with `balance` it ends by changing rho_z and rho_t."""
        program, z, T = self.program, self.z, self.T
        rhs = self.target + self.rho_z * (z - self.phi) + self.rho_t * program.back(T - self.psi)
        u = self._divide(rhs)
        XU = product(program.X, u)
        self.q = self._small(program.fit(XU))
        change = self._divide(program.adjoint(self.q))
        u -= change
        XU -= product(program.X, change)
        near = RELAXATION * u + (1.0 - RELAXATION) * z + self.phi
        self.z = self._shrink(near)
        self.phi = near - self.z
        XU_near = RELAXATION * XU + (1.0 - RELAXATION) * T + self.psi
        self.T = np.clip(XU_near, self.low, self.high)
        self.psi = XU_near - self.T
        if balance:
            back = program.back
            self._balance(
                _ratio(u - self.z, u, self.z) / _ratio(self.z - z, self.phi),
                _ratio(XU - self.T, XU, self.T) / _ratio(back(self.T - T), back(self.psi)),
            )

    def push(self):
        """H'eta (d, 2c, m), eta = max(-rho_t psi, 0) in the signs of the cones: >= 0 exactly."""
        return -self.rho_t * self.program.back(self.psi)

    def _divide(self, rhs):
        return (self.inverse @ rhs.reshape(len(rhs), -1)).reshape(rhs.shape)

    def _shrink(self, a):
        limit = np.tile(self.program.lam, 2)[:, None] / self.rho_z
        norms = np.linalg.norm(a, axis=0)
        keep = ~(norms <= limit)
        return a * np.where(keep, 1.0 - limit / np.where(keep, norms, 1.0), 0.0)

    def _small(self, a):
        """(n I + A M^{-1} A')^{-1} a for a (n, c): by the inverse, or by CG from the last answer."""
        if self.overlap is not None:
            return self.small @ a

        def times(q):
            Mq = self._divide(self.program.adjoint(q))
            return self.n * q + self.program.fit(product(self.program.X, Mq))

        # As exact as the iteration is by now, an order better: the last answer is that near.
        scale = np.linalg.norm(a, axis=0)
        rest = np.linalg.norm(a - times(self.q), axis=0)
        return conjugate_gradients(times, a, self.q, np.maximum(0.05 * rest, 1e-13 * scale))

    def _balance(self, of_z, of_t):
        grow_z, grow_t = (float(np.clip(math.sqrt(r), 0.1, 10.0)) for r in (of_z, of_t))
        if max(grow_z, 1 / grow_z, grow_t, 1 / grow_t) > 1.5:
            self.rho_z, self.rho_t = self.rho_z * grow_z, self.rho_t * grow_t
            self.phi, self.psi = self.phi / grow_z, self.psi / grow_t
            self.factor()


def conjugate_gradients(times, b, x, within, max_iter=50):
    """x (n, c) with ||times(x) - b|| <= within (c,) per column, from the given x."""
    r = b - times(x)
    p, rr = r, np.einsum("ij,ij->j", r, r)
    for _ in range(max_iter):
        if (np.sqrt(rr) <= within).all():
            break
        Kp = times(p)
        curve = np.einsum("ij,ij->j", p, Kp)
        a = np.divide(rr, curve, out=np.zeros_like(rr), where=curve > 0)
        x, r = x + a * p, r - a * Kp
        before, rr = rr, np.einsum("ij,ij->j", r, r)
        p = r + np.divide(rr, before, out=np.zeros_like(rr), where=before > 0) * p
    return x


def _ratio(change, *sizes):
    """||change|| relative to the largest of `sizes`, kept off 0."""
    size = max(np.linalg.norm(s) for s in sizes)
    return max(np.linalg.norm(change) / size if size > 0 else 1.0, 1e-12)
