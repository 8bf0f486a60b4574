"""A cheap model of A'A/n: gates that are correlated by Gamma, inputs that are correlated by S.

Blocks of equal size share one S = E diag(s) E' (r, r); between them A_i'A_j/n is taken for
Gamma[i, j] S. A metric and a preconditioner made of it know both correlations and cost k r (k + r) c
for k gates, whatever the number of rows. It only has to be roughly right: what uses it checks itself.
On ResNet and digit features it leaves a condition number of about 16, where one factor for each
gate leaves 50 or more.
"""

from dataclasses import dataclass

import numpy as np

from edgesolve.kernels import accel
from edgesolve.kernels.designs import TILE_FLOATS

SECULAR_STEPS = 60
"""Most steps to a root; convex.md saw at most 11 over 2,000 random blocks."""

RESOLVED = 3e-5
"""Share of T that the preconditioner leaves along u, where M itself may have no curvature."""

FLOOR = 1e-10
"""Eigenvalues of S are taken for at least this share of the largest."""


@dataclass(frozen=True, slots=True, eq=False)
class SizeClass:
    """The gates whose blocks have r rows: gates (k,), rows (k r,) of U, E (r, r), s (r,), Gamma (k, k)."""

    gates: np.ndarray
    rows: np.ndarray
    E: np.ndarray
    s: np.ndarray
    Gamma: np.ndarray

    def take(self, U: np.ndarray) -> np.ndarray:
        """U (D, c) in the eigenbasis: (k, c, r)."""
        k, r, c = len(self.gates), len(self.s), U.shape[1]
        mine = np.ascontiguousarray(U[self.rows].reshape(k, r, c).transpose(0, 2, 1))
        return (mine.reshape(k * c, r) @ self.E.astype(U.dtype, copy=False)).reshape(k, c, r)

    def put(self, V: np.ndarray, out: np.ndarray) -> None:
        """The inverse of `take`."""
        k, c, r = V.shape
        back = (V.reshape(k * c, r) @ self.E.T.astype(V.dtype, copy=False)).reshape(k, c, r)
        out[self.rows] = back.transpose(0, 2, 1).reshape(k * r, c)

    @property
    def curvature(self) -> np.ndarray:
        """Gamma_ii s, (k, r): the model's second derivatives inside each block."""
        return np.diag(self.Gamma)[:, None] * self.s


class Surrogate:
    """The model of one loss; `restrict` gives that of some of its gates."""

    def __init__(self, classes: list[SizeClass], ridge: float):
        self.classes, self.ridge = classes, ridge

    @classmethod
    def of(cls, loss, starts: np.ndarray) -> "Surrogate":
        """From `loss.kronecker`."""
        classes = []
        for gates, Gamma, S in loss.kronecker(starts):
            s, E = np.linalg.eigh(S)
            top = max(float(s[-1]), np.finfo(np.float64).tiny)
            scale = np.sqrt(np.maximum(np.diag(Gamma), FLOOR * max(Gamma.max(), FLOOR)))
            np.fill_diagonal(Gamma, scale * scale)
            classes.append(
                SizeClass(gates, _rows(starts, gates), E, np.maximum(s, FLOOR * top), Gamma)
            )
        return cls(classes, loss.ridge)

    def restrict(self, starts: np.ndarray, gates: np.ndarray) -> "Surrogate":
        """The model of the gates (rising) alone, their rows moved together."""
        sizes = np.diff(starts)[gates]
        moved = np.concatenate([[0], np.cumsum(sizes)])
        found = []
        for one in self.classes:
            here = np.flatnonzero(np.isin(one.gates, gates))
            if len(here):
                rank = np.searchsorted(gates, one.gates[here])
                Gamma = one.Gamma[np.ix_(here, here)]
                found.append(SizeClass(rank, _rows(moved, rank), one.E, one.s, Gamma))
        return Surrogate(found, self.ridge)

    def lipschitz(self) -> float:
        """An estimate of the largest eigenvalue of A'A/n in the metric of `metric`."""
        total = 0.0
        for one in self.classes:
            scale = 1.0 / np.sqrt(np.diag(one.Gamma))
            total += float(np.linalg.eigvalsh(scale[:, None] * one.Gamma * scale)[-1])
        return total

    def metric(self, U: np.ndarray) -> np.ndarray:
        """diag(Gamma_ii) x S times U: the model without what ties the gates together."""
        out = np.empty_like(U)
        for one in self.classes:
            one.put(one.take(U) * one.curvature[:, None].astype(U.dtype), out)
        return out

    def prox(self, C: np.ndarray, L: float, limit: np.ndarray) -> np.ndarray:
        """argmin over U of (1/2)<U, (L metric + ridge) U> - <C, U> + sum_g limit_g ||U_g||_F.

        Each block by the scalar root of convex.md, section 2: sum_j beta_j / (s_j nu + limit)^2 = 1.
        """
        out = np.empty_like(C)
        for one in self.classes:
            rotated = one.take(C)
            curvature = L * one.curvature + self.ridge
            nu = secular(np.einsum("kcr,kcr->kr", rotated, rotated), curvature, limit[one.gates])
            shrink = nu[:, None] / (curvature * nu[:, None] + limit[one.gates][:, None])
            one.put(rotated * shrink[:, None].astype(C.dtype), out)
        return out

    def preconditioner(self, U: np.ndarray, norms: np.ndarray, limit: np.ndarray):
        """r -> M^-1 r, float32, for M = Gamma x S + ridge + T(I - u u'), T = limit/norms, u = U/norms.

        That is the model of the Hessian of the objective at U, all of whose blocks are non-zero.
        The rank-one term of every gate goes in by Woodbury: without it the small gates, whose T is
        large, leave a condition number of thousands.
        """
        parts = [_Inverse(one, self.ridge, U, norms, limit) for one in self.classes]

        def apply(r):
            out = np.empty_like(r)
            for part in parts:
                part.one.put(part.solve(part.one.take(r)), out)
            return out

        return apply


class _Inverse:
    """M^-1 for one size class, in its eigenbasis."""

    def __init__(self, one: SizeClass, ridge, U, norms, limit):
        f32 = np.float32
        T = limit[one.gates] / norms[one.gates]
        scale = 1.0 / np.sqrt(T + ridge)
        values, vectors = np.linalg.eigh(scale[:, None] * one.Gamma * scale)
        self.one, self.left = one, (scale[:, None] * vectors).astype(f32)
        self.inverse = (1.0 / (1.0 + np.maximum(values, 0.0)[:, None] * one.s)).astype(f32)
        self.unit = (one.take(U) / norms[one.gates][:, None, None]).astype(f32)
        # Capacitance: 1/T - u_i' M0^-1 u_j, kept away from the singular by what float32 resolves.
        small = np.diag((1.0 + RESOLVED) / T)
        step = max(1, TILE_FLOATS // T.size**2)
        for a in range(0, len(one.s), step):
            unit = self.unit[:, :, a : a + step]
            inner = np.einsum("icr,jcr->rij", unit, unit, optimize=True)
            between = (self.left * self.inverse.T[a : a + step, None, :]) @ self.left.T
            small -= np.einsum("rij,rij->ij", inner, between)
        self.core = np.linalg.inv(small).astype(f32)

    def solve(self, r):
        first = self.base(r)
        along = self.core @ np.einsum("kcr,kcr->k", self.unit, first)
        return first + self.base(self.unit * along[:, None, None])

    def base(self, r):
        """(Gamma x S + T + ridge)^-1."""
        k, c, width = r.shape
        y = (self.left.T @ r.reshape(k, -1)).reshape(k, c, width) * self.inverse[:, None]
        return (self.left @ y.reshape(k, -1)).reshape(k, c, width)


def secular(beta: np.ndarray, s: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """The root nu >= 0 of sum_j beta_j / (s_j nu + limit)^2 = 1 per row, (k,) float64; 0 where there is none.

    beta, s (k, r) >= 0; limit (k,). Newton on h^(-1/2) - 1, which is increasing and concave: from
    0 it climbs to the root and never beyond.
    """
    beta, s = (np.ascontiguousarray(a, np.float64) for a in (beta, s))
    limit = np.ascontiguousarray(limit, np.float64)
    nu = np.zeros(len(beta))
    fast = accel.compiled()
    if fast is not None:
        fast.secular(beta, s, limit, nu)
        return nu
    on = ~(np.sqrt(beta.sum(axis=1)) <= limit)
    beta, s, limit = beta[on], s[on], limit[on, None]
    root = np.zeros(len(beta))
    for _ in range(SECULAR_STEPS):
        below = s * root[:, None] + limit
        h = (beta / below**2).sum(axis=1)
        slope = (beta * s / below**3).sum(axis=1)
        with np.errstate(over="ignore"):  # no curvature: the root is beyond all numbers
            step = h * (np.sqrt(h) - 1.0) / np.maximum(slope, 1e-300)
        root = root + step
        if not (np.abs(step) > 1e-14 * root).any():
            break
    nu[on] = root
    return nu


def _rows(starts, gates):
    sizes = np.diff(starts)[gates]
    return (starts[:-1][gates][:, None] + np.arange(sizes[0])).ravel()
