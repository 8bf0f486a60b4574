"""Norms and proximal steps of groups, the arithmetic beneath `penalties.py`.

Group g of an array v (D, c) is v[starts[g]:starts[g + 1]]; `starts` (n_groups + 1,) int64 rises
strictly from 0 to D. Norms and sums are float64. NaN stays NaN and never raises.
"""

import numpy as np

from edgesolve.kernels import accel

GRAM_SHARE = 1e-3
"""A threshold above this share of the largest singular value lets `prox_nuclear` use the Gram: its
error, about eps sigma_max^2 / (2 thresh), is then below 1e-13 sigma_max, and a Gram is 4-7 times
as fast as an SVD (x86, blocks of 64 to 512 by 10)."""


def group_sums(v: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sum of each group's entries, (n_groups,)."""
    return np.add.reduceat(v.sum(axis=1, dtype=np.float64), starts[:-1])


def group_norms(v: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Frobenius norm of each group, (n_groups,)."""
    v = np.asarray(v, np.float64)
    return np.sqrt(np.add.reduceat(np.einsum("ij,ij->i", v, v), starts[:-1]))


def shrinkage(norms: np.ndarray, thresh: np.ndarray) -> np.ndarray:
    """(1 - thresh/norm)_+ for each norm, of norms' shape; `thresh` >= 0 broadcasts against it."""
    thresh = np.broadcast_to(thresh, norms.shape)
    # Not `norms > thresh`: a NaN norm must not be taken for a group that is switched off.
    keep = ~(norms <= thresh)
    scale = np.zeros_like(norms)
    scale[keep] = 1.0 - thresh[keep] / norms[keep]
    return scale


def prox_group_l2(v: np.ndarray, starts: np.ndarray, thresh, out: np.ndarray) -> None:
    """Shrink every group of `v` (D, c) toward zero by its `thresh` >= 0 in Frobenius norm.

    thresh : one number, or (n_groups,). out : (D, c) of v's dtype, may be `v`; C-contiguous both.
    Law: v - out lies in thresh times the subdifferential of the norm at out. NaN stays NaN.
    """
    thresh = np.ascontiguousarray(np.broadcast_to(thresh, len(starts) - 1), np.float64)
    fast = accel.compiled()
    if fast is not None:
        fast.prox_group_l2(v, accel.read_only(starts), accel.read_only(thresh), out)
        return
    scale = shrinkage(group_norms(v, starts), thresh)
    np.multiply(np.repeat(scale, np.diff(starts))[:, None], v, out=out)


def prox_nuclear(v: np.ndarray, starts: np.ndarray, thresh: np.ndarray) -> np.ndarray:
    """Shrink every singular value of every group of `v` (D, c) by the group's `thresh` >= 0.

    thresh (n_groups,). Returns a new array of v's dtype. Law: v - out lies in thresh times the
    subdifferential of the nuclear norm at out. Cai, Candes, Shen 2010.
    """
    out = np.empty_like(v)
    for groups, rows in equal_groups(starts):
        out[rows] = _shrink_singular(np.asarray(v[rows], np.float64), thresh[groups])
    return out


def nuclear_norms(v: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sum of each group's singular values, (n_groups,)."""
    # Not through the Gram, which blurs a vanishing singular value to sqrt(eps) sigma_max.
    return _per_group(v, starts, lambda blocks: svd(blocks)[1].sum(axis=1))


def spectral_norms(v: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Largest singular value of each group, (n_groups,)."""
    return _per_group(v, starts, lambda blocks: np.sqrt(_gram_eigen(_tall(blocks))[0][:, -1]))


def equal_groups(starts: np.ndarray):
    """Yields (groups (k,), rows (k, size)) once per group size: v[rows] is a stack of blocks."""
    sizes = np.diff(starts)
    for size in np.unique(sizes):
        groups = np.flatnonzero(sizes == size)
        yield groups, starts[groups, None] + np.arange(size)


def svd(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin SVDs P, s, Q' of a stack (k, a, b), float64; s is NaN where a block is not finite."""
    finite = np.isfinite(blocks).all(axis=(1, 2))
    P, s, Qt = np.linalg.svd(np.where(finite[:, None, None], blocks, 0.0), full_matrices=False)
    s[~finite] = np.nan
    return P, s, Qt


def _shrink_singular(blocks, thresh):
    if blocks.shape[1] < blocks.shape[2]:
        return _shrink_singular(_tall(blocks), thresh).transpose(0, 2, 1)
    values, Q = _gram_eigen(blocks)
    s, thresh = np.sqrt(values), thresh[:, None]
    out = (blocks @ Q * shrinkage(s, thresh)[:, None]) @ Q.transpose(0, 2, 1)
    small = ~(thresh[:, 0] > GRAM_SHARE * s[:, -1])
    if small.any():
        P, s, Qt = svd(blocks[small])
        out[small] = (P * (s * shrinkage(s, thresh[small]))[:, None]) @ Qt
    return out


def _gram_eigen(blocks):
    """Eigenvalues (k, b), rising and >= 0, and vectors of the Gram of each block (k, a, b)."""
    K = blocks.transpose(0, 2, 1) @ blocks
    finite = np.isfinite(K).all(axis=(1, 2))
    values, Q = np.linalg.eigh(np.where(finite[:, None, None], K, 0.0))
    values = np.maximum(values, 0.0)
    values[~finite] = np.nan
    return values, Q


def _tall(blocks):
    return blocks.transpose(0, 2, 1) if blocks.shape[1] < blocks.shape[2] else blocks


def _per_group(v, starts, norm):
    out = np.empty(len(starts) - 1)
    for groups, rows in equal_groups(starts):
        out[groups] = norm(np.asarray(v[rows], np.float64))
    return out
