"""Norms and the proximal step of ragged groups of rows.

Group g of an array v (D, c) is v[starts[g]:starts[g + 1]]; `starts` (n_groups + 1,) int64 rises
strictly from 0 to D.
"""

import numpy as np

from edgesolve.kernels import accel


def group_sums(v: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sum of each group's entries, (n_groups,)."""
    return np.add.reduceat(v.sum(axis=1), starts[:-1])


def group_norms(v: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Frobenius norm of each group, (n_groups,)."""
    return np.sqrt(np.add.reduceat(np.einsum("ij,ij->i", v, v), starts[:-1]))


def prox_group_l2(v: np.ndarray, starts: np.ndarray, thresh, out: np.ndarray) -> None:
    """Shrink every group of `v` (D, c) toward zero by its `thresh` >= 0 in Frobenius norm.

    thresh : one number, or (n_groups,). out : (D, c) of v's dtype, may be `v`; C-contiguous both.
    Law: v - out lies in thresh times the subdifferential of the norm at out. NaN stays NaN.
    """
    thresh = np.ascontiguousarray(np.broadcast_to(thresh, len(starts) - 1), np.float64)
    fast = accel.compiled()
    if fast is not None:
        fast.prox_group_l2(v, starts, thresh, out)
        return
    norms = group_norms(v, starts)
    # Not `norms > thresh`: a NaN norm must not be taken for a group that is switched off.
    keep = ~(norms <= thresh)
    scale = np.zeros_like(norms)
    scale[keep] = 1.0 - thresh[keep] / norms[keep]
    np.multiply(np.repeat(scale, np.diff(starts))[:, None], v, out=out)
