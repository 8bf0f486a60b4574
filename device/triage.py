"""What kind of shift is it? Named from what a recalibration computes anyway, so that a refusal can say what to do.

The thresholds were chosen on CIFAR-10 windows of 64 frames with ResNet-20 and ResNet-56.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgesolve.device.drift import Drift
from edgesolve.device.gate import effective_classes

SENTENCES = {
    "none": "The window looks like the calibration data.",
    "adapted": "The sensor differs from the factory's, and the head in force was solved for that.",
    "prior": "The sensor is unchanged; fewer or other classes are in view than in the calibration data.",
    "mean_scale": "The sensor or its light has changed; re-normalising brings the answers back.",
    "unknown_content": "The window shows what the network does not know; labels are needed.",
}
FEW_CLASSES = 0.75
KNOWN = 0.65
KNOWN_UNDER_A_SENSOR_SHIFT = 0.5


@dataclass(frozen=True, slots=True)
class Triage:
    """`kind`: a key of SENTENCES. classes: effective classes in the window; height, height_moved: `height` of the
    teacher's logits before and after re-normalising; all as shares of what the anchors have."""

    kind: str
    classes: float
    height: float
    height_moved: float | None


def triage(
    found: Drift, plain: np.ndarray, anchors: np.ndarray, moved: np.ndarray | None = None
) -> Triage:
    """Name the shift of a window.

    found : the drift test's answer. plain : (n, c) the teacher's logits on the window, under factory statistics.
    moved : the same under statistics moved to the window (`adapt`), None if that was not computed. anchors : (k, c)
    the teacher's logits on frames of the source.

    Below the alarm: "none". Where a mixture of known classes could reach this score, the logits decide: high ones of
    few classes are "prior", high ones of many "mean_scale", low ones "unknown_content". Beyond that something has
    happened to the sensor, which lowers logits by itself: "unknown_content" if they stay low re-normalised, else
    "mean_scale". Content that is half known, or that the network is certain of all the same, isn't recognised.
    """
    classes = effective_classes(plain) / effective_classes(anchors)
    usual = height(anchors)
    before = height(plain) / usual
    after = None if moved is None else height(moved) / usual
    kind = _kind(found, classes, before, after)
    return Triage(kind, classes, before, after)


def height(logits: np.ndarray) -> float:
    """How far the greatest logit of a frame stands above their mean, averaged over frames (n, c).

    The greatest logit tells unknown content better than the softmax does (Hendrycks et al. 2022, arXiv 1911.11132);
    less the mean because a network may add any constant to a frame's logits.
    """
    return float((logits.max(1) - logits.mean(1)).mean())


def _kind(found: Drift, classes: float, before: float, after: float | None) -> str:
    if not found.alarm:
        return "none"
    if found.beyond_content:
        best = before if after is None else max(before, after)
        return "unknown_content" if best < KNOWN_UNDER_A_SENSOR_SHIFT else "mean_scale"
    if before < KNOWN:
        return "unknown_content"
    return "prior" if classes < FEW_CLASSES else "mean_scale"
