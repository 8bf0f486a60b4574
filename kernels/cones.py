"""ReLU with cone constraints: the program, its certificate, and the plain network it stands for.

    minimise 1/(2n) ||sum_i D_i X (v_i - w_i) - y||^2 + lam sum_i (||v_i|| + ||w_i||)
    subject to (2 D_i - I) X v_i >= 0, the same for w_i            D_i = diag(X g_i >= 0)

for each output y on its own; y and the fit are centred if there is an intercept. Inside the cones
D_i X v = max(X v, 0): the answer is a ReLU network without stored gates (Pilanci, Ergen 2020).
`cone_newton.py` and `cone_admm.py` solve it.
"""

import time
from dataclasses import dataclass, replace

import numpy as np

from edgesolve.kernels.interior import interior, product, repair, signs
from edgesolve.kernels.solution import Status

OBJECTIVE_FLOOR = 1e-9
"""Relative gaps divide by no less than this share of P(0): below it rounding blurs P."""


@dataclass(frozen=True, slots=True, eq=False)
class ReluSolution:
    """The end of a solve. Every figure is evaluated at v and w, in float64.

    v, w (m, d, c) : inside their cones by more than rounding; a gate off is exactly zero.
    intercept (c,) : prediction D_i X (v_i - w_i) summed, plus this. zeros if there is none.
    objective, relative_gap (c,) : (P - lower bound on P*) / P per output; converged means each
    gap is at most tol. violation : of the cones, 0. n_iter : the largest over outputs.
    """

    v: np.ndarray
    w: np.ndarray
    intercept: np.ndarray
    status: Status
    objective: np.ndarray
    relative_gap: np.ndarray
    violation: float
    n_iter: int
    seconds: float


def relu_network(solution: ReluSolution) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(W1 (h, d), W2 (h, c), intercept (c,)): the model max(x W1', 0) W2 + intercept.

    A unit v / sqrt||v|| with outgoing weight sqrt||v|| for every non-zero v, the same with a minus
    for w: h is their number. On the training rows it equals the constrained model; on others the
    gates move with the weights.
    """
    units, out = [], []
    for part, sign in ((solution.v, 1.0), (solution.w, -1.0)):
        norm = np.linalg.norm(part, axis=1)
        gate, output = np.nonzero(norm)
        root = np.sqrt(norm[gate, output])
        units.append(part[gate, :, output] / root[:, None])
        out.append(sign * root[:, None] * np.eye(part.shape[2])[output])
    return np.vstack(units), np.vstack(out), solution.intercept


@dataclass(frozen=True, slots=True, eq=False)
class ReluProgram:
    """The program in the solvers' units: each output has unit mean square, and its own lam.

    X (n, d), D (n, m) bool. S (n, m) : signs. inside (d, m) : interior directions. Y (n, c) : over
    `scale` (c,), less `mean` (c,) if centred. lam (c,) : over scale. Weights u are (d, 2c, m): the
    v of every output, then the w; u times scale is in the caller's units, P times scale^2.
    """

    X: np.ndarray
    D: np.ndarray
    S: np.ndarray
    inside: np.ndarray
    Y: np.ndarray
    lam: np.ndarray
    scale: np.ndarray
    mean: np.ndarray
    centred: bool

    @classmethod
    def of(cls, X, D, G, Y, lam, intercept: bool = True) -> "ReluProgram":
        """Checks everything and finds the interior directions; ValueError in one sentence.

        X (n, d) finite, D (n, m) bool = X G >= 0, G (d, m), Y (n, c) or (n,), lam > 0. Offsets b:
        pass rows [x, 1] and gates [g; b].
        """
        X, D, G = check_gates(X, D, G)
        Y = np.asarray(Y, np.float64)
        Y = Y[:, None] if Y.ndim == 1 else Y
        if Y.ndim != 2 or len(Y) != len(X) or Y.shape[1] == 0 or not np.isfinite(Y).all():
            raise ValueError(f"Y must be ({len(X)}, c) and finite, got shape {Y.shape}.")
        if not (np.isfinite(lam) and lam > 0):
            raise ValueError(f"lam must be finite and above 0, got {lam}: pass a small one.")
        mean = Y.mean(axis=0) if intercept else np.zeros(Y.shape[1])
        rest = Y - mean
        scale = np.sqrt(np.mean(rest * rest, axis=0))
        # Targets that don't vary leave the rounding of their mean, which nothing should fit.
        blank = scale <= 4.0 * np.finfo(np.float64).eps * np.abs(Y).max(axis=0)
        rest, scale = np.where(blank, 0.0, rest), np.where(blank, 1.0, scale)
        inside = interior(X, D, G)
        return cls(X, D, signs(D), inside, rest / scale, lam / scale, scale, mean, intercept)

    def output(self, k: int) -> "ReluProgram":
        """The program of output k alone."""
        at = slice(k, k + 1)
        Y, lam, scale, mean = self.Y[:, at], self.lam[at], self.scale[at], self.mean[at]
        return replace(self, Y=Y, lam=lam, scale=scale, mean=mean)

    def fit(self, XU: np.ndarray) -> np.ndarray:
        """sum_i D_i X (v_i - w_i), centred, (n, c), from the products X u (n, 2c, m)."""
        c = XU.shape[1] // 2
        return self.project(np.einsum("nkm,nm->nk", XU[:, :c] - XU[:, c:], self.D))

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        """Adjoint of u -> `fit`, (d, 2c, m), for R (n, c) that is centred already."""
        half = self.back(R[:, :, None] * self.D[:, None, :])
        return np.concatenate([half, -half], axis=1)

    def back(self, T: np.ndarray) -> np.ndarray:
        """X' T for T (n, s, m), (d, s, m)."""
        return (self.X.T @ T.reshape(len(T), -1)).reshape(-1, *T.shape[1:])

    def project(self, R: np.ndarray) -> np.ndarray:
        """R less its column means if there is an intercept."""
        return R - R.mean(axis=0) if self.centred else R

    def objective(self, u: np.ndarray, R: np.ndarray) -> np.ndarray:
        """P (c,) at u, whose residual is R (n, c)."""
        norms = np.linalg.norm(u, axis=0).reshape(2, len(self.lam), -1).sum(axis=(0, 2))
        return 0.5 * np.mean(R * R, axis=0) + self.lam * norms

    def lower_bound(self, R: np.ndarray, push: np.ndarray) -> np.ndarray:
        """A bound (c,) on P* from below, for any centred R (n, c) and any multipliers eta >= 0.

        push (d, 2c, m) : H_i' eta_i, H_i = (2 D_i - I) X. The dual value <theta, y> - n/2
        ||theta||^2 holds where ||+-A_i' theta + H_i' eta_i|| <= lam; theta = R/n and eta are scaled
        by one s in [0, the largest allowed], the best on that ray. No solver is trusted.
        """
        V = self.adjoint(R) / len(R) + push
        top = np.linalg.norm(V, axis=0).reshape(2, len(self.lam), -1).max(axis=(0, 2))
        rr, ry = np.mean(R * R, axis=0), np.mean(R * self.Y, axis=0)
        s_max = np.divide(self.lam, top, out=np.full_like(top, np.inf), where=top > 0)
        best = np.divide(ry, rr, out=np.zeros_like(rr), where=rr > 0)
        s = np.clip(best, 0.0, s_max)
        return s * ry - 0.5 * s * s * rr


class Incumbent:
    """The best feasible point and the best lower bound seen so far, output by output.

    Starts from u = 0 and its bound; `relative_gap` (c,) is rigorous at `u` at any time.
    """

    def __init__(self, program: ReluProgram):
        self.program = program
        c = len(program.lam)
        self.u = np.zeros((program.X.shape[1], 2 * c, program.D.shape[1]))
        self.at_zero = self.objective = program.objective(self.u, program.Y)
        self.bound = program.lower_bound(program.Y, np.zeros_like(self.u))

    @property
    def relative_gap(self) -> np.ndarray:
        """(P - bound) / P, with P taken as at least 1e-9 P(0); 0 where y = 0."""
        return self._relative(self.objective)

    def look(self, u: np.ndarray, push: np.ndarray | None = None) -> np.ndarray:
        """Repairs u, keeps it where it's the best, sharpens the bound; u's residual (n, c)."""
        u, R, objective = self._evaluated(u)
        self._keep(u, objective, objective < self.objective)
        if push is not None:
            self.bound = np.maximum(self.bound, self.program.lower_bound(R, push))
        return R

    def switch_off(self, tol: float) -> None:
        """Zero the smallest vectors, as many as leave each gap within tol or where it was.

        An interior point has no exact zeros; the network should.
        """
        norms = np.linalg.norm(self.u, axis=0)
        c = len(self.objective)
        top = np.tile(norms.reshape(2, c, -1).max(axis=(0, 2)), 2)[:, None]
        allowed = np.maximum(tol, self.relative_gap)
        open_outputs = np.ones(c, bool)
        for share in 10.0 ** np.arange(-2, -9, -1):
            u, _, objective = self._evaluated(np.where(norms <= share * top, 0.0, self.u))
            fine = open_outputs & (self._relative(objective) <= allowed)
            self._keep(u, objective, fine)
            open_outputs &= ~fine

    def solution(self, status: Status, n_iter: int, began: float) -> ReluSolution:
        """The best point, in the caller's units."""
        program, c = self.program, len(self.objective)
        u = self.u * np.tile(program.scale, 2)[:, None]
        XU = product(program.X, u)
        fit = np.einsum("nkm,nm->nk", XU[:, :c] - XU[:, c:], program.D)
        return ReluSolution(
            v=np.ascontiguousarray(u[:, :c].transpose(2, 0, 1)),
            w=np.ascontiguousarray(u[:, c:].transpose(2, 0, 1)),
            intercept=program.mean - fit.mean(axis=0) if program.centred else np.zeros(c),
            status=status,
            objective=self.objective * program.scale**2,
            relative_gap=self.relative_gap,
            violation=max(0.0, -float(np.min(program.S[:, None, :] * XU, initial=0.0))),
            n_iter=n_iter,
            seconds=time.perf_counter() - began,
        )

    def _evaluated(self, u):
        program = self.program
        u = repair(program.X, program.S, program.inside, u)
        R = program.Y - program.fit(product(program.X, u))
        return u, R, program.objective(u, R)

    def _keep(self, u, objective, where):
        self.u = np.where(np.tile(where, 2)[:, None], u, self.u)
        self.objective = np.where(where, objective, self.objective)

    def _relative(self, objective):
        floor = np.maximum(objective, OBJECTIVE_FLOOR * self.at_zero)
        gap = np.maximum(objective - self.bound, 0.0)
        return np.divide(gap, floor, out=np.zeros_like(gap), where=floor > 0)


def starting_point(program: ReluProgram, U0) -> np.ndarray | None:
    """U0 = (v, w), each (m, d, c), as weights of the program; None stays None. ValueError: shapes."""
    if U0 is None:
        return None
    shape = (program.D.shape[1], program.X.shape[1], len(program.lam))
    parts = [np.asarray(part, np.float64) for part in U0]
    if len(parts) != 2 or any(p.shape != shape or not np.isfinite(p).all() for p in parts):
        raise ValueError(
            f"U0 must be (v, w), each {shape} and finite, got {[p.shape for p in parts]}."
        )
    return np.concatenate([p.transpose(1, 2, 0) / program.scale[:, None] for p in parts], axis=1)


def check_gates(X, D, G):
    """X and G as float64, D as it is; ValueError unless they fit, are finite and hold rows."""
    X, G, D = np.asarray(X, np.float64), np.asarray(G, np.float64), np.asarray(D)
    if X.ndim != 2 or 0 in X.shape or not np.isfinite(X).all():
        raise ValueError(f"X must be (n, d) with rows, finite, got shape {X.shape}.")
    if D.dtype != bool or D.ndim != 2 or len(D) != len(X) or D.shape[1] == 0:
        raise ValueError(f"D must be ({len(X)}, m) bool, got {D.shape} {D.dtype}: pass X @ G >= 0.")
    if G.shape != (X.shape[1], D.shape[1]) or not np.isfinite(G).all() or not G.any(axis=0).all():
        raise ValueError(
            f"G must be ({X.shape[1]}, {D.shape[1]}), finite, no column zero, got shape {G.shape}."
        )
    return X, D, G
