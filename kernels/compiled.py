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


# Sums may be reordered, so that they use the vector unit; NaN and inf are not assumed away.
@njit(cache=True, fastmath={"reassoc", "contract"})
def masked_sum(product, D, out):
    c = out.shape[1]
    if c == 1:
        for a in range(out.shape[0]):
            total = product[a, 0] * D[a, 0]
            for i in range(1, D.shape[1]):
                total += product[a, i] * D[a, i]
            out[a, 0] = total
        return
    for a in range(out.shape[0]):
        for k in range(c):
            out[a, k] = 0.0
        for i in range(D.shape[1]):
            w = D[a, i]
            for k in range(c):
                out[a, k] += w * product[a, i * c + k]


@njit(cache=True)
def masked_spread(R, D, out):
    c = R.shape[1]
    if c == 1:
        for a in range(R.shape[0]):
            value = R[a, 0]
            for i in range(D.shape[1]):
                out[a, i] = value * D[a, i]
        return
    for a in range(R.shape[0]):
        for i in range(D.shape[1]):
            w = D[a, i]
            for k in range(c):
                out[a, i * c + k] = w * R[a, k]


@njit(cache=True)
def secular(beta, s, limit, out):
    for i in range(beta.shape[0]):
        total = 0.0
        for j in range(beta.shape[1]):
            total += beta[i, j]
        nu = 0.0
        if not math.sqrt(total) <= limit[i]:
            for _ in range(60):
                h = 0.0
                slope = 0.0
                for j in range(beta.shape[1]):
                    inverse = 1.0 / (s[i, j] * nu + limit[i])
                    term = beta[i, j] * inverse * inverse
                    h += term
                    slope += term * s[i, j] * inverse
                step = h * (math.sqrt(h) - 1.0) / max(slope, 1e-300)
                nu += step
                if not abs(step) > 1e-14 * nu:
                    break
        out[i] = nu
