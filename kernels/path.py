"""The regularisation path: the same problem for falling lam, each from the answer before."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from edgesolve.kernels.penalties import lam_max
from edgesolve.kernels.solution import Solution
from edgesolve.kernels.solve import solve


def grid(top: float, n_points: int = 20, ratio: float = 0.01) -> np.ndarray:
    """n_points values from `top` down to ratio x top, geometrically."""
    if not (top > 0 and math.isfinite(top)):
        raise ValueError(f"a path starts at lam_max > 0, got {top}: do the targets vary?")
    if not (n_points >= 2 and 0 < ratio < 1):
        raise ValueError(
            f"a path needs 2 points or more and 0 < ratio < 1, got {n_points}, {ratio}."
        )
    return top * np.geomspace(1.0, ratio, n_points)


def path(loss, penalty, lams=None, *, tol=1e-6, seconds=math.inf, **options) -> Iterator[Solution]:
    """Yields one `Solution` for every lam, as it is found; lams default to `grid(lam_max)`.

    penalty : its own lam is not read. seconds : for the whole path; once they are over it ends, so
    that fewer solutions than values may come. options : as `solve`'s.

    Gap-safe screening was measured and left out: a round of `newton` looks at all gates once in
    thirty products, and nothing was screened before the round that solved the problem.
    """
    began = time.perf_counter()
    values = grid(lam_max(loss, penalty)) if lams is None else np.asarray(lams, np.float64)
    U = None
    for lam in values:
        left = seconds - (time.perf_counter() - began)
        if not left > 0:
            return
        found = solve(loss, replace(penalty, lam=float(lam)), U, tol=tol, seconds=left, **options)
        yield found
        U = found.weights if found.weights.any() else None
