"""How far a window's normalisation statistics lie from the reference, as one number."""

import numpy as np

FLOOR = 1e-3
"""Share of the mean reference variance below which a channel's variance doesn't count: dead channels."""


def divergence(mean: np.ndarray, var: np.ndarray, ref_mean: np.ndarray, ref_var: np.ndarray):
    """Mean over channels of KL(N(mean, var) || N(ref_mean, ref_var)), >= 0, 0 for equal statistics.

    mean, var (..., S); ref_mean, ref_var (S,); result (...). With v = (var + f) / (ref_var + f):
    KL = ((mean - ref_mean)² / (ref_var + f) + v - 1 - log v) / 2, f = FLOOR x mean(ref_var).
    """
    floor = FLOOR * float(np.mean(ref_var)) + 1e-30
    shift = (mean - ref_mean) ** 2 / (ref_var + floor)
    ratio = (var + floor) / (ref_var + floor)
    return 0.5 * np.mean(shift + ratio - 1.0 - np.log(ratio), axis=-1)
