"""The Numba kernels: the only file that imports numba.

A kernel takes C-contiguous arrays and scalars, writes into `out`, allocates nothing, raises
nothing, and calls only kernels of this file (Numba's cache misses a change elsewhere).
"""

import math

from numba import njit


@njit(cache=True)
def prox_group_l2(v, starts, thresh, out):
    for g in range(starts.size - 1):
        sq = 0.0
        for i in range(starts[g], starts[g + 1]):
            for k in range(v.shape[1]):
                sq += v[i, k] * v[i, k]
        norm = math.sqrt(sq)
        # A comparison, not max(0, 1 - t/norm): 0/0 is never formed for a zero group.
        scale = 0.0 if norm <= thresh[g] else 1.0 - thresh[g] / norm
        for i in range(starts[g], starts[g + 1]):
            for k in range(v.shape[1]):
                out[i, k] = scale * v[i, k]


@njit(cache=True)
def gated_pool(z, D, out):
    n, p, r = z.shape
    for a in range(n):
        for f in range(out.shape[1]):
            out[a, f] = 0.0
        for b in range(p):
            # Closed gates are not skipped: a NaN must be seen, and the branch costs what it saves.
            for i in range(D.shape[2]):
                w = D[a, b, i]
                for j in range(r):
                    out[a, i * r + j] += w * z[a, b, j]
        for f in range(out.shape[1]):
            out[a, f] /= p
