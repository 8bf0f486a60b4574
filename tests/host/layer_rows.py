"""A layer's rows with what real ones have: an anisotropic input with a mean, a target that x doesn't explain wholly."""

from __future__ import annotations

import numpy as np

from edgesolve.host.metric import Metric
from edgesolve.kernels.moments import Moments


def rows(shape, seed=0, n=900):
    """x (n, D), t (n, T) and the weight (T, c, kh, kw) that made t of x before x got its mean."""
    g = np.random.default_rng(seed)
    D = int(np.prod(shape[1:]))
    x = g.standard_normal((n, D)) @ (g.standard_normal((D, D)) * 0.9 ** np.arange(D)[:, None])
    W = g.standard_normal(shape) * np.linspace(1.5, 0.5, shape[1])[:, None, None]
    t = x @ W.reshape(shape[0], D).T + 0.3 * g.standard_normal((n, shape[0]))
    return x + g.standard_normal(D), t, W


def metric_of(shape, seed=0):
    x, t, _ = rows(shape, seed)
    return Metric.of(Moments.of(x, t))
