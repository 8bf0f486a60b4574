"""The one place that states the scaling of the objective.

f(U) = 1/(2n) ||A U - Y||_F^2, both centred: the unpenalised intercept is projected out
P(U) = f(U) + lam sum_g w_g ||U_g||_F + (ridge/2) ||U||_F^2

A loss holds the rows or their moments, and the ridge: `value` and `grad` INCLUDE the ridge term.
`residual` excludes it; `gap.py` builds its certificate on that.
"""

from dataclasses import dataclass

import numpy as np

from edgesolve.kernels.gated import gated_adjoint, gated_forward
from edgesolve.kernels.moments import Moments


@dataclass(frozen=True, slots=True, eq=False)
class SquaredMoments:
    """The loss from centred moments: no row is needed, and a product costs D^2 c.

    Q (D, D) = A'A/n, q (D, c) = A'Y/n, y2 = ||Y||^2/n, all centred; ridge is absolute.
    mean_x (D,), mean_t (c,) : what centring took away, for the intercept.
    """

    Q: np.ndarray
    q: np.ndarray
    y2: float
    ridge: float
    mean_x: np.ndarray
    mean_t: np.ndarray

    @classmethod
    def of(cls, moments: Moments, ridge: float) -> "SquaredMoments":
        """The loss of these moments with an absolute `ridge` >= 0."""
        S, C, v = moments.centred()
        return cls(S, np.ascontiguousarray(C.T), v, _checked_ridge(ridge), *moments.means())

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (D, c) of the weights."""
        return self.q.shape

    def value(self, U: np.ndarray) -> float:
        """f(U) + (ridge/2)||U||^2, U (D, c)."""
        fit = 0.5 * self.y2 - np.vdot(self.q, U) + 0.5 * np.vdot(U, self.Q @ U)
        return float(fit + 0.5 * self.ridge * np.vdot(U, U))

    def grad(self, U: np.ndarray) -> np.ndarray:
        """Gradient (D, c) of `value`."""
        return self.Q @ U - self.q + self.ridge * U

    def residual(self, U: np.ndarray) -> tuple[np.ndarray, float, float]:
        """A'R/n (D, c), ||R||^2/n and <R, Y>/n for the residual R = Y - A U. No ridge."""
        V = self.q - self.Q @ U
        explained = float(np.vdot(self.q, U))
        rr = self.y2 - explained - float(np.vdot(V, U))
        return V, max(rr, 0.0), self.y2 - explained

    def lipschitz(self) -> float:
        """An upper bound on the largest eigenvalue of Q + ridge, never below it.

        Power iteration only approaches from below, so the bound is proved: L I - Q has a Cholesky
        factor exactly if L is large enough.
        """
        L = 1.02 * top_eigenvalue(lambda V: self.Q @ V, len(self.q))
        while L > 0.0 and np.isfinite(L) and not _is_positive_definite(L, self.Q):
            L *= 1.1
        return L + self.ridge

    def intercept(self, U: np.ndarray) -> np.ndarray:
        """The optimal intercept (c,) for weights U."""
        return self.mean_t - self.mean_x @ U


@dataclass(frozen=True, slots=True, eq=False)
class SquaredGated:
    """The same loss from the rows of a gated design, for when n is small or D = m r is large.

    z (n, p, r) and D (n, p, m) as in `gated.py`; Y (n, c) float64, centred; mean_t (c,) its mean.
    Weights are (m r, c) as for `SquaredMoments`. Memory: one tile beside the rows.
    """

    z: np.ndarray
    D: np.ndarray
    Y: np.ndarray
    mean_t: np.ndarray
    ridge: float

    @classmethod
    def of(cls, z: np.ndarray, D: np.ndarray, t: np.ndarray, ridge: float) -> "SquaredGated":
        """The loss of rows z, D with targets t (n, c) and an absolute `ridge` >= 0."""
        t = np.asarray(t, np.float64)
        if t.ndim != 2 or len(t) != len(z) or len(t) == 0:
            raise ValueError(f"t must be ({len(z)}, c) with at least one row, got {t.shape}.")
        mean_t = t.mean(axis=0)
        return cls(z, D, t - mean_t, mean_t, _checked_ridge(ridge))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (D, c) of the weights."""
        return self.D.shape[2] * self.z.shape[2], self.Y.shape[1]

    def value(self, U: np.ndarray) -> float:
        """f(U) + (ridge/2)||U||^2, U (m r, c)."""
        R = self._rest(U)
        return float(0.5 * np.vdot(R, R) / len(R) + 0.5 * self.ridge * np.vdot(U, U))

    def grad(self, U: np.ndarray) -> np.ndarray:
        """Gradient (m r, c) of `value`."""
        return self.ridge * U - self._adjoint(self._rest(U))

    def residual(self, U: np.ndarray) -> tuple[np.ndarray, float, float]:
        """A'R/n (m r, c), ||R||^2/n and <R, Y>/n for the residual R = Y - A U. No ridge."""
        R = self._rest(U)
        return (
            self._adjoint(R),
            float(np.vdot(R, R)) / len(R),
            float(np.vdot(R, self.Y)) / len(R),
        )

    def lipschitz(self) -> float:
        """2% above the power iteration's estimate, which can only be proved with a Gram at hand."""

        def product(V):
            AV = self._forward(V)
            return self._adjoint(AV - AV.mean(axis=0))

        return 1.02 * top_eigenvalue(product, self.shape[0]) + self.ridge

    def intercept(self, U: np.ndarray) -> np.ndarray:
        """The optimal intercept (c,) for weights U."""
        return self.mean_t - self._forward(U).mean(axis=0)

    def _forward(self, U):
        shaped = np.asarray(U, np.float64).reshape(self.D.shape[2], self.z.shape[2], -1)
        return gated_forward(self.z, self.D, shaped)

    def _adjoint(self, R):
        return gated_adjoint(self.z, self.D, R).reshape(-1, R.shape[1]) / len(R)

    def _rest(self, U):
        """Y - A U, centred: that projects the intercept out, so A itself need not be centred."""
        AU = self._forward(U)
        return self.Y - (AU - AU.mean(axis=0))


def top_eigenvalue(product, size: int, *, max_iter: int = 100, tol: float = 1e-4) -> float:
    """Largest eigenvalue of a positive semidefinite operator, from below.

    product : (size, k) -> (size, k). Block power iteration with k = 4 and a fixed random start.
    """
    V = np.random.default_rng(0).standard_normal((size, min(4, size)))
    top = 0.0
    for _ in range(max_iter):
        V, _ = np.linalg.qr(V)
        before, W = top, product(V)
        if not np.isfinite(W).all():
            return np.nan
        top = max(float(np.linalg.eigvalsh(V.T @ W)[-1]), 0.0)
        if top - before <= tol * top:
            break
        V = W
    return top


def _is_positive_definite(L, Q):
    shifted = -Q
    shifted.flat[:: len(Q) + 1] += L
    try:
        np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return False
    return True


def _checked_ridge(ridge):
    if not (np.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge must be finite and not negative, got {ridge}.")
    return float(ridge)
