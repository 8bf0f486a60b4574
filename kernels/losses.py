"""The one place that states the scaling of the objective.

f(U) = 1/(2n) ||A U - Y||_F^2, both centred: the unpenalised intercept is projected out
P(U) = f(U) + lam sum_g w_g ||U_g||_F + (ridge/2) ||U||_F^2

A loss holds the rows or their moments, and the ridge: `value` and `grad` INCLUDE the ridge term.
`residual` excludes it; `gap.py` builds its certificate on that.
"""

from dataclasses import dataclass, replace

import numpy as np

from edgesolve.kernels.designs import Design, columns_of, kronecker_of, principal
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
        """The loss of these moments with an absolute `ridge` >= 0; an intercept is projected out."""
        S, C, v = moments.centred()
        return cls(S, np.ascontiguousarray(C.T), v, checked_ridge(ridge), *moments.means())

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (D, c) of the weights."""
        return self.q.shape

    @property
    def dtype(self) -> np.dtype:
        """What `product` and `residual` compute in."""
        return self.q.dtype

    def value(self, U: np.ndarray) -> float:
        """f(U) + (ridge/2)||U||^2, U (D, c)."""
        if not np.any(U):
            return 0.5 * self.y2
        fit = 0.5 * self.y2 - np.vdot(self.q, U) + 0.5 * np.vdot(U, self.Q @ U)
        return float(fit + 0.5 * self.ridge * np.vdot(U, U))

    def grad(self, U: np.ndarray) -> np.ndarray:
        """Gradient (D, c) of `value`."""
        return (self.Q @ U - self.q if np.any(U) else -self.q) + self.ridge * U

    def residual(self, U: np.ndarray) -> tuple[np.ndarray, float, float]:
        """A'R/n (D, c), ||R||^2/n and <R, Y>/n for the residual R = Y - A U. No ridge."""
        V = self.q - self.Q @ U if np.any(U) else self.q.copy()
        explained = float(np.vdot(self.q, U))
        rr = self.y2 - explained - float(np.vdot(V, U))
        return V, max(rr, 0.0), self.y2 - explained

    def product(self, U: np.ndarray) -> np.ndarray:
        """Q U (D, c), in U's dtype. No ridge."""
        return self.Q @ U

    def restrict(self, starts: np.ndarray, gates: np.ndarray) -> "SquaredMoments":
        """The loss in the weights of some gates, the others held at zero."""
        keep, _ = columns_of(starts, gates)
        Q = principal(self.Q, keep)
        return replace(self, Q=Q, q=self.q[keep], mean_x=self.mean_x[keep])

    def astype(self, dtype) -> "SquaredMoments":
        """A copy that computes `product` and `residual` in `dtype`."""
        return replace(self, Q=self.Q.astype(dtype), q=self.q.astype(dtype))

    def kronecker(self, starts: np.ndarray):
        """[(gates, Gamma, S)]: the surrogate of Q that `designs.py` describes."""
        return kronecker_of(self.Q, starts)

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
class SquaredRows:
    """The same loss from the rows of a design: for when n is small or D = m r is large.

    design : `Masked`, `Pooled` or `Explicit` of `designs.py`. Y (n, c) float64, centred if there is
    an intercept; mean_t (c,) what centring took away, None without an intercept.
    Weights are (D, c) as for `SquaredMoments`. Memory: one tile beside the rows.
    """

    design: Design
    Y: np.ndarray
    mean_t: np.ndarray
    ridge: float
    centre: bool = True

    @classmethod
    def of(
        cls, design: Design, t: np.ndarray, ridge: float, *, intercept: bool = True
    ) -> "SquaredRows":
        """The loss of a design's rows with targets t (n, c) and an absolute `ridge` >= 0."""
        t = np.asarray(t, np.float64)
        if t.ndim != 2 or len(t) != design.n or t.size == 0:
            raise ValueError(f"t must be ({design.n}, c) with at least one row, got {t.shape}.")
        if not np.isfinite(t).all():
            raise ValueError("t holds NaN or inf: look at the targets first.")
        mean_t = t.mean(axis=0) if intercept else np.zeros(t.shape[1])
        return cls(design, t - mean_t, mean_t, checked_ridge(ridge), intercept)

    @property
    def n(self) -> int:
        return self.design.n

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (D, c) of the weights."""
        return int(self.design.starts[-1]), self.Y.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """What `product` and `residual` compute in."""
        return self.Y.dtype

    def value(self, U: np.ndarray) -> float:
        """f(U) + (ridge/2)||U||^2, U (D, c)."""
        R = self._rest(U)
        return float(0.5 * np.vdot(R, R) / len(R) + 0.5 * self.ridge * np.vdot(U, U))

    def grad(self, U: np.ndarray) -> np.ndarray:
        """Gradient (D, c) of `value`."""
        return self.ridge * U - self._adjoint(self._rest(U))

    def residual(self, U: np.ndarray) -> tuple[np.ndarray, float, float]:
        """A'R/n (D, c), ||R||^2/n and <R, Y>/n for the residual R = Y - A U. No ridge."""
        R = self._rest(U)
        rr, ry = float(np.vdot(R, R)) / len(R), float(np.vdot(R, self.Y)) / len(R)
        return self._adjoint(R), rr, ry

    def product(self, U: np.ndarray) -> np.ndarray:
        """A'A U / n (D, c), centred, in U's dtype. No ridge."""
        return self._adjoint(self._centred(self.design.forward(U)))

    def lipschitz(self) -> float:
        """2% above the power iteration's estimate, which can only be proved with a Gram at hand."""
        return 1.02 * top_eigenvalue(self.product, self.shape[0]) + self.ridge

    def intercept(self, U: np.ndarray) -> np.ndarray:
        """The optimal intercept (c,) for weights U."""
        if not self.centre:
            return np.zeros(self.shape[1])
        return self.mean_t - self.design.forward(np.asarray(U, np.float64)).mean(axis=0)

    def restrict(self, starts: np.ndarray, gates: np.ndarray) -> "SquaredRows":
        """The loss in the weights of some gates, the others held at zero."""
        return replace(self, design=self.design.restrict(gates))

    def astype(self, dtype) -> "SquaredRows":
        """A copy that computes `product` and `residual` in `dtype`."""
        return replace(self, design=self.design.astype(dtype), Y=self.Y.astype(dtype))

    def kronecker(self, starts: np.ndarray):
        """[(gates, Gamma, S)]: the surrogate of A'A/n that `designs.py` describes."""
        return self.design.kronecker()

    def _adjoint(self, R):
        return self.design.adjoint(R) / R.dtype.type(len(R))

    def _centred(self, AU):
        return AU - AU.mean(axis=0) if self.centre else AU

    def _rest(self, U):
        """Y - A U, centred: that projects the intercept out, so A itself need not be centred."""
        if not np.any(U):
            return self.Y.copy()
        return self.Y - self._centred(self.design.forward(np.asarray(U, self.Y.dtype)))


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


def checked_ridge(ridge) -> float:
    """`ridge` as a float; ValueError unless it is finite and >= 0."""
    if not (np.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge must be finite and not negative, got {ridge}.")
    return float(ridge)
