"""What a layer's approximation costs at its output: the one quadratic form behind every compressor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_triangular

from edgesolve.kernels.moments import Moments

RANK_FLOOR = 1e-10
"""Eigenvalues of S below this share of the largest count as zero."""


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """Centred second moments of a layer's input x (D,) and of its target t (T,), float64.

    S (D, D), C (T, D): covariances of x, and of t with x; v = E||t - mu_t||²; mu_x (D,), mu_t (T,).

    Law, for every weight W (T, D): with the bias mu_t - W mu_x, which is the best one,
    E||t - W x - b||² = v - 2 <W, C> + <W S, W>. (compression.md, section 1.)
    """

    S: np.ndarray
    C: np.ndarray
    v: float
    mu_x: np.ndarray
    mu_t: np.ndarray

    def __post_init__(self):
        T, D = self.C.shape
        if (self.S.shape, self.mu_x.shape, self.mu_t.shape) != ((D, D), (D,), (T,)):
            raise ValueError(
                f"for C of shape {self.C.shape}, S, mu_x, mu_t must be ({D}, {D}), ({D},), ({T},), got "
                f"{self.S.shape}, {self.mu_x.shape}, {self.mu_t.shape}."
            )

    @classmethod
    def of(cls, moments: Moments) -> Metric:
        """Of rows x in the compressed network and targets t in the original one."""
        return cls(*moments.centred(), *moments.means())

    @classmethod
    def symmetric(cls, weight: np.ndarray, S: np.ndarray) -> Metric:
        """Of a layer's own output W x for x of second moment or covariance S: what is published."""
        W = np.asarray(weight, np.float64).reshape(len(weight), -1)
        C = W @ S
        return cls(S, C, float(np.vdot(C, W)), np.zeros(S.shape[0]), np.zeros(len(W)))

    @classmethod
    def weight_space(cls, weight: np.ndarray) -> Metric:
        """S = I: the error is the Frobenius distance to the weight itself."""
        return cls.symmetric(weight, np.eye(weight[0].size))

    @property
    def T(self) -> int:
        return self.C.shape[0]

    @property
    def D(self) -> int:
        return self.C.shape[1]

    def ridged(self, weight: np.ndarray, relative: float) -> Metric:
        """With lam ||Ŵ - weight||² added, lam = relative tr(S) / D: few rows pull toward the original."""
        W = np.asarray(weight, np.float64).reshape(self.T, self.D)
        lam = relative * float(np.trace(self.S)) / self.D
        S = self.S + lam * np.eye(self.D)
        return Metric(
            S, self.C + lam * W, self.v + lam * float(np.vdot(W, W)), self.mu_x, self.mu_t
        )

    def weighted(self, root: np.ndarray) -> Metric:
        """Of the target root t, root (T, T): the output metric Gamma = root' root. `v` needs no rows only
        up to a constant, so it is that of the part of t that x explains."""
        C = root @ self.C
        explained = C @ self.solve(C.T)
        return Metric(self.S, C, float(np.trace(explained)), self.mu_x, root @ self.mu_t)

    def bias(self, weight: np.ndarray) -> np.ndarray:
        """The best bias (T,) for `weight` (T, D) or (T, c, kh, kw)."""
        return self.mu_t - weight.reshape(self.T, self.D) @ self.mu_x

    def distortion(self, weight: np.ndarray) -> float:
        """E||t - W x - bias(W)||², exact on the rows that the moments were taken of."""
        W = np.asarray(weight, np.float64).reshape(self.T, self.D)
        return max(self.v - 2.0 * float(np.vdot(W, self.C)) + float(np.vdot(W @ self.S, W)), 0.0)

    def root(self) -> tuple[np.ndarray, np.ndarray]:
        """(R, P): S = R R' and P = pinv(R), R (D, k). Cholesky; by eigenvectors where S is rank-deficient."""
        try:
            R = np.linalg.cholesky(self.S)
            if np.min(np.diag(R)) ** 2 > RANK_FLOOR * np.max(np.diag(self.S), initial=0.0):
                return R, solve_triangular(R, np.eye(self.D), lower=True)
        except np.linalg.LinAlgError:
            pass
        values, vectors = np.linalg.eigh(self.S)
        keep = values > RANK_FLOOR * max(values[-1], 0.0)
        scale = np.sqrt(values[keep])
        return vectors[:, keep] * scale, (vectors[:, keep] / scale).T

    def whitened(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(R, P, M), M = C P' (T, k): the distortion is v - ||M||² + ||M - W R||_F²."""
        R, P = self.root()
        return R, P, self.C @ P.T

    def solve(self, right: np.ndarray) -> np.ndarray:
        """S⁺ right."""
        _, P = self.root()
        return P.T @ (P @ right)

    def least_squares(self) -> np.ndarray:
        """C S⁺ (T, D): the weight of least distortion, of any rank."""
        return self.solve(self.C.T).T
