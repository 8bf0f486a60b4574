"""Time and memory are promised before a solve, by choosing how many frames it may look at."""

from __future__ import annotations

import resource
from collections.abc import Callable

import numpy as np

PASSES = 3.4  # factory, window, moved; and the old student on the judging quarter
_MIB = float(1 << 20)


def solve_bytes(n: int, length: int, classes: int) -> int:
    """Most bytes that rows, moments and the solve hold together: n rows, `length` = D features.

    Three D x D float64 records at once (source, window, their sum), two more in the factorisation.
    """
    return 4 * n * (2 * length + 3 * classes) + 8 * 5 * length * length


def plan(bundle, current, teacher, frames: np.ndarray, options, clock: Callable[[], float]):
    """(frames to look at, refusal or None, figures): the largest window within every budget.

    Time is extrapolated from one batch of the teacher, run here; memory is the process's peak so far plus
    `solve_bytes`. A refusal means that the smallest window, 16 frames, doesn't fit.
    """
    from edgesolve.device.adapt import MIN_FRAMES

    n = min(len(frames), options.max_frames)
    length, classes = current.head.weights.shape
    figures: dict[str, float] = {}
    if options.seconds is not None or options.memory_mib is not None:
        size = len(_source(bundle).mean)
        part = frames[: teacher.batch]
        began = clock()
        teacher.run(part, 0.0, np.zeros(size), np.ones(size))
        figures["seconds_per_frame"] = (clock() - began) / teacher.batch
    if options.seconds is not None:
        solve = 4e-10 * (length**3 / 3 + n * length**2)
        room = options.seconds - solve - (clock() - began)
        fits = int(room / (PASSES * figures["seconds_per_frame"]))
        n = min(n, fits // teacher.batch * teacher.batch if fits >= teacher.batch else fits)
        if n < MIN_FRAMES:
            return max(n, 0), "out_of_time", figures
    if options.memory_mib is not None:
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
        left = (options.memory_mib - now) * _MIB - solve_bytes(0, length, classes)
        fits = int(left // (4 * (2 * length + 3 * classes)))
        n = min(n, fits)
        figures["memory_mib"] = now + solve_bytes(max(n, 0), length, classes) / _MIB
        if n < MIN_FRAMES:
            return max(n, 0), "memory_bound", figures
    return n, None, figures


def _source(bundle):
    from edgesolve.device.runtime import source_statistics

    return source_statistics(bundle)
