"""The gated design and its adjoint, never formed as a whole.

Row a of the design is [(1/p) sum_b D[a, b, i] z[a, b, :] for gates i], (m r,): gate every
position, then pool; p = 1 is the vector head. Rows are taken in tiles, pooled, and multiplied by
BLAS: kernels that fuse the product as well took 1.1 to 2.5 times as long (x86, c = 1 and 10).
"""

import numpy as np

from edgesolve.kernels import accel

TILE_FLOATS = 1 << 20
"""Most numbers that a tile copies or makes (8 MiB in float64)."""

FUSED_POSITIONS = 16
"""Up to this p the compiled pooling is faster than batched BLAS: 1.1x at 16, 1.5-3x at 1 (x86)."""


def gated_pool(z: np.ndarray, D: np.ndarray) -> np.ndarray:
    """Gated and pooled features (n, m r), gate-major, in z's dtype: feature i r + j is (gate i, j).

    z (n, p, r) float32 or float64; D (n, p, m) bool, or float in [0, 1] (any float works).
    ValueError: shapes that do not fit.
    """
    n, m = _checked(z, D, z.dtype)
    out = np.empty((n, m * z.shape[2]), z.dtype)
    for rows in _tiles(z, D):
        _pool(z[rows], D[rows], out[rows])
    return out


def gated_forward(z: np.ndarray, D: np.ndarray, U: np.ndarray) -> np.ndarray:
    """A(U) = sum_i A_i U_i, (n, c) in U's dtype; U (m, r, c). Memory: one tile and the result."""
    n, m = _checked(z, D, U.dtype)
    if U.ndim != 3 or U.shape[:2] != (m, z.shape[2]):
        raise ValueError(f"U must be ({m}, {z.shape[2]}, c), got {U.shape}.")
    flat = U.reshape(-1, U.shape[2])
    out = np.empty((n, U.shape[2]), U.dtype)
    for rows, pooled in _pooled_tiles(z, D, U.dtype):
        np.matmul(pooled, flat, out=out[rows])
    return out


def gated_adjoint(z: np.ndarray, D: np.ndarray, R: np.ndarray) -> np.ndarray:
    """A'(R), (m, r, c) in R's dtype; R (n, c). Law: <A(U), R> = <U, A'(R)>."""
    n, m = _checked(z, D, R.dtype)
    if R.ndim != 2 or len(R) != n:
        raise ValueError(f"R must be ({n}, c), got {R.shape}.")
    out = np.zeros((m * z.shape[2], R.shape[1]), R.dtype)
    for rows, pooled in _pooled_tiles(z, D, R.dtype):
        out += pooled.T @ R[rows]
    return out.reshape(m, z.shape[2], R.shape[1])


def _pooled_tiles(z, D, dtype):
    """Yields (rows, their pooled features); one buffer serves all tiles."""
    buffer = None
    for rows in _tiles(z, D):
        size = rows.stop - rows.start
        if buffer is None:
            buffer = np.empty((size, D.shape[2] * z.shape[2]), dtype)
        _pool(z[rows], D[rows], buffer[:size])
        yield rows, buffer[:size]


def _pool(z, D, out):
    """One tile, computed in the dtype of `out` (n, m r)."""
    n, p, r = z.shape
    z = np.ascontiguousarray(z, out.dtype)
    D = np.ascontiguousarray(D, None if D.dtype == bool else out.dtype)
    fast = accel.compiled() if p <= FUSED_POSITIONS else None
    if fast is not None:
        fast.gated_pool(accel.read_only(z), accel.read_only(D), out)
        return
    shaped = out.reshape(n, -1, r)
    if p == 1:
        np.multiply(D[:, 0, :, None], z, out=shaped)
        return
    np.matmul(D.astype(out.dtype, copy=False).transpose(0, 2, 1), z, out=shaped)
    shaped /= p


def _tiles(z, D):
    """Slices of rows, each within TILE_FLOATS of input copies and result."""
    n, p, r = z.shape
    m = D.shape[2]
    step = max(1, TILE_FLOATS // max(1, p * (r + m) + m * r))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _checked(z, D, dtype):
    if dtype not in (np.float32, np.float64):
        raise ValueError(f"the gated design computes in float32 or float64, got {dtype}.")
    if z.ndim != 3 or D.ndim != 3 or z.shape[:2] != D.shape[:2] or z.shape[1] < 1:
        raise ValueError(f"z and D must be (n, p, r) and (n, p, m), got {z.shape} and {D.shape}.")
    return D.shape[0], D.shape[2]
