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
REGAINED = 1.2
NONSENSE = 0.35


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
    few classes are "prior", high ones of many "mean_scale", low ones "unknown_content"; beyond that a sensor's shift
    lowers them by itself, and half as high will do. Low ones are a sensor's after all if re-normalising gives answers
    back to classes that had lost them (ratio 1.3 and more, unknown content at most 1.14). Logits that stay below
    NONSENSE of the source's are nonsense. Content that is half known isn't recognised.
    """
    classes = effective_classes(plain) / effective_classes(anchors)
    usual = height(anchors)
    before = height(plain) / usual
    after = None if moved is None else height(moved) / usual
    regained = 1.0 if moved is None else effective_classes(moved) / effective_classes(plain)
    return Triage(_kind(found, classes, before, after, regained), classes, before, after)


def height(logits: np.ndarray) -> float:
    """How far the greatest logit of a frame stands above their mean, averaged over frames (n, c).

    The greatest logit tells unknown content better than the softmax does (Hendrycks et al. 2022, arXiv 1911.11132);
    less the mean because a network may add any constant to a frame's logits.
    """
    return float((logits.max(1) - logits.mean(1)).mean())


def _kind(found: Drift, classes: float, before: float, after: float | None, regained: float) -> str:
    if not found.alarm:
        return "none"
    beyond = found.beyond_content
    if beyond and after is not None and after < NONSENSE:
        return "unknown_content"
    best = max(before, after or 0.0) if beyond else before
    if best < (KNOWN_UNDER_A_SENSOR_SHIFT if beyond else KNOWN) and regained < REGAINED:
        return "unknown_content"
    return "prior" if not beyond and classes < FEW_CLASSES else "mean_scale"
