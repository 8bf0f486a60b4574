"""A window of frames as the factory's statistics see it, and as statistics that follow it do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgesolve.device import drift, gate
from edgesolve.device.patch import Statistics
from edgesolve.device.runtime import source_statistics
from edgesolve.device.teacher import Pass, Teacher, mixed
from edgesolve.device.triage import triage

FEWER_CLASSES = 0.92


@dataclass(frozen=True)
class Look:
    """A window under factory statistics. `figures`: what the report says about drift."""

    frames: np.ndarray
    labels: np.ndarray | None
    labelled: bool
    source: Statistics
    reference: dict[str, np.ndarray]
    plain: Pass
    found: drift.Drift
    figures: dict[str, Any]
    seconds: float

    @property
    def condition(self) -> dict[str, np.ndarray]:
        """The window's own statistics, by which the same condition is known again."""
        n = np.float64(len(self.frames))
        return {
            "seen.mean": self.plain.mean,
            "seen.var": self.plain.var,
            "seen.n": np.atleast_1d(n),
        }


@dataclass(frozen=True)
class Moved:
    """The teacher `at` statistics that were moved a `share` of the way to the window's."""

    at: Pass
    mean: np.ndarray
    var: np.ndarray
    share: float
    seconds: float


def look_at(bundle, current, teacher, frames, labels, clock, say) -> Look:
    """Pass frames (n, h, w, c) through the teacher and test for drift."""
    source, reference = source_statistics(bundle), bundle.reference(current.backend)
    say(f"looking at {len(frames)} frames")
    began = clock()
    plain = teacher.run(frames, 0.0, source.mean, source.var)
    seconds = clock() - began
    thresholds, n = bundle.manifest["drift"], len(frames)
    found = drift.test(plain.mean, plain.var, n, reference, thresholds)
    score = found.score
    if current.condition is not None:
        score = drift.from_condition(plain.mean, plain.var, n, current.condition, thresholds)
    kind = triage(found, plain.logits, reference["anchor_logits"])
    figures = {
        "score": score,
        "from_factory": found.score,
        "content": found.content,
        "alarm": score > 1.0,
        "kind": "adapted" if found.alarm and score <= 1.0 else kind.kind,
        "windows_per_false_alarm": found.windows_per_false_alarm,
    }
    labelled = labels is not None and bool((labels >= 0).any())
    return Look(frames, labels, labelled, source, reference, plain, found, figures, seconds)


def move(seen: Look, teacher: Teacher, share: float, share_n0: float, clock, say) -> Moved:
    """Move the statistics `share` x n / (n + share_n0) x (1 - 1 / score) of the way to those of the window."""
    mean, var = seen.source.mean, seen.source.var
    if not seen.found.alarm:
        return Moved(seen.plain, mean, var, 0.0, seen.seconds)
    say("re-normalising")
    began, n = clock(), len(seen.frames)
    # As James and Stein shrink a mean: of a score of 1 all may be chance, of a high one hardly any.
    share = share * n / (n + share_n0) * (1.0 - 1.0 / seen.found.score)
    window = teacher.run(seen.frames, share, mean, var)
    mean, var = mixed(mean, var, window, share)
    at = teacher.run(seen.frames, 0.0, mean, var)
    return Moved(at, mean, var, share, seen.seconds + clock() - began)


def usable(frames, labels):
    """Without constant frames: a covered lens or a dead sensor says nothing about the scene."""
    flat = frames.reshape(len(frames), -1)
    good = (flat != flat[:, :1]).any(axis=1)
    if good.all():
        return frames, labels, 0
    return frames[good], None if labels is None else labels[good], int((~good).sum())


def spread(frames, labels, n):
    """`n` frames evenly spread over the window; labelled ones always among them."""
    if n >= len(frames):
        return frames, labels
    pick = np.linspace(0, len(frames) - 1, n).astype(int)
    if labels is not None:
        marked = np.flatnonzero(labels >= 0)[:n]
        rest = np.setdiff1d(pick, marked)[: n - len(marked)]
        pick = np.sort(np.concatenate([marked, rest]))
    return frames[pick], None if labels is None else labels[pick]


def few_classes(logits: np.ndarray) -> bool:
    """Whether a window seems to hold too few classes to describe a sensor."""
    classes = logits.shape[1]
    return classes >= 4 and gate.effective_classes(logits) < min(3.0, 0.35 * classes)


def fewer_classes(plain: np.ndarray, moved: np.ndarray) -> bool:
    """Whether re-normalising took answers away from some classes: it is then the content that it removed.

    Measured at 64 frames: every window of noisy keywords that lost accuracy lies at .86 or less, every corrupted
    CIFAR-10 window at .98 or more.
    """
    return gate.effective_classes(moved) < FEWER_CLASSES * gate.effective_classes(plain)
