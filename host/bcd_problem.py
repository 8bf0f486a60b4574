"""What block coordinate descent trains: the layers, their formats and penalties, and one point of the descent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgesolve.host import bcd_blocks as blocks
from edgesolve.host.tensor_train_cores import TTCores, tt_svd
from edgesolve.host.tensor_train_modes import check_modes


@dataclass(frozen=True, slots=True)
class Settings:
    """Penalties of the objective and the proximal weights of each block's last value; all > 0.

    alpha : of V_N, the hidden U_i and the C_i; alpha_weights : of the W_i and b_i, 0 for the same. Large
        ones make W_i learn its strongest directions first, as a ridge does.
    dtype : "float32" or "float64", of all arrays.
    published : the steps of the authors' code beside ours: TT-SVD in place of the train's least squares,
        W itself set to its pruned copy, biases held at 0. L may rise.
    """

    gamma: float = 5.0
    rho: float = 5.0
    tau: float = 0.1
    alpha: float = 1.0
    alpha_weights: float = 0.0
    dtype: str = "float32"
    published: bool = False

    def __post_init__(self):
        for name in ("gamma", "rho", "tau", "alpha"):
            value = getattr(self, name)
            if not (value > 0.0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number, got {value}.")
        if not 0.0 <= self.alpha_weights < math.inf:
            raise ValueError(f"alpha_weights must be 0 or more, got {self.alpha_weights}.")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {self.dtype!r}.")

    @property
    def ridge(self) -> float:
        """The proximal weight of W and b."""
        return self.alpha_weights or self.alpha


@dataclass(frozen=True, slots=True)
class Train:
    """Hold W near a tensor train over `modes`, ranks at most `rank`."""

    modes: tuple[int, ...]
    rank: int


@dataclass(frozen=True, slots=True)
class Sparse:
    """Hold W near a matrix with at most `keep` entries that are not 0."""

    keep: int


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What is to be learnt: rows of inputs and their targets, and the layers between.

    x : (n positions, d_0), the rows that the first layer sees: samples, or the patches of a convolution,
        those of one sample together. y : (n, d_N).
    widths : (d_1, ..., d_N), d_1 = channels of the convolution. formats : layer number (from 1) to its format.
    """

    x: np.ndarray
    y: np.ndarray
    widths: tuple[int, ...]
    formats: Mapping[int, Train | Sparse]
    positions: int = 1

    def __post_init__(self):
        if len(self.x) != len(self.y) * self.positions:
            raise ValueError(
                f"x has {len(self.x):,} rows, y {len(self.y):,} of {self.positions} position(s) each."
            )
        if self.y.ndim != 2 or self.y.shape[1] != self.widths[-1]:
            raise ValueError(f"y must be (n, {self.widths[-1]}), got {self.y.shape}.")
        for name in ("x", "y"):
            if bad := int(np.sum(~np.isfinite(getattr(self, name)).all(axis=1))):
                raise ValueError(f"{name} has {bad} row(s) with NaN or inf. Remove them.")
        for i, spec in self.formats.items():
            if not 1 <= i <= self.n_layers:
                raise ValueError(f"formats: no layer {i}, there are {self.n_layers}.")
            shape = self.shape(i)
            if isinstance(spec, Train):
                check_modes(shape, spec.modes, spec.rank)
            elif not 1 <= spec.keep <= math.prod(shape):
                raise ValueError(
                    f"layer {i}: keep must lie in 1..{math.prod(shape)}, got {spec.keep}."
                )

    @property
    def n_layers(self) -> int:
        return len(self.widths)

    def shape(self, i: int) -> tuple[int, int]:
        """(d_out, d_in) of W_i."""
        before = self.x.shape[1] if i == 1 else self.widths[i - 2]
        return self.widths[i - 1], before * (self.positions if i == 2 else 1)


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """One point of the descent. Tuples of N arrays, layer i at i - 1.

    V, U, A : (n, d_i), A_i = V_{i-1} W_i' + b_i; the first layer of a convolution flattened, (n, positions d_1).
    W (d_i, d_{i-1}), b (d_i,). C : TTCores, a pruned matrix, or None. `sweeps` done so far.
    """

    V: tuple[np.ndarray, ...]
    U: tuple[np.ndarray, ...]
    A: tuple[np.ndarray, ...]
    W: tuple[np.ndarray, ...]
    b: tuple[np.ndarray, ...]
    C: tuple[TTCores | np.ndarray | None, ...]
    sweeps: int = 0


def full(compressed: TTCores | np.ndarray | None) -> np.ndarray | None:
    """The matrix that C_i stands for."""
    return compressed.full() if isinstance(compressed, TTCores) else compressed


def compress(W: np.ndarray, spec: Train | Sparse | None):
    """W in the format `spec`, from scratch."""
    if isinstance(spec, Train):
        return tt_svd(W, spec.modes, spec.rank)
    if isinstance(spec, Sparse):
        return blocks.keep_largest(W, W, spec.keep, tau=1.0, alpha=1.0)
    return None


def shipped(state: State) -> tuple[np.ndarray, ...]:
    """The weights that a device gets: C_i where there is one."""
    return tuple(W if C is None else full(C) for W, C in zip(state.W, state.C, strict=True))


def forward(x: np.ndarray, positions: int, weights, biases, n_layers: int | None = None):
    """Outputs (n, d_N) of the network, or what layer `n_layers` gives before its ReLU."""
    last = len(weights) if n_layers is None else n_layers
    out = x
    for i, (W, b) in enumerate(zip(weights[:last], biases, strict=False)):
        out = (out if i == 0 else np.maximum(out, 0.0)) @ W.T + b
        if i == 0:
            out = out.reshape(len(x) // positions, -1)
    return out


def at(problem: Problem, settings: Settings, weights, biases, compressed=None) -> State:
    """The point where every layer holds exactly, from given W_i and b_i; the C_i from W_i unless given."""
    dtype = np.dtype(settings.dtype)
    W = tuple(np.asarray(w, dtype) for w in weights)
    b = tuple(np.asarray(v, dtype) for v in biases)
    for i, w in enumerate(W, 1):
        if w.shape != problem.shape(i):
            raise ValueError(f"W_{i} must be {problem.shape(i)}, got {w.shape}.")
    C = compressed or tuple(compress(w, problem.formats.get(i)) for i, w in enumerate(W, 1))
    A, V = [], []
    for i, (w, v) in enumerate(zip(W, b, strict=True)):
        A.append(affine(problem, i, V, w, v))
        V.append(np.maximum(A[-1], 0.0) if i + 1 < len(W) else A[-1])
    return State(tuple(V), tuple(A), tuple(A), W, b, C)


def affine(problem: Problem, i: int, V, W: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A (n, d) of the layer at index i (from 0) for W and b, from the input or V[i - 1]."""
    out = (np.asarray(problem.x, W.dtype) if i == 0 else V[i - 1]) @ W.T
    out += b
    return out.reshape(len(problem.y), -1)


def square(a: np.ndarray) -> float:
    """||a||² summed in float64, streamed."""
    flat = a.reshape(-1)
    total = 0.0
    for rows in blocks.row_blocks(len(flat), flat.itemsize):
        part = flat[rows].astype(np.float64)
        total += float(part @ part)
    return total
