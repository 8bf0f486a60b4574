"""Recalibration as a function: a bundle, a window of frames, the head in force -> a decision and its reason.

No files are written here. collect -> drift test -> re-normalise -> re-solve -> gate (adaptation.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgesolve.device import budget, gate
from edgesolve.device.bundle import Bundle
from edgesolve.device.errors import UsageError
from edgesolve.device.look import (
    Look,
    Moved,
    few_classes,
    fewer_classes,
    look_at,
    move,
    spread,
    usable,
)
from edgesolve.device.runtime import Head, Runtime, factory_head
from edgesolve.device.solve import solve, source_moments
from edgesolve.device.teacher import Pass, Teacher
from edgesolve.device.triage import triage
from edgesolve.kernels.moments import Moments

MIN_FRAMES = 16
LABEL_WEIGHT = 4.0


@dataclass(frozen=True, slots=True)
class Options:
    """`mode`: "auto" (what the bundle allows), "backbone" (statistics adaptable) or "head" (untouchable).

    share, share_n0: statistics move share x n / (n + share_n0) x (1 - 1 / drift score) of the way to the window.
    mass_backbone, mass_head: say of the window against the source moments in the re-solve, in either mode.
    decay: what an earlier window of the same features still counts. look_only: test for drift, change nothing.
    again: solve even if the head in force was solved under the condition that the window shows.
    """

    mode: str = "auto"
    seconds: float | None = None
    memory_mib: float | None = None
    max_frames: int = 512
    share: float = 0.6
    share_n0: float = 12.0
    mass_backbone: float = 0.3
    mass_head: float = 3.0
    decay: float = 0.5
    look_only: bool = False
    again: bool = True


@dataclass(frozen=True)
class Earlier:
    """What generation `generation` learnt from its own window, and how much it counts now."""

    generation: int
    weight: float
    window: Moments


@dataclass(frozen=True)
class Outcome:
    """`head`, `statistics` are what to put in force (None: keep); `report` is JSON for the user.

    `window`: moments of this window alone, which the head was solved on beside the source's and those of the
    earlier windows that `report["parts"]` names. `condition`: statistics by which that condition is known again.
    """

    decision: str
    reason: str
    head: Head | None = None
    statistics: dict[str, np.ndarray] | None = None
    report: dict[str, Any] = field(default_factory=dict)
    window: Moments | None = None
    condition: dict[str, np.ndarray] | None = None


def recalibrate(
    bundle: Bundle,
    current: Runtime,
    teacher: Teacher,
    frames: np.ndarray,
    labels: np.ndarray | None,
    options: Options,
    clock: Callable[[], float],
    say: Callable[[str], None] = lambda text: None,
    earlier: Callable[[str], Sequence[Earlier]] = lambda features: (),
) -> Outcome:
    """Decide about frames (n, h, w, c), already checked; labels (n,) int or None, -1 = unlabelled.

    `earlier(features_sha256)` gives windows whose rows are the same features, to be learnt from as well.
    """
    mode = _mode(bundle, options, current.backend)
    report: dict[str, Any] = {"mode": mode, "n_given": len(frames)}
    frames, labels, report["bad_frames"] = usable(frames, labels)
    if len(frames) < MIN_FRAMES:
        report["n"] = len(frames)
        return _kept("too_few_samples", report)
    n, refusal, report["budget"] = budget.plan(bundle, current, teacher, frames, options, clock)
    if refusal:
        report["n"] = n
        return _kept(refusal, report)
    frames, labels = spread(frames, labels, n)
    report["n"] = n

    look = look_at(bundle, current, teacher, frames, labels, clock, say)
    report["drift"] = look.figures
    reason = _settled(look, current, options)
    if reason == "returned" and not options.look_only:
        report["forward_seconds"] = look.seconds
        head = factory_head(bundle, current.backend)
        return Outcome("accepted", reason, head, None, report, condition=look.condition)
    if reason is not None:
        return _kept(reason, report, look.seconds)
    moved = move(look, teacher, options.share, options.share_n0, clock, say)
    kind = triage(look.found, look.plain.logits, look.reference["anchor_logits"], moved.at.logits)
    report["drift"]["kind"] = kind.kind
    report["share"] = moved.share
    if not look.labelled and kind.kind == "unknown_content":
        return _kept("unknown_content", report, moved.seconds)
    if not look.labelled and fewer_classes(look.plain.logits, moved.at.logits):
        return _kept("marginal_shift", report, moved.seconds)
    if not look.labelled and few_classes(moved.at.logits):
        return _kept("too_few_classes", report, moved.seconds)
    return _solved(bundle, current, look, moved, mode, options, report, clock, say, earlier)


def _settled(look: Look, current: Runtime, options: Options) -> str | None:
    """The reason to end here, or None."""
    if look.labelled:
        return None
    if not look.found.alarm:
        return "no_drift" if current.generation == 0 else "returned"
    if not (look.figures["alarm"] or (options.again and not options.look_only)):
        return "no_drift"
    plain = look.plain.logits
    if not look.found.beyond_content and few_classes(plain):
        return "too_few_classes"
    if not look.found.beyond(gate.effective_classes(plain), plain.shape[1]):
        return "too_few_classes"
    return "drifted" if options.look_only else None


def _solved(
    bundle, current, look: Look, moved: Moved, mode, options, report, clock, say, earlier
) -> Outcome:
    """Re-solve on three quarters of the window and judge by the rest."""
    began, forward = clock(), moved.seconds
    rows = (moved.at if mode == "backbone" else look.plain).rows
    if bundle.own_rows(current.backend):
        rows = current.rows(look.frames)
    forward += clock() - began
    targets, weights = _targets(moved.at, look.labels, look.reference)
    report["target"] = "labels" if look.labelled else "renormalised_teacher"
    statistics = None
    if mode == "backbone" and look.found.alarm:
        statistics = {"mean": moved.mean.astype(np.float32), "var": moved.var.astype(np.float32)}
    say("re-solving the head")
    began = clock()
    own, judged = _window(rows, targets, weights)
    own = Moments.from_arrays(own.to_arrays())  # as it is kept: an audit solves the same program
    features = features_sha256(bundle, current.backend, statistics)
    seen, parts = own, [{"generation": None, "weight": 1.0}]
    for part in earlier(features):
        seen = seen + part.window.scaled(part.weight)
        parts.append({"generation": part.generation, "weight": part.weight})
    mass = options.mass_backbone if mode == "backbone" else options.mass_head
    report.update(mass=mass, parts=parts, features_sha256=features)
    solved = solve(
        bundle,
        current.backend,
        source_moments(look.reference),
        seen,
        mass,
        start=current.head.weights,
        seconds=None if options.seconds is None else 0.5 * options.seconds,
    )
    report.update(
        solve_seconds=clock() - began,
        status=solved.status.name.lower(),
        status_sentence=solved.status.value,
        relative_gap=solved.relative_gap,
        kkt=solved.kkt,
        n_iter=solved.n_iter,
    )
    head = Head(solved.weights.astype(np.float32), solved.intercept.astype(np.float32))
    began = clock()
    old = current.logits(look.frames[judged])
    report["forward_seconds"] = forward + clock() - began
    evidence = _evidence(
        bundle, current, head, old, rows[judged], targets[judged], look.reference, solved
    )
    reason, report["gate"] = gate.judge(evidence)
    report["flipped"] = float((evidence.new.argmax(1) != evidence.old.argmax(1)).mean())
    report["answers"] = _answers(bundle, evidence)
    if reason:
        return Outcome("kept", reason, report=report)
    return Outcome("accepted", "gate_passed", head, statistics, report, own, look.condition)


def features_sha256(bundle: Bundle, backend: str, statistics: dict[str, np.ndarray] | None) -> str:
    """Names the features that rows are: moments of equal ones may be added."""
    digest = hashlib.sha256(bundle.manifest["rows"]["basis_sha256"].encode())
    if bundle.own_rows(backend):
        name = bundle.backends[backend]["backbone"]
        digest.update(bundle.manifest["files"][name]["sha256"].encode())
    for name in sorted(statistics or {}):
        digest.update(statistics[name].tobytes())
    return digest.hexdigest()


def _answers(bundle: Bundle, evidence: gate.Evidence) -> list[dict[str, Any]]:
    """Share of the judging slice that each class is given, before and after: classes gaining and losing."""
    new, old = (np.bincount(e.argmax(1), minlength=len(bundle.classes)) / len(e)
                for e in (evidence.new, evidence.old))  # fmt: skip
    return [
        {"class": name, "before": float(b), "after": float(a)}
        for name, b, a in zip(bundle.classes, old, new, strict=True)
    ]


def _mode(bundle: Bundle, options: Options, backend: str | None = None) -> str:
    allowed = bundle.manifest.get("adapt", {}).get("backbone") == "adaptable"
    if backend is not None and bundle.own_rows(backend):
        if options.mode == "backbone":
            raise UsageError(
                f"--mode backbone: the statistics of {backend} are fixed, only its head can change. "
                "Use a float --backend, or --mode auto."
            )
        return "head"
    if options.mode == "auto":
        return "backbone" if allowed else "head"
    if options.mode == "backbone" and not allowed:
        raise UsageError(
            "--mode backbone: this bundle was built with --fixed-backbone; only its head can change."
        )
    return options.mode


def _targets(moved: Pass, labels, reference) -> tuple[np.ndarray, np.ndarray]:
    """Targets (n, c) and row weights (n,): the teacher's logits; for a label, its class's typical logits.

    Source moments hold teacher logits, so a labelled row must be of that kind too (convex.md, section 5).
    """
    targets, weights = moved.logits.copy(), np.ones(len(moved.logits))
    if labels is not None:
        marked = labels >= 0
        targets[marked] = reference["prototypes"][labels[marked]]
        weights[marked] = LABEL_WEIGHT
    return targets, weights


def _window(rows, targets, weights) -> tuple[Moments, np.ndarray]:
    """(moments of three quarters of the rows, the numbers of the last quarter, which judges)."""
    judged = np.arange(len(rows)) % 4 == 3
    window = None
    for weight in np.unique(weights[~judged]):
        part = ~judged & (weights == weight)
        found = Moments.of(rows[part], targets[part])
        found = found if weight == 1.0 else found.scaled(float(weight))
        window = found if window is None else window + found
    return window, np.flatnonzero(judged)


def _evidence(bundle, current, head, old, rows, targets, reference, solved) -> gate.Evidence:
    anchors = reference["anchor_rows"].astype(np.float32)
    return gate.Evidence(
        new=head(rows),
        old=old,
        target=targets,
        anchors_new=head(anchors),
        anchors_old=factory_head(bundle, current.backend)(anchors),
        anchors=reference["anchor_logits"],
        relative_gap=solved.relative_gap,
    )


def _kept(reason: str, report: dict[str, Any], forward: float = 0.0) -> Outcome:
    report["forward_seconds"] = forward
    return Outcome("kept", reason, report=report)
