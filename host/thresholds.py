"""Drift thresholds: what a window without drift looks like, by bootstrap over calibration frames."""

from __future__ import annotations

import numpy as np

from edgesolve.kernels.drift import divergence

SIZES = (16, 32, 64)
"""Window sizes that are calibrated. Larger windows use the last threshold: a change that 64 frames don't show is
too small to be worth correcting (measured: 512 clean CIFAR-10 test images differ from training images by more
than chance, and correcting that cost 1.6 points)."""
WINDOWS_PER_FALSE_ALARM = 1000
_RESAMPLES = 2000
_MIN_PER_CLASS = 24


def calibrate(
    means: np.ndarray, squares: np.ndarray, predicted: np.ndarray, seed: int = 0
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Thresholds by window size, and the reference mean and variance (S,).

    A fresh window also differs from the reference because that was estimated from n frames only: thresholds
    are raised by 1 + size / n for it.

    means, squares (n, S): what each frame sends into each normalisation; predicted (n,): the network's classes.
    `null`: exceeded once in 1000 windows of frames drawn at random. `content`: exceeded once in a hundred
    windows that hold one predicted class only, for the class that looks the least like the others.
    """
    ref_mean = means.mean(0)
    ref_var = squares.mean(0) - ref_mean**2
    generator = np.random.default_rng(seed)
    null, content = [], []
    classes = [k for k in np.unique(predicted) if (predicted == k).sum() >= _MIN_PER_CLASS]
    for size in SIZES:
        scores = _scores(means, squares, ref_mean, ref_var, size, _RESAMPLES, generator)
        null.append(float(np.quantile(scores, 1.0 - 1.0 / WINDOWS_PER_FALSE_ALARM)))
        null[-1] *= 1.0 + size / len(means)
        by_class = [
            np.quantile(
                _scores(
                    means[predicted == k],
                    squares[predicted == k],
                    ref_mean,
                    ref_var,
                    size,
                    200,
                    generator,
                ),
                0.99,
            )
            for k in classes
        ]
        content.append(float(max([null[-1], *by_class])))
    table = {
        "sizes": list(SIZES),
        "null": null,
        "content": content,
        "windows_per_false_alarm": WINDOWS_PER_FALSE_ALARM,
        "frames": len(means),
    }
    return table, ref_mean, ref_var


def _scores(means, squares, ref_mean, ref_var, size, resamples, generator) -> np.ndarray:
    """Divergence of `resamples` windows of `size` frames drawn with replacement."""
    n, out = len(means), []
    for start in range(0, resamples, 500):
        count = min(500, resamples - start)
        share = generator.multinomial(size, np.full(n, 1.0 / n), size=count) / size
        mean = share @ means
        out.append(divergence(mean, share @ squares - mean**2, ref_mean, ref_var))
    return np.concatenate(out)
