"""ALPS: the support and the weights together, by splitting; better than greedy at high sparsity."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgesolve.host.metric import Metric
from edgesolve.host.prune import Pattern, refit

RIDGE = 1e-3
"""Relative, toward the least-squares weight, for the search only. Published: 0.01, which was worse here."""
RHO = 0.1
PERIOD = 3
"""Iterations between two looks at the support."""
PATIENCE = 3
"""Looks in a row at an unchanged support that end the search. Published: one, which stops few inputs at once."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""ρ grows by the first factor whose share of the support changed at least; not while nothing changes."""
POLISH = 10
"""Steps of conjugate gradients before two supports are compared."""


def alps(metric: Metric, pattern: Pattern, *, iterations: int = 300) -> np.ndarray:
    """Weight (T, D) within the pattern: the best support that ADMM met, refitted exactly.

    Meng et al. 2024 (ALPS): inputs scaled to unit variance, then B = (G - V + ρD)(H + ρI)⁻¹, D = the
    pattern's top of B + V/ρ, V += ρ(B - D), ρ growing as long as the support changes. The iterates don't
    descend: supports are compared by what conjugate gradients make of each, and the best one is kept.
    """
    start = metric.least_squares()
    ridged = metric.ridged(start, RIDGE)
    scale = np.sqrt(np.diag(ridged.S))
    scale[scale == 0.0] = 1.0
    H, G = ridged.S / np.outer(scale, scale), ridged.C / scale
    best, least = None, np.inf
    for D in _iterates(H, G, start * scale, pattern, iterations):
        D = polish(H, G, D, POLISH)
        loss = float(np.vdot(D @ H - 2.0 * G, D))
        if loss < least:
            best, least = D != 0.0, loss
    return refit(metric, best)


def _iterates(
    H: np.ndarray, G: np.ndarray, B: np.ndarray, pattern: Pattern, iterations: int
) -> Iterator[np.ndarray]:
    """D (T, D_in) at the start, and each time that the support is looked at and has changed."""
    values, Q = np.linalg.eigh(H)
    mask = seen = pattern.top(np.abs(B))
    D, V, rho, unchanged = B * mask, np.zeros_like(B), RHO, 0
    yield D
    for i in range(1, iterations + 1):
        B = ((G - V + rho * D) @ Q / (values + rho)) @ Q.T
        Z = B + V / rho
        mask = pattern.top(np.abs(Z))
        D = Z * mask
        V += rho * (B - D)
        if i % PERIOD:
            continue
        changed = np.count_nonzero(mask != seen) / max(np.count_nonzero(mask), 1)
        seen = mask
        if changed:
            unchanged = 0
            rho *= next(factor for share, factor in GROWTH if changed > share)
            yield D
        else:
            unchanged += 1
            if unchanged == PATIENCE:
                return


def polish(H: np.ndarray, G: np.ndarray, D: np.ndarray, steps: int) -> np.ndarray:
    """Conjugate gradients for min <D H, D> - 2 <G, D> on the support of D, all rows at once."""
    mask = D != 0.0
    R = (G - D @ H) * mask
    P, r2 = R, np.sum(R * R, axis=1, keepdims=True)
    for _ in range(steps):
        HP = (P @ H) * mask
        curvature = np.sum(P * HP, axis=1, keepdims=True)
        step = np.divide(r2, curvature, out=np.zeros_like(r2), where=curvature > 0.0)
        D, R = D + step * P, R - step * HP
        before, r2 = r2, np.sum(R * R, axis=1, keepdims=True)
        P = R + np.divide(r2, before, out=np.zeros_like(r2), where=before > 0.0) * P
    return D
