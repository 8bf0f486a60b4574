"""Compiles every kernel once, at install time, so that no first request waits for the compiler."""

import time

import numpy as np

from edgesolve.kernels import accel


def warm() -> list[tuple[str, float]]:
    """[(kernel and dtypes, seconds)] for every kernel and dtype in use; empty without Numba."""
    fast = accel.compiled()
    if fast is None:
        return []
    v, starts = np.ones((4, 2)), np.array([0, 2, 4], np.int64)
    calls = [("prox_group_l2 float64", fast.prox_group_l2, (v, starts, np.ones(2), v))]
    for dtype in (np.float32, np.float64):
        for gate in (bool, dtype):
            z, D, out = np.ones((2, 1, 3), dtype), np.ones((2, 1, 4), gate), np.ones((2, 12), dtype)
            name = f"gated_pool {np.dtype(dtype)} gate {np.dtype(gate)}"
            calls.append((name, fast.gated_pool, (z, D, out)))
    return [(name, _timed(kernel, args)) for name, kernel, args in calls]


def _timed(kernel, args):
    began = time.perf_counter()
    kernel(*args)
    return time.perf_counter() - began
