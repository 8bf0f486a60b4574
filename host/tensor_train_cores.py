"""A matrix as a tensor train over factors of its two sizes: TT-SVD, and a step that never moves away."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from edgesolve.host.tensor_train_modes import check_modes


@dataclass(frozen=True, slots=True, eq=False)
class TTCores:
    """Stands for a matrix of `shape`, reshaped row by row to (m_1, ..., m_d).

    cores : d arrays (r_{k-1}, m_k, r_k) of one float dtype, r_0 = r_d = 1.
    """

    cores: tuple[np.ndarray, ...]
    shape: tuple[int, ...]

    def __post_init__(self):
        ranks = [1, *(core.shape[2] for core in self.cores)]
        for k, core in enumerate(self.cores):
            if core.ndim != 3 or core.shape[0] != ranks[k]:
                raise ValueError(f"core {k} must be ({ranks[k]}, m, r), got {core.shape}.")
        if ranks[-1] != 1 or math.prod(self.modes) != math.prod(self.shape):
            raise ValueError(f"cores of modes {self.modes} don't make a matrix of {self.shape}.")

    @property
    def modes(self) -> tuple[int, ...]:
        return tuple(core.shape[1] for core in self.cores)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Inner ranks r_1 .. r_{d-1}."""
        return tuple(core.shape[2] for core in self.cores[:-1])

    @property
    def n_params(self) -> int:
        return sum(core.size for core in self.cores)

    def full(self) -> np.ndarray:
        """The matrix, of `shape`."""
        return _left_interface(self.cores).reshape(self.shape)

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """(A (d_out, r), B (r, d_in)) with A @ B = full(): two thin layers in place of one.

        Raises ValueError where no core ends at the border between rows and columns.
        """
        sizes = np.cumprod(self.modes)
        if self.shape[0] not in sizes:
            raise ValueError(
                f"modes {self.modes} don't split between the {self.shape[0]} rows and the "
                f"{self.shape[1]} columns: this layer runs only in full. Factor the two sizes apart."
            )
        cut = int(np.searchsorted(sizes, self.shape[0])) + 1
        left, right = self.cores[:cut], self.cores[cut:]
        return _left_interface(left), _right_interface(right)


class Step(NamedTuple):
    """`moved`: sum over the core updates of the squared change of the tensor."""

    cores: TTCores
    moved: float


def tt_svd(weight: np.ndarray, modes: tuple[int, ...], rank: int) -> TTCores:
    """The train of `weight` from truncated SVDs of its unfoldings, all ranks at most `rank`.

    weight : (d_out, d_in), reshaped row by row; modes : prod = d_out d_in. Left-orthonormal cores of
    weight's dtype. The error is at most sqrt(d - 1) times that of the best train; exact at full ranks.
    Oseledets 2011, algorithm 1. Raises ValueError as `check_modes`.
    """
    check_modes(weight.shape, modes, rank)
    rest, cores, r = np.asarray(weight, np.float64), [], 1
    for m in modes[:-1]:
        rest = rest.reshape(r * m, -1)
        basis = _leading(rest, min(rank, *rest.shape))
        cores.append(basis.reshape(r, m, -1))
        rest, r = basis.T @ rest, basis.shape[1]
    cores.append(rest.reshape(r, modes[-1], 1))
    return TTCores(tuple(np.asarray(c, weight.dtype) for c in cores), tuple(weight.shape))


def tt_als(weight: np.ndarray, old: TTCores) -> Step:
    """One pass of exact least squares over every core of `old`, to the last one and back to the first.

    Law: ||weight - old||² - ||weight - new||² = moved >= 0 to rounding, because each core is fitted
    between orthonormal neighbours, where its least squares problem is a projection. Ranks are kept.
    Holtz, Rohwedder, Schneider 2012.
    """
    cores, moved = list(old.cores), 0.0
    _orthonormal_right(cores)
    there = np.asarray(weight, cores[0].dtype).reshape(old.modes)
    # A pass on the mirrored tensor is the way back.
    for tensor in (there, np.ascontiguousarray(there.T)):
        cores, change = _pass(tensor, cores)
        moved += change
        cores = [core.transpose(2, 1, 0) for core in reversed(cores)]
    return Step(TTCores(tuple(np.ascontiguousarray(c) for c in cores), old.shape), moved)


def core_gradients(train: TTCores, by_tensor: np.ndarray) -> list[np.ndarray]:
    """The gradient by each core of a function whose gradient by train.full() is `by_tensor` (d_out, d_in)."""
    cores, out = train.cores, []
    rest, rights = by_tensor, [by_tensor]
    for core in reversed(cores[1:]):
        rest = rest.reshape(-1, core.shape[1] * core.shape[2]) @ core.reshape(len(core), -1).T
        rights.insert(0, rest)
    left = np.ones((1, 1), cores[0].dtype)
    for core, right in zip(cores, rights, strict=True):
        out.append((left.T @ right.reshape(len(left), -1)).reshape(core.shape))
        left = (left @ core.reshape(len(core), -1)).reshape(-1, core.shape[2])
    return out


def _pass(weight, cores):
    """Fit every core from the first to the last; all but the first are right-orthonormal on entry."""
    modes = [core.shape[1] for core in cores]
    # rights[k]: the tensor with every mode after k contracted with its core.
    rights, rest = [weight], weight
    for core in reversed(cores[1:]):
        a, m, b = core.shape
        rest = rest.reshape(-1, m * b) @ core.reshape(a, m * b).T
        rights.insert(0, rest)
    left, carry, moved, made = np.ones((1, 1), weight.dtype), None, 0.0, []
    for k, core in enumerate(cores):
        r = left.shape[1]
        if carry is not None:
            core = np.tensordot(carry, core, 1)
        fitted = (left.T @ rights[k].reshape(len(left), -1)).reshape(core.shape)
        moved += float(np.sum((fitted - core).astype(np.float64) ** 2))
        if k < len(cores) - 1:
            q, carry = np.linalg.qr(fitted.reshape(r * modes[k], -1))
            fitted = q.reshape(r, modes[k], -1)
            left = (left @ fitted.reshape(r, -1)).reshape(-1, q.shape[1])
        made.append(fitted)
    return made, moved


def _orthonormal_right(cores):
    for k in range(len(cores) - 1, 0, -1):
        a, m, b = cores[k].shape
        q, carry = np.linalg.qr(cores[k].reshape(a, m * b).T)
        cores[k] = np.ascontiguousarray(q.T).reshape(-1, m, b)
        cores[k - 1] = np.tensordot(cores[k - 1], carry.T, 1)


def _leading(matrix, r):
    """Orthonormal basis (rows, r) of the leading left singular space."""
    rows, columns = matrix.shape
    if r == rows:
        return np.eye(rows)
    if columns > 4 * rows:
        return np.linalg.eigh(matrix @ matrix.T)[1][:, ::-1][:, :r]
    return np.linalg.svd(matrix, full_matrices=False)[0][:, :r]


def _left_interface(cores):
    out = np.ones((1, 1), cores[0].dtype)
    for core in cores:
        out = (out @ core.reshape(len(core), -1)).reshape(-1, core.shape[2])
    return out


def _right_interface(cores):
    out = np.ones((1, 1), cores[0].dtype)
    for core in reversed(cores):
        out = (core.reshape(-1, core.shape[2]) @ out).reshape(len(core), -1)
    return out
