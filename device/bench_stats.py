"""What a set of latencies supports: percentile bounds, an interval for the median, a test.

All times are in the caller's unit; nothing here knows about processes or boards.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np

CONFIDENCE = 0.99
PERCENTILES = (90, 99, 99.9)
_MOST_SPLITS = 200_000


def bound_rank(n: int, percentile: float) -> int | None:
    """The rank (1 = fastest) of n runs that bounds the percentile from above; None: too few.

    With t the largest integer such that P(Binomial(n, 1 - p) <= t) <= 0.01, the t - 1 slowest runs
    are dropped: the slowest left is a one-sided 99 % upper bound if runs are independent.
    MLPerf Inference's early-stopping rule.
    """
    p = float(Fraction(str(percentile)) / 100)
    total, t = 0.0, -1
    for k in range(n + 1):
        log_term = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        total += math.exp(log_term + k * math.log1p(-p) + (n - k) * math.log(p))
        if total > 1 - CONFIDENCE:
            break
        t = k
    return n - t + 1 if t >= 1 else None


def fewest_runs(percentile: float) -> int:
    """The smallest number of runs for which `bound_rank` gives a rank."""
    n = 1
    while bound_rank(n, percentile) is None:
        n += 1
    return n


def percentile_bound(times: np.ndarray, percentile: float) -> float | None:
    """The 99 % upper bound on the percentile of `times` (n,), or None where n can't support it."""
    rank = bound_rank(len(times), percentile)
    return None if rank is None else float(np.sort(times)[rank - 1])


def median_of_medians(repeats: list[np.ndarray]) -> float:
    """The median of the repeats' medians: one slow process moves it little."""
    return float(np.median([np.median(times) for times in repeats]))


def bootstrap_interval(repeats: list[np.ndarray], draws: int = 1000) -> list[float]:
    """A 95 % interval [low, high] for `median_of_medians`: repeats are drawn, then runs within."""
    rng = np.random.default_rng(0)
    medians = np.stack(
        [
            np.median(times[rng.integers(len(times), size=(draws, len(times)))], axis=1)
            for times in repeats
        ],
        axis=1,
    )
    drawn = rng.integers(len(repeats), size=(draws, len(repeats)))
    found = np.median(np.take_along_axis(medians, drawn, axis=1), axis=1)
    return [float(v) for v in np.quantile(found, [0.025, 0.975])]


def permutation_p(a: list[float], b: list[float]) -> float:
    """Two-sided p-value that `a` and `b` differ in mean, over every way to split them.

    Exact up to 200 000 splits (10 + 10 repeats), beyond that estimated from as many random ones.
    """
    pooled = np.array([*a, *b])
    n = len(a)
    if math.comb(len(pooled), n) <= _MOST_SPLITS:
        splits = np.array(list(itertools.combinations(range(len(pooled)), n)))
    else:
        rng = np.random.default_rng(0)
        splits = rng.random((_MOST_SPLITS // 10, len(pooled))).argsort(axis=1)[:, :n]
    left = pooled[splits].sum(axis=1)
    gap = np.abs(left / n - (pooled.sum() - left) / len(b))
    observed = abs(np.mean(a) - np.mean(b))
    # The observed split is one of them; rounding must not make it fall below itself.
    return float(np.mean(gap >= observed * (1 - 1e-9)))


def summary(repeats_ms: list[np.ndarray]) -> dict[str, float | int | list | None]:
    """The figures of one model (ms): median, bounds, samples, spread, pooled over repeats."""
    pooled = np.concatenate(repeats_ms)
    figures: dict[str, float | int | list | None] = {
        "n": len(pooled),
        "p50_ms": median_of_medians(repeats_ms),
        "p50_ci_ms": bootstrap_interval(repeats_ms),
    }
    for percentile in PERCENTILES:
        name = f"p{str(percentile).replace('.', '')}"
        figures[f"{name}_ms"] = percentile_bound(pooled, percentile)
        figures[f"{name}_sample_ms"] = float(np.percentile(pooled, percentile))
    return figures | {
        "min_ms": float(pooled.min()),
        "max_ms": float(pooled.max()),
        "mean_ms": float(pooled.mean()),
        "sd_ms": float(pooled.std(ddof=1)) if len(pooled) > 1 else 0.0,
        "mad_ms": float(np.median(np.abs(pooled - np.median(pooled)))),
        "throughput_per_s": 1000.0 / float(pooled.mean()),
        "medians_ms": [float(np.median(times)) for times in repeats_ms],
    }
