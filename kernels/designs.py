"""The designs A = [A_1 ... A_m]: how rows become A(U) and its adjoint.

A design knows `n` rows, `starts` (m + 1,) where the columns of each gate begin, and computes
    forward(U (D, c)) -> (n, c)    adjoint(R (n, c)) -> (D, c)    in the dtype of its argument.
`restrict(gates)` keeps some gates, in the given order; `astype(dtype)` stores another copy.
`kronecker()` gives [(gates, Gamma, S)], one entry per block size, so that
    A_i'A_j / n  is roughly  Gamma[i, j] S,  with equal traces on the diagonal's average.
Law of each: <forward(U), R> = <U, adjoint(R)>. Rows are taken in tiles: memory beside the data is
bounded by `TILE_FLOATS` numbers and the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgesolve.kernels import accel
from edgesolve.kernels.gated import gated_adjoint, gated_forward, gated_pool

TILE_FLOATS = 1 << 18
"""Most numbers of one tile's product: 2 MiB in float64, which a second-level cache holds."""

SAMPLE_ROWS = 1024
"""Rows that a `kronecker` of pooled or explicit designs looks at; it only has to be roughly right."""


class Design(Protocol):
    n: int
    starts: np.ndarray
    nbytes: int

    def forward(self, U: np.ndarray) -> np.ndarray: ...
    def adjoint(self, R: np.ndarray) -> np.ndarray: ...
    def restrict(self, gates: np.ndarray) -> Design: ...
    def astype(self, dtype) -> Design: ...
    def kronecker(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Masked:
    """The vector head: A_i = diag(D[:, i]) X.

    X (n, d) float32 or float64; D (n, m) bool.
    A(U) = sum over gates of D * (X U): one product with X and a masked sum, and never (n, m, d).
    """

    X: np.ndarray
    D: np.ndarray

    def __post_init__(self):
        X, D = np.ascontiguousarray(self.X), np.ascontiguousarray(self.D)
        if X.ndim != 2 or D.ndim != 2 or len(X) != len(D) or len(X) == 0 or 0 in X.shape + D.shape:
            raise ValueError(
                f"X and D must be (n, d) and (n, m), none of them 0, got {X.shape} and {D.shape}."
            )
        if X.dtype not in (np.float32, np.float64) or D.dtype != bool:
            raise ValueError(f"X must be float and D bool, got {X.dtype} and {D.dtype}.")
        if not np.isfinite(X).all():
            raise ValueError("X holds NaN or inf: look at the features, is the backbone saturated?")
        _set(self, X=X, D=D)

    @property
    def n(self) -> int:
        return len(self.X)

    @property
    def nbytes(self) -> int:
        return self.X.nbytes + self.D.nbytes

    @property
    def starts(self) -> np.ndarray:
        return np.arange(self.D.shape[1] + 1) * self.X.shape[1]

    def forward(self, U: np.ndarray) -> np.ndarray:
        m, d, c = self.D.shape[1], self.X.shape[1], U.shape[1]
        wide = np.ascontiguousarray(U.reshape(m, d, c).transpose(1, 0, 2)).reshape(d, m * c)
        out = np.empty((self.n, c), U.dtype)
        for rows in _tiles(self.n, m * c):
            product = self.X[rows].astype(U.dtype, copy=False) @ wide
            _masked_sum(product, self.D[rows], out[rows])
        return out

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        m, d, c = self.D.shape[1], self.X.shape[1], R.shape[1]
        wide = np.zeros((d, m * c), R.dtype)
        for rows in _tiles(self.n, m * c):
            spread = np.empty((rows.stop - rows.start, m * c), R.dtype)
            _masked_spread(R[rows], self.D[rows], spread)
            wide += self.X[rows].astype(R.dtype, copy=False).T @ spread
        return np.ascontiguousarray(wide.reshape(d, m, c).transpose(1, 0, 2)).reshape(m * d, c)

    def restrict(self, gates: np.ndarray) -> Masked:
        return _made(Masked, X=self.X, D=np.ascontiguousarray(self.D[:, gates]))

    def astype(self, dtype) -> Masked:
        return _made(Masked, X=self.X.astype(dtype, copy=False), D=self.D)

    def kronecker(self):
        S = np.zeros((self.X.shape[1],) * 2)
        Gamma = np.zeros((self.D.shape[1],) * 2)
        for rows in _tiles(self.n, self.X.shape[1] + self.D.shape[1]):
            X = self.X[rows].astype(np.float64, copy=False)
            D = self.D[rows].astype(np.float32)  # counts: exact up to 2^24 rows a tile
            S += X.T @ X
            Gamma += D.T @ D
        return [(np.arange(len(Gamma)), Gamma / self.n, S / self.n)]


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """Gate every position, then pool: A_i = (1/p) sum_b diag(D[:, b, i]) z[:, b, :].

    z (n, p, r) float; D (n, p, m) bool, or float in [0, 1]. p = 1 with bool gates: `Masked` is faster.
    """

    z: np.ndarray
    D: np.ndarray

    def __post_init__(self):
        z, D = np.asarray(self.z), np.asarray(self.D)
        if z.ndim != 3 or D.ndim != 3 or z.shape[:2] != D.shape[:2] or 0 in z.shape + D.shape:
            raise ValueError(
                f"z and D must be (n, p, r) and (n, p, m), none of them 0, got {z.shape} and {D.shape}."
            )
        if z.dtype not in (np.float32, np.float64) or D.dtype.kind not in "bf":
            raise ValueError(f"z must be float and D bool or float, got {z.dtype} and {D.dtype}.")
        if not (np.isfinite(z).all() and np.isfinite(D).all()):
            raise ValueError("z or D holds NaN or inf: is the backbone saturated?")
        _set(self, z=z, D=D)

    @property
    def n(self) -> int:
        return len(self.z)

    @property
    def nbytes(self) -> int:
        return self.z.nbytes + self.D.nbytes

    @property
    def starts(self) -> np.ndarray:
        return np.arange(self.D.shape[2] + 1) * self.z.shape[2]

    def forward(self, U: np.ndarray) -> np.ndarray:
        return gated_forward(self.z, self.D, U.reshape(self.D.shape[2], -1, U.shape[1]))

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        return gated_adjoint(self.z, self.D, R).reshape(-1, R.shape[1])

    def restrict(self, gates: np.ndarray) -> Pooled:
        return _made(Pooled, z=self.z, D=np.ascontiguousarray(self.D[:, :, gates]))

    def astype(self, dtype) -> Pooled:
        D = self.D if self.D.dtype == bool else self.D.astype(dtype, copy=False)
        return _made(Pooled, z=self.z.astype(dtype, copy=False), D=D)

    def kronecker(self):
        some = _sample(self.n)
        return Explicit(gated_pool(self.z[some], self.D[some]), self.starts).kronecker()


@dataclass(frozen=True, slots=True, eq=False)
class Explicit:
    """Rows that something else has made, such as an exported backbone: A (n, D) float.

    starts (m + 1,) : gate g owns columns starts[g]:starts[g + 1]; blocks may differ in size.
    """

    A: np.ndarray
    starts: np.ndarray

    def __post_init__(self):
        A, starts = np.asarray(self.A), np.ascontiguousarray(self.starts, np.int64)
        if A.ndim != 2 or len(A) == 0 or A.dtype not in (np.float32, np.float64):
            raise ValueError(f"A must be (n, D) float with n > 0, got {A.shape} {A.dtype}.")
        if starts[0] != 0 or starts[-1] != A.shape[1] or (np.diff(starts) <= 0).any():
            raise ValueError(f"starts must rise strictly from 0 to {A.shape[1]}, got {starts}.")
        if not np.isfinite(A).all():
            raise ValueError("A holds NaN or inf: look at the features, is the backbone saturated?")
        _set(self, A=A, starts=starts)

    @property
    def n(self) -> int:
        return len(self.A)

    @property
    def nbytes(self) -> int:
        return self.A.nbytes

    def forward(self, U: np.ndarray) -> np.ndarray:
        out = np.empty((self.n, U.shape[1]), U.dtype)
        for rows in _tiles(self.n, self.A.shape[1]):
            np.matmul(self.A[rows].astype(U.dtype, copy=False), U, out=out[rows])
        return out

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        out = np.zeros((self.A.shape[1], R.shape[1]), R.dtype)
        for rows in _tiles(self.n, self.A.shape[1]):
            out += self.A[rows].astype(R.dtype, copy=False).T @ R[rows]
        return out

    def restrict(self, gates: np.ndarray) -> Explicit:
        columns, starts = columns_of(self.starts, gates)
        return _made(Explicit, A=np.ascontiguousarray(self.A[:, columns]), starts=starts)

    def astype(self, dtype) -> Explicit:
        return _made(Explicit, A=self.A.astype(dtype, copy=False), starts=self.starts)

    def kronecker(self):
        A = self.A[_sample(self.n)].astype(np.float64)
        Q = A.T @ A / len(A)
        return kronecker_of(Q, self.starts)


def columns_of(starts: np.ndarray, gates) -> tuple[np.ndarray, np.ndarray]:
    """The columns of some gates, in their order, and where each gate begins among them."""
    sizes = np.diff(starts)[gates]
    rank = np.concatenate([[0], np.cumsum(sizes)])
    return np.repeat(starts[:-1][gates] - rank[:-1], sizes) + np.arange(rank[-1]), rank


def principal(Q: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Rows and columns `keep` (rising) of Q; Q itself for all of them. Twice `take`: np.ix_ is 6x slower."""
    return Q if len(keep) == len(Q) else Q.take(keep, axis=0).take(keep, axis=1)


def kronecker_of(Q: np.ndarray, starts: np.ndarray):
    """[(gates, Gamma, S)] for Q (D, D): blocks of equal size r share S (r, r), their mean.

    Gamma[i, j] = tr(Q_ij) / tr(S): exact where Q is a Kronecker product.
    """
    sizes, found = np.diff(starts), []
    for r in np.unique(sizes):
        gates = np.flatnonzero(sizes == r)
        columns, _ = columns_of(starts, gates)
        blocks = principal(Q, columns).reshape(len(gates), r, len(gates), r)
        S = np.einsum("iris->rs", blocks) / len(gates)
        trace = np.trace(S)
        Gamma = np.einsum("irjr->ij", blocks) / (trace if trace > 0 else 1.0)
        found.append((gates, Gamma, S))
    return found


def _made(kind, **arrays):
    """A design of arrays that one has checked before."""
    return _set(object.__new__(kind), **arrays)


def _set(design, **arrays):
    for name, array in arrays.items():
        object.__setattr__(design, name, array)
    return design


def _masked_sum(product, D, out):
    fast = accel.compiled()
    if fast is not None:
        fast.masked_sum(product, accel.read_only(D), out)
        return
    shaped = product.reshape(*D.shape, -1)
    np.einsum("nmc,nm->nc", shaped, D.astype(product.dtype), out=out)


def _masked_spread(R, D, out):
    fast = accel.compiled()
    if fast is not None:
        fast.masked_spread(np.ascontiguousarray(R), accel.read_only(D), out)
        return
    np.multiply(D.astype(R.dtype)[:, :, None], R[:, None, :], out=out.reshape(*D.shape, -1))


def _tiles(n, width):
    step = max(1, TILE_FLOATS // max(1, width))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _sample(n):
    """At most SAMPLE_ROWS rows, evenly spread: the same on every run."""
    return np.unique(np.linspace(0, n - 1, min(n, SAMPLE_ROWS)).astype(np.int64))
