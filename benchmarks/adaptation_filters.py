"""A correction of the frames themselves, chosen without labels: whichever brings the network's own statistics nearest
to those of the calibration. The network's file stays untouched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from adaptation_methods import METHODS, Adapted, Student, none
from scipy import ndimage

from edgesolve.device import drift

Filter = Callable[[np.ndarray], np.ndarray]
BETTER = 0.9
"""The drift score must fall to this share of what it was, or the frames stay as they are."""


def filters(student: Student, window: np.ndarray) -> dict[str, Filter]:
    """Frames (n, h, w, c) uint8 -> the same: each channel's mean and spread back to those of the calibration frames
    that the bundle carries; median of 3 x 3; a mild blur; a sharpening."""
    known = student.bundle.parity()["frames"].astype(np.float32)
    source, seen = (
        (x.mean((0, 1, 2)), x.std((0, 1, 2)) + 1e-3) for x in (known, window.astype(np.float32))
    )

    def level(x):
        return _uint8((x - seen[0]) * (source[1] / seen[1]) + source[0])

    def smooth(x, sigma=0.6):
        return _uint8(ndimage.gaussian_filter(x.astype(np.float32), (0, sigma, sigma, 0)))

    def sharpen(x):
        y = x.astype(np.float32)
        return _uint8(y + 1.5 * (y - ndimage.gaussian_filter(y, (0, 1.0, 1.0, 0))))

    def median(x):
        return ndimage.median_filter(x, (1, 3, 3, 1))

    return {"level": level, "median": median, "smooth": smooth, "sharpen": sharpen}


def chosen(student: Student, window: np.ndarray) -> tuple[str, Filter]:
    """The filter with the least drift score, or none where no filter lowers it enough."""

    def score(frames):
        seen = student.teacher.run(frames, 0.0, student.source.mean, student.source.var)
        thresholds = student.bundle.manifest["drift"]
        return drift.test(seen.mean, seen.var, len(frames), student.reference, thresholds).score

    plain, found = score(window), filters(student, window)
    scores = {name: score(f(window)) for name, f in found.items()}
    best = min(scores, key=scores.__getitem__)
    if plain <= 1.0 or scores[best] > BETTER * plain:
        return "none", lambda frames: frames
    return best, found[best]


def filtered(student: Student, window: np.ndarray, method: Callable) -> Adapted:
    """`method` on the corrected window; `prepare` is what every later frame goes through."""
    name, correct = chosen(student, window)
    made = method(student, correct(window))
    return Adapted(made.predict, made.statistics, made.decision, name, made.report, correct)


FILTERED = {
    "candidate: frames corrected, network untouched": partial(filtered, method=none),
    "candidate: frames corrected, ours head only": partial(
        filtered, method=METHODS["ours, head only"]
    ),
    "candidate: frames corrected, ours": partial(filtered, method=METHODS["ours"]),
}


def _uint8(x: np.ndarray) -> np.ndarray:
    return np.clip(np.round(x), 0, 255).astype(np.uint8)
