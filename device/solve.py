"""The head that a bundle asks for, from moments: the one place where device code solves its convex program."""

from __future__ import annotations

import numpy as np

from edgesolve.device.bundle import Bundle
from edgesolve.kernels.moments import Moments, pooled
from edgesolve.kernels.solution import Solution

N0 = 48.0
"""A window of n rows counts n / (n + N0) of its mass: few rows move the head little."""


def source_moments(reference: dict[str, np.ndarray]) -> Moments:
    """Of the calibration frames, from `Bundle.reference`."""
    prefix = "moments."
    return Moments.from_arrays(
        {k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)}
    )


def solve(
    bundle: Bundle,
    backend: str,
    source: Moments,
    window: Moments,
    mass: float,
    *,
    start: np.ndarray | None = None,
    seconds: float | None = None,
) -> Solution:
    """The optimum for source and window moments together, the window counting `mass` times n / (n + N0) as much as
    the source. `start` (D, c): warm start of the group penalty; `seconds`: most time it may take.

    The ridge's optimum doesn't depend on `start`; that of the group penalty only within the gap.
    """
    together = pooled(source, window, mass * window.n / (window.n + N0))
    spec = bundle.manifest["solve"]
    relative = bundle.backends[backend].get("ridge", spec["ridge"])
    if spec["penalty"] == "ridge":
        from edgesolve.kernels.ridge import ridge

        return ridge(together, relative)
    from edgesolve.kernels.losses import SquaredMoments
    from edgesolve.kernels.newton import newton
    from edgesolve.kernels.penalties import GroupL2, lam_max
    from edgesolve.kernels.ridge import ridge_absolute

    loss = SquaredMoments.of(together, ridge_absolute(together, relative))
    starts = bundle.arrays(bundle.file(backend, "head"))["starts"]
    penalty = GroupL2(spec["lam"] * lam_max(loss, GroupL2(1.0, starts)), starts)
    limit = np.inf if seconds is None else seconds
    first = None if start is None else start.astype(np.float64)
    return newton(loss, penalty, first, tol=1e-7, seconds=limit)
