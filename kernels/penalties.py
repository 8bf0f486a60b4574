"""Penalties: each knows its value, its proximal step and the distance to optimality.

Another penalty is one more frozen dataclass with the methods of `Penalty`, and one more line in
PENALTIES of tests/kernels/conftest.py, which checks all their laws.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgesolve.kernels.prox import (
    equal_groups,
    group_norms,
    group_sums,
    nuclear_norms,
    prox_group_l2,
    prox_nuclear,
    shrinkage,
    spectral_norms,
    svd,
)

RANK_SHARE = 1e-10
"""`Nuclear.kkt` takes a singular value below this share of its block's largest for zero."""


class Penalty(Protocol):
    """lam sum_g w_g N(U_g) for a norm N and groups that partition the entries of U (D, c).

    "Per group" is an array that `limit` broadcasts against, float64. NaN in gives NaN out.
    """

    @property
    def lam(self) -> float:
        """>= 0, in the 1/(2n) scaling of `losses.py`."""
        ...

    @property
    def weights(self) -> np.ndarray:
        """w_g > 0, (n_groups,), or (1,) if all are one."""
        ...

    @property
    def limit(self) -> np.ndarray:
        """lam w_g, of the shape of `weights`: how long the dual norm of a subgradient may be."""
        ...

    def value(self, U: np.ndarray) -> float:
        """The penalty at U (D, c)."""
        ...

    def prox(self, V: np.ndarray, step: float) -> np.ndarray:
        """argmin over U of penalty(U) + ||U - V||^2 / (2 step), a new array of V's dtype.

        Law: N°(V_g - U_g) <= step limit_g and <V_g - U_g, U_g> = step limit_g N(U_g).
        """
        ...

    def kkt(self, U: np.ndarray, grad: np.ndarray) -> float:
        """Frobenius distance of -grad to the subdifferential at U; 0 exactly at an optimum."""
        ...

    def norms(self, U: np.ndarray) -> np.ndarray:
        """N(U_g) per group."""
        ...

    def dual_norms(self, V: np.ndarray) -> np.ndarray:
        """N°(V_g) = max <U_g, V_g> over N(U_g) <= 1, per group."""
        ...

    def inner(self, U: np.ndarray, V: np.ndarray) -> np.ndarray:
        """<U_g, V_g> per group."""
        ...


def lam_max(loss, penalty: Penalty) -> float:
    """The smallest lam at which U = 0 is optimal: max_g N°(grad_g f(0)) / w_g; penalty.lam is not read."""
    return float(np.max(penalty.dual_norms(loss.grad(np.zeros(loss.shape))) / penalty.weights))


class _L2(ABC):
    """A sum of l2 norms, given which entries make up a group."""

    __slots__ = ()

    @abstractmethod
    def sums(self, A: np.ndarray) -> np.ndarray:
        """Sum of the entries of A (D, c) per group."""

    @abstractmethod
    def spread(self, x: np.ndarray) -> np.ndarray:
        """An array that broadcasts against (D, c): each entry gets its group's x."""

    @property
    def limit(self) -> np.ndarray:
        return self.lam * self.weights

    def value(self, U: np.ndarray) -> float:
        return float(np.sum(self.limit * self.norms(U)))

    def prox(self, V: np.ndarray, step: float) -> np.ndarray:
        scale = shrinkage(self.norms(V), step * self.limit)
        return (self.spread(scale) * V).astype(V.dtype, copy=False)

    def kkt(self, U: np.ndarray, grad: np.ndarray) -> float:
        norms = self.norms(U)
        on = ~(norms == 0)
        pull = np.zeros_like(norms)
        pull[on] = np.broadcast_to(self.limit, norms.shape)[on] / norms[on]
        smooth = self.norms(grad + self.spread(pull) * U)
        off = np.maximum(self.norms(grad) - self.limit, 0.0)
        return float(np.linalg.norm(np.where(on, smooth, off)))

    def norms(self, U: np.ndarray) -> np.ndarray:
        return np.sqrt(self.inner(U, U))

    def dual_norms(self, V: np.ndarray) -> np.ndarray:
        return self.norms(V)

    def inner(self, U: np.ndarray, V: np.ndarray) -> np.ndarray:
        return self.sums(np.multiply(U, V, dtype=np.float64))


@dataclass(frozen=True, slots=True, eq=False)
class GroupL2(_L2):
    """lam sum_g w_g ||U_g||_F over ragged groups of rows: switches whole gates off.

    lam : >= 0, in the 1/(2n) scaling of `losses.py`. starts (n_groups + 1,) : rising strictly from
    0 to D; group g owns rows starts[g]:starts[g + 1]. weights (n_groups,) : > 0, default ones.
    Yuan and Lin 2006.
    """

    lam: float
    starts: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self):
        _settle_rows(self)

    def sums(self, A: np.ndarray) -> np.ndarray:
        return group_sums(A, self.starts)

    def spread(self, x: np.ndarray) -> np.ndarray:
        return np.repeat(x, np.diff(self.starts))[:, None]

    def norms(self, U: np.ndarray) -> np.ndarray:
        return group_norms(U, self.starts)

    def prox(self, V: np.ndarray, step: float) -> np.ndarray:
        # The default of every head: it has a compiled kernel.
        V = np.ascontiguousarray(V)
        out = np.empty_like(V)
        prox_group_l2(V, self.starts, step * self.limit, out)
        return out

    def restrict(self, groups: np.ndarray) -> "GroupL2":
        """The penalty of some groups alone, their rows moved together in the order of `groups`.

        groups : at least one index, or a mask (n_groups,). Law: on U's rows of these groups it is
        what `self` is on U with every other group zeroed.
        """
        ends = np.cumsum(np.diff(self.starts)[groups])
        return GroupL2(self.lam, np.r_[0, ends], self.weights[groups])


@dataclass(frozen=True, slots=True, eq=False)
class GroupL2Output(_L2):
    """lam sum_g w_g sum_k ||U_g[:, k]||: gates off for one output at a time, c problems in one.

    lam, starts, weights as for `GroupL2`; a gate's weight serves its c outputs.
    Per group : (c, n_groups), one row an output. scnn's one-vs-all.
    """

    lam: float
    starts: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self):
        _settle_rows(self)

    def sums(self, A: np.ndarray) -> np.ndarray:
        return np.add.reduceat(A, self.starts[:-1], axis=0).T

    def spread(self, x: np.ndarray) -> np.ndarray:
        return np.repeat(x.T, np.diff(self.starts), axis=0)


@dataclass(frozen=True, slots=True, eq=False)
class GroupL2Feature(_L2):
    """lam sum_j w_j ||U[:, j, :]||_F with U (m r, c) seen as (m, r, c): switches inputs off.

    lam : as for `GroupL2`. n_gates : m, all of the same r inputs; input j owns the rows j, r + j,
    2r + j, ... weights (r,) : > 0, default ones.
    """

    lam: float
    n_gates: int
    weights: np.ndarray | None = None

    def __post_init__(self):
        if not (isinstance(self.n_gates, int | np.integer) and self.n_gates > 0):
            raise ValueError(f"n_gates must be a positive integer, got {self.n_gates!r}.")
        _settle(self, None)

    def sums(self, A: np.ndarray) -> np.ndarray:
        if len(A) % self.n_gates:
            raise ValueError(f"{len(A)} rows can't be shared evenly by {self.n_gates} gates.")
        return A.reshape(self.n_gates, -1, A.shape[1]).sum(axis=(0, 2))

    def spread(self, x: np.ndarray) -> np.ndarray:
        return np.tile(x, self.n_gates)[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class Nuclear:
    """lam sum_g w_g ||U_g||_*, the sum of singular values: a low rank for every gate.

    lam, starts, weights as for `GroupL2`. The dual norm is the spectral norm.
    Groups of equal size are decomposed together. Watson 1992 (subdifferential).
    """

    lam: float
    starts: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self):
        _settle_rows(self)

    @property
    def limit(self) -> np.ndarray:
        return self.lam * self.weights

    def value(self, U: np.ndarray) -> float:
        return float(np.sum(self.limit * self.norms(U)))

    def prox(self, V: np.ndarray, step: float) -> np.ndarray:
        return prox_nuclear(V, self.starts, step * self.limit)

    def kkt(self, U: np.ndarray, grad: np.ndarray) -> float:
        """Frobenius distance of -grad to the subdifferential at U.

        With U_g = P S Q' of rank r it is {limit (PQ' + W): P'W = 0, WQ = 0, sigma_max(W) <= 1}: in
        the range of P or Q the distance is to limit PQ', in the rest singular values may reach
        limit. The rank counts singular values above `RANK_SHARE` of the block's largest.
        """
        squared = 0.0
        for groups, rows in equal_groups(self.starts):
            blocks, pull = (np.asarray(a[rows], np.float64) for a in (U, -grad))
            squared += _nuclear_distance(blocks, pull, self.limit[groups, None])
        return float(np.sqrt(squared))

    def norms(self, U: np.ndarray) -> np.ndarray:
        return nuclear_norms(U, self.starts)

    def dual_norms(self, V: np.ndarray) -> np.ndarray:
        return spectral_norms(V, self.starts)

    def inner(self, U: np.ndarray, V: np.ndarray) -> np.ndarray:
        return group_sums(np.multiply(U, V, dtype=np.float64), self.starts)


def _nuclear_distance(blocks, pull, limit):
    """Sum over a stack (k, a, b) of the squared distances of `pull` to the subdifferentials."""
    P, s, Qt = svd(blocks)
    on = s > RANK_SHARE * s[:, :1]
    P, Qt = P * on[:, None], Qt * on[:, :, None]
    left = P @ (P.transpose(0, 2, 1) @ pull)
    rest = pull - left
    rest -= (rest @ Qt.transpose(0, 2, 1)) @ Qt
    near = pull - rest - limit[:, :, None] * (P @ Qt)
    excess = np.maximum(svd(rest)[1] - limit, 0.0)
    unknown = np.where(np.isnan(s[:, 0]), np.nan, 0.0).sum()
    return np.sum(near * near) + np.sum(excess * excess) + unknown


def _settle_rows(penalty):
    """Checks and puts in place what a penalty over groups of rows is given."""
    starts = np.ascontiguousarray(penalty.starts, np.int64)
    if starts.ndim != 1 or len(starts) < 2 or starts[0] != 0 or (np.diff(starts) <= 0).any():
        raise ValueError(f"starts must rise strictly from 0, got {penalty.starts}.")
    object.__setattr__(penalty, "starts", starts)
    _settle(penalty, len(starts) - 1)


def _settle(penalty, n_groups):
    """Checks lam and weights, and puts float64 weights in place; n_groups None: any number."""
    if not (np.isfinite(penalty.lam) and penalty.lam >= 0):
        raise ValueError(f"lam must be finite and not negative, got {penalty.lam}.")
    given = np.ones(n_groups or 1) if penalty.weights is None else penalty.weights
    weights = np.ascontiguousarray(given, np.float64)
    wrong = weights.ndim != 1 or len(weights) != (n_groups or len(weights))
    if wrong or not (len(weights) and (weights > 0).all()):
        raise ValueError(
            f"weights must be {n_groups or 'some'} positive numbers, got {penalty.weights}."
        )
    object.__setattr__(penalty, "weights", weights)
