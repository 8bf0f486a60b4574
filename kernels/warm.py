"""Compiles every kernel once, at install time, so that no first request waits for the compiler."""

import time

import numpy as np

from edgesolve.kernels import accel


def warm() -> list[tuple[str, float]]:
    """[(kernel and dtypes, seconds)] for every kernel and dtype in use; empty without Numba."""
    fast = accel.compiled()
    if fast is None:
        return []
    v, pattern = np.ones((4, 2)), accel.read_only(np.ones((2, 4), bool))
    starts, thresh = accel.read_only(np.array([0, 2, 4], np.int64)), accel.read_only(np.ones(2))
    calls = [
        ("prox_group_l2 float64", fast.prox_group_l2, (v, starts, thresh, v)),
        ("secular float64", fast.secular, (v, v, np.ones(4), np.ones(4))),
    ]
    for dtype in (np.float32, np.float64):
        wide, narrow = np.ones((2, 12), dtype), np.ones((2, 3), dtype)
        calls.append((f"masked_sum {np.dtype(dtype)}", fast.masked_sum, (wide, pattern, narrow)))
        calls.append(
            (f"masked_spread {np.dtype(dtype)}", fast.masked_spread, (narrow, pattern, wide))
        )
        for gate in (bool, dtype):
            z, D = (
                accel.read_only(np.ones((2, 1, k), kind)) for k, kind in ((3, dtype), (4, gate))
            )
            name = f"gated_pool {np.dtype(dtype)} gate {np.dtype(gate)}"
            calls.append((name, fast.gated_pool, (z, D, wide)))
    return [(name, _timed(kernel, args)) for name, kernel, args in calls]


def _timed(kernel, args):
    began = time.perf_counter()
    kernel(*args)
    return time.perf_counter() - began
