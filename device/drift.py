"""Has the input changed? One number against thresholds that the host calibrated on clean frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgesolve.kernels.drift import divergence


@dataclass(frozen=True, slots=True)
class Drift:
    """`score` as a multiple of the `null` threshold: above 1 is an alarm, once in `windows_per_false_alarm`
    windows of clean frames. `content` is what windows of a single class reach, on the same scale."""

    score: float
    content: float
    windows_per_false_alarm: int

    @property
    def alarm(self) -> bool:
        return self.score > 1.0

    def beyond(self, classes: float, of: int) -> bool:
        """Whether a window that seems to hold `classes` of `of` classes is further off than their mixture alone: the
        bound falls from `content` for one class to the alarm for all, as the variance of a mean over k classes drawn
        from K does, (K - k) / (k (K - 1))."""
        k = min(max(classes, 1.0), float(of))
        share = (of - k) / (k * (of - 1)) if of > 1 else 0.0
        return self.score > 1.0 + (max(self.content, 1.0) - 1.0) * share

    @property
    def beyond_content(self) -> bool:
        """No mixture of classes alone explains this window."""
        return self.score > self.content


def test(
    mean: np.ndarray,
    var: np.ndarray,
    n: int,
    reference: dict[str, np.ndarray],
    thresholds: dict[str, Any],
) -> Drift:
    """Compare a window's statistics (S,) over `n` frames, under factory normalisation, with the reference."""
    score = float(
        divergence(
            mean,
            var,
            reference["window_mean"].astype(np.float64),
            reference["window_var"].astype(np.float64),
        )
    )
    null, content = (_at(n, thresholds["sizes"], thresholds[k]) for k in ("null", "content"))
    return Drift(score / null, content / null, thresholds["windows_per_false_alarm"])


def from_condition(
    mean: np.ndarray,
    var: np.ndarray,
    n: int,
    condition: dict[str, np.ndarray],
    thresholds: dict[str, Any],
) -> float:
    """Score of a window against the window that a head was solved on ("seen.mean", "seen.var", "seen.n"); above 1:
    another condition. Both are samples, so the threshold is raised by 1 + n / seen.n."""
    seen = float(condition["seen.n"][0])
    score = float(divergence(mean, var, condition["seen.mean"], condition["seen.var"]))
    return score / (_at(n, thresholds["sizes"], thresholds["null"]) * (1.0 + n / seen))


def _at(n: int, sizes: list[int], values: list[float]) -> float:
    """Threshold at window size n, straight in log-log; flat beyond the largest size that was calibrated."""
    return float(np.exp(np.interp(np.log(n), np.log(sizes), np.log(np.maximum(values, 1e-300)))))
