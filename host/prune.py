"""Zeros in a layer: which supports are allowed, the best weight on one, and what storing it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.linalg import lapack

from edgesolve.host.metric import RANK_FLOOR, Metric


class Pattern(Protocol):
    """A family of supports of weights (T, D)."""

    def top(self, score: np.ndarray) -> np.ndarray:
        """Mask (T, D), bool: the support of largest total score (T, D); ties go to the earlier input."""

    def groups(self, D: int) -> tuple[np.ndarray, np.ndarray]:
        """(group (D,), quota (g,)): at most quota[group[p]] inputs p leave a row in that group."""

    def removed(self, T: int, D: int) -> int:
        """How many weights leave the layer."""


@dataclass(frozen=True, slots=True)
class PerLayer:
    """A share `sparsity` of the layer's weights is zero, wherever they are."""

    sparsity: float

    def __post_init__(self):
        _check_share(self.sparsity)

    def top(self, score: np.ndarray) -> np.ndarray:
        kept = score.size - self.removed(*score.shape)
        return _largest(score.reshape(1, -1), kept).reshape(score.shape)

    def groups(self, D: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(D, np.intp), np.array([D])

    def removed(self, T: int, D: int) -> int:
        return round(self.sparsity * T * D)


@dataclass(frozen=True, slots=True)
class PerRow:
    """A share `sparsity` of each output's weights is zero."""

    sparsity: float

    def __post_init__(self):
        _check_share(self.sparsity)

    def top(self, score: np.ndarray) -> np.ndarray:
        return _largest(score, score.shape[1] - self.removed(1, score.shape[1]))

    def groups(self, D: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(D, np.intp), np.array([self.removed(1, D)])

    def removed(self, T: int, D: int) -> int:
        return T * round(self.sparsity * D)


@dataclass(frozen=True, slots=True)
class NofM:
    """At most n of every m consecutive inputs of a row stay; the last group may be shorter than m."""

    n: int = 2
    m: int = 4

    def __post_init__(self):
        if not 0 < self.n <= self.m:
            raise ValueError(f"n of m needs 0 < n <= m, got {self.n} of {self.m}.")

    def top(self, score: np.ndarray) -> np.ndarray:
        T, D = score.shape
        padded = np.pad(score, ((0, 0), (0, -D % self.m)), constant_values=-np.inf)
        return _largest(padded.reshape(-1, self.m), self.n).reshape(T, -1)[:, :D]

    def groups(self, D: int) -> tuple[np.ndarray, np.ndarray]:
        group = np.arange(D) // self.m
        return group, np.maximum(np.bincount(group) - self.n, 0)

    def removed(self, T: int, D: int) -> int:
        return T * int(self.groups(D)[1].sum())


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """A layer with zeros: weight (T, c, kh, kw) or (T, D) float64.

    Zeros are worth something only if they aren't stored: `bytes_sparse` counts the indices.
    """

    weight: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """(T, D) bool: where the weight isn't zero."""
        return self.weight.reshape(len(self.weight), -1) != 0.0

    @property
    def n_params(self) -> int:
        return int(np.count_nonzero(self.weight))

    @property
    def sparsity(self) -> float:
        return 1.0 - self.n_params / self.weight.size

    def full(self) -> np.ndarray:
        return self.weight

    def bytes_sparse(self, value_bytes: int = 4) -> int:
        """Values and indices: one bit per weight, or compressed rows, whichever is smaller."""
        T, D = self.mask.shape
        index_bytes = 1 if D <= 1 << 8 else 2 if D <= 1 << 16 else 4
        bitmap, rows = -(-T * D // 8), self.n_params * index_bytes + 4 * (T + 1)
        return self.n_params * value_bytes + min(bitmap, rows)


def magnitude(weight: np.ndarray, pattern: Pattern) -> np.ndarray:
    """Mask (T, D) of the largest |W|, weight (T, …)."""
    return pattern.top(np.abs(np.asarray(weight, np.float64).reshape(len(weight), -1)))


def wanda(metric: Metric, weight: np.ndarray, pattern: Pattern) -> np.ndarray:
    """Mask (T, D) of the largest |W_tp| sqrt(S_pp): magnitude in units of the output (Sun et al. 2023,
    there with the uncentred norm of each input and the pattern `PerRow`)."""
    return pattern.top(np.abs(weight.reshape(metric.T, metric.D)) * np.sqrt(np.diag(metric.S)))


def refit(metric: Metric, mask: np.ndarray) -> np.ndarray:
    """The weight (T, D) of least distortion among those that are zero outside `mask` (T, D).

    Exact, of least norm where S is rank-deficient on a support; zero where an input is dead. Rows of the same
    support share one factorisation. Law: (W S - C) is zero on the mask.
    """
    mask = np.asarray(mask, bool)
    if mask.shape != metric.C.shape:
        raise ValueError(f"the mask must have shape {metric.C.shape}, got {mask.shape}.")
    variances = np.diag(metric.S)
    W = np.zeros(metric.C.shape)
    alive = mask & (variances > RANK_FLOOR * variances.max())
    supports, which = np.unique(alive, axis=0, return_inverse=True)
    which = which.reshape(-1)
    for i, support in enumerate(supports):
        rows, inputs = np.flatnonzero(which == i), np.flatnonzero(support)
        if inputs.size:
            W[np.ix_(rows, inputs)] = _least_squares(metric, rows, inputs)
    return W


def _least_squares(metric: Metric, rows: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    S, C = metric.S[np.ix_(inputs, inputs)], metric.C[np.ix_(rows, inputs)]
    factor, X, failed = lapack.dposv(S, C.T)
    pivots = np.diag(factor) ** 2
    if not failed and pivots.min() > RANK_FLOOR * np.diag(S).max():
        return X.T
    return Metric(S, C, metric.v, metric.mu_x[inputs], metric.mu_t[rows]).least_squares()


def _largest(score: np.ndarray, kept: int) -> np.ndarray:
    """Mask of the `kept` largest of each row of score (r, c)."""
    if np.isnan(score).any():
        raise ValueError(f"{np.isnan(score).sum()} of {score.size} pruning scores are NaN.")
    order = np.argsort(-score, axis=1, kind="stable")
    mask = np.zeros(score.shape, bool)
    np.put_along_axis(mask, order[:, :kept], True, axis=1)
    return mask


def _check_share(sparsity: float) -> None:
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity is the share of zeros, in 0..1, got {sparsity}.")
