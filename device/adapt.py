"""Recalibration as a function: a bundle, a window of frames, the head in force -> a decision and its reason.

No files are written here. collect -> drift test -> re-normalise -> re-solve -> gate (adaptation.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgesolve.device import budget, drift, gate
from edgesolve.device.bundle import Bundle
from edgesolve.device.errors import UsageError
from edgesolve.device.runtime import Head, Runtime, factory_head, source_statistics
from edgesolve.device.teacher import Pass, Teacher, mixed
from edgesolve.kernels.moments import Moments, pooled

SENTENCES = {
    "gate_passed": "The window has drifted and the new head passed every check.",
    "returned": "The window looks like the factory condition again; the factory head is back.",
    "dry_run": "The new head passed every check; nothing was written because of --dry-run.",
    "no_drift": "The window looks like the calibration data; there is nothing to correct.",
    "too_few_samples": "The window has too few usable frames to estimate anything from.",
    "too_few_classes": "The window holds too few classes: its statistics would describe them, not the sensor.",
    "out_of_time": "Not even the smallest window fits into --seconds.",
    "memory_bound": "Not even the smallest window fits into --memory-mib.",
    "not_finite": "The solve met NaN or inf; look at the frames.",
    "gap_too_large": "The solve ended too far from its optimum.",
    "anchor_agreement": "The new head would forget the source condition: it disagrees on the anchors.",
    "heldout_worse": "The new head is no closer to the re-normalised teacher on held-out frames.",
    "marginal_shift": "The new head would predict far fewer classes than the teacher.",
    "confidence_collapse": "The new head would be far less certain than the teacher.",
    "frozen": "The state folder holds a FROZEN file; learning is off.",
}
MIN_FRAMES = 16
LABEL_WEIGHT = 4.0


@dataclass(frozen=True, slots=True)
class Options:
    """`mode`: "auto" (what the bundle allows), "backbone" (statistics adaptable) or "head" (untouchable).

    share, share_n0: statistics move share x n / (n + share_n0) of the way to the window. mass_backbone,
    mass_head: say of the window against the source moments in the re-solve, in either mode.
    """

    mode: str = "auto"
    seconds: float | None = None
    memory_mib: float | None = None
    max_frames: int = 512
    share: float = 0.6
    share_n0: float = 12.0
    mass_backbone: float = 0.3
    mass_head: float = 3.0


@dataclass(frozen=True)
class Outcome:
    """`head`, `statistics` are what to put in force (None: keep); `report` is JSON for the user."""

    decision: str
    reason: str
    head: Head | None = None
    statistics: dict[str, np.ndarray] | None = None
    report: dict[str, Any] = field(default_factory=dict)


def recalibrate(
    bundle: Bundle,
    current: Runtime,
    teacher: Teacher,
    frames: np.ndarray,
    labels: np.ndarray | None,
    options: Options,
    clock: Callable[[], float],
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Decide about frames (n, h, w, c), already checked; labels (n,) int or None, -1 = unlabelled."""
    mode = _mode(bundle, options, current.backend)
    report: dict[str, Any] = {"mode": mode, "n_given": len(frames)}
    frames, labels, report["bad_frames"] = _usable(frames, labels)
    if len(frames) < MIN_FRAMES:
        report["n"] = len(frames)
        return _kept("too_few_samples", report)
    n, refusal, report["budget"] = budget.plan(bundle, current, teacher, frames, options, clock)
    if refusal:
        report["n"] = n
        return _kept(refusal, report)
    frames, labels = _spread(frames, labels, n)
    report["n"] = n

    source = source_statistics(bundle)
    reference = bundle.reference(current.backend)
    say(f"looking at {n} frames")
    began = clock()
    plain = teacher.run(frames, 0.0, source.mean, source.var)
    forward = clock() - began
    found = drift.test(plain.mean, plain.var, n, reference, bundle.manifest["drift"])
    report["drift"] = {
        "score": found.score,
        "content": found.content,
        "alarm": found.alarm,
        "windows_per_false_alarm": found.windows_per_false_alarm,
    }
    labelled = labels is not None and bool((labels >= 0).any())
    if not found.alarm and not labelled:
        return _unchanged(bundle, current, report, forward)
    if not labelled and not found.beyond_content and _few_classes(plain.logits):
        return _kept("too_few_classes", report, forward)

    if found.alarm:
        say("re-normalising")
        began = clock()
        share = options.share * n / (n + options.share_n0)
        window = teacher.run(frames, share, source.mean, source.var)
        mean, var = mixed(source.mean, source.var, window, share)
        moved = teacher.run(frames, 0.0, mean, var)
        forward += clock() - began
        report["share"] = share
    else:
        mean, var, moved = source.mean, source.var, plain
    if not labelled and _few_classes(moved.logits):
        return _kept("too_few_classes", report, forward)

    if bundle.own_rows(current.backend):
        began = clock()
        rows = current.rows(frames)
        forward += clock() - began
    else:
        rows = moved.rows if mode == "backbone" else plain.rows
    targets, weights = _targets(moved, labels, reference)
    report["target"] = "labels" if labelled else "renormalised_teacher"
    say("re-solving the head")
    began = clock()
    solved, judged = _solve(bundle, current, reference, rows, targets, weights, mode, options)
    report["solve_seconds"] = clock() - began
    report.update(
        status=solved.status.name.lower(),
        status_sentence=solved.status.value,
        relative_gap=solved.relative_gap,
        kkt=solved.kkt,
        n_iter=solved.n_iter,
    )
    head = Head(solved.weights.astype(np.float32), solved.intercept.astype(np.float32))
    began = clock()
    old = current.logits(frames[judged])
    forward += clock() - began
    report["forward_seconds"] = forward
    evidence = _evidence(
        bundle, current, head, old, rows[judged], targets[judged], reference, solved
    )
    reason, report["gate"] = gate.judge(evidence)
    report["flipped"] = float((evidence.new.argmax(1) != evidence.old.argmax(1)).mean())
    if reason:
        return Outcome("kept", reason, report=report)
    statistics = None
    if mode == "backbone" and found.alarm:
        statistics = {"mean": mean.astype(np.float32), "var": var.astype(np.float32)}
    return Outcome("accepted", "gate_passed", head, statistics, report)


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


def _usable(frames, labels):
    """Without constant frames: a covered lens or a dead sensor says nothing about the scene."""
    flat = frames.reshape(len(frames), -1)
    good = (flat != flat[:, :1]).any(axis=1)
    if good.all():
        return frames, labels, 0
    return frames[good], None if labels is None else labels[good], int((~good).sum())


def _spread(frames, labels, n):
    """`n` frames evenly spread over the window; labelled ones always among them."""
    if n >= len(frames):
        return frames, labels
    pick = np.linspace(0, len(frames) - 1, n).astype(int)
    if labels is not None:
        marked = np.flatnonzero(labels >= 0)[:n]
        rest = np.setdiff1d(pick, marked)[: n - len(marked)]
        pick = np.sort(np.concatenate([marked, rest]))
    return frames[pick], None if labels is None else labels[pick]


def _few_classes(logits: np.ndarray) -> bool:
    classes = logits.shape[1]
    return classes >= 4 and gate.effective_classes(logits) < min(3.0, 0.35 * classes)


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


def _solve(bundle, current, reference, rows, targets, weights, mode, options):
    """Re-solve on three quarters of the rows, pooled with the source; the last quarter judges."""
    judged = np.arange(len(rows)) % 4 == 3
    window = None
    for weight in np.unique(weights[~judged]):
        part = ~judged & (weights == weight)
        found = Moments.of(rows[part], targets[part])
        found = found if weight == 1.0 else found.scaled(float(weight))
        window = found if window is None else window + found
    source = Moments.from_arrays(
        {k.removeprefix("moments."): v for k, v in reference.items() if k.startswith("moments.")}
    )
    mass = options.mass_backbone if mode == "backbone" else options.mass_head
    mass *= window.n / (window.n + 48.0)
    together = pooled(source, window, mass)
    spec = bundle.manifest["solve"]
    relative = bundle.backends[current.backend].get("ridge", spec["ridge"])
    if spec["penalty"] == "ridge":
        from edgesolve.kernels.ridge import ridge

        return ridge(together, relative), np.flatnonzero(judged)
    from edgesolve.kernels.losses import SquaredMoments
    from edgesolve.kernels.newton import newton
    from edgesolve.kernels.penalties import GroupL2, lam_max
    from edgesolve.kernels.ridge import ridge_absolute

    loss = SquaredMoments.of(together, ridge_absolute(together, relative))
    starts = bundle.arrays(bundle.file(current.backend, "head"))["starts"]
    penalty = GroupL2(spec["lam"] * lam_max(loss, GroupL2(1.0, starts)), starts)
    seconds = np.inf if options.seconds is None else 0.5 * options.seconds
    start = current.head.weights.astype(np.float64)
    return newton(loss, penalty, start, tol=1e-7, seconds=seconds), np.flatnonzero(judged)


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


def _unchanged(bundle: Bundle, current: Runtime, report, forward) -> Outcome:
    """No drift from the factory condition: keep the factory head, or go back to it."""
    report["forward_seconds"] = forward
    if current.generation == 0:
        return Outcome("kept", "no_drift", report=report)
    return Outcome("accepted", "returned", factory_head(bundle, current.backend), None, report)


def _kept(reason: str, report: dict[str, Any], forward: float = 0.0) -> Outcome:
    report["forward_seconds"] = forward
    return Outcome("kept", reason, report=report)
