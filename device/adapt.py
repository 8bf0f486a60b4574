"""Recalibration as a function: a bundle, a window of frames, the head in force -> a decision and its reason.

No files are written here. collect -> drift test -> re-normalise -> re-solve -> gate (adaptation.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgesolve.device import budget, drift, gate
from edgesolve.device.bundle import Bundle
from edgesolve.device.errors import UsageError
from edgesolve.device.patch import Statistics
from edgesolve.device.runtime import Head, Runtime, factory_head, source_statistics
from edgesolve.device.solve import solve, source_moments
from edgesolve.device.teacher import Pass, Teacher, mixed
from edgesolve.device.triage import triage
from edgesolve.kernels.moments import Moments

MIN_FRAMES = 16
LABEL_WEIGHT = 4.0
FEWER_CLASSES = 0.92


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

    look = _look(bundle, current, teacher, frames, labels, clock, say)
    report["drift"] = look.figures
    reason = _settled(look, current, options)
    if reason == "returned" and not options.look_only:
        report["forward_seconds"] = look.seconds
        head = factory_head(bundle, current.backend)
        return Outcome("accepted", reason, head, None, report, condition=look.condition)
    if reason is not None:
        return _kept(reason, report, look.seconds)
    moved = _moved(look, teacher, options, clock, say)
    kind = triage(look.found, look.plain.logits, look.reference["anchor_logits"], moved.at.logits)
    report["drift"]["kind"] = kind.kind
    report["share"] = moved.share
    if not look.labelled and kind.kind == "unknown_content":
        return _kept("unknown_content", report, moved.seconds)
    if not look.labelled and _fewer_classes(look.plain.logits, moved.at.logits):
        return _kept("marginal_shift", report, moved.seconds)
    if not look.labelled and _few_classes(moved.at.logits):
        return _kept("too_few_classes", report, moved.seconds)
    return _solved(bundle, current, look, moved, mode, options, report, clock, say, earlier)


@dataclass(frozen=True)
class _Look:
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
class _Moved:
    """The teacher `at` statistics that were moved a `share` of the way to the window's."""

    at: Pass
    mean: np.ndarray
    var: np.ndarray
    share: float
    seconds: float


def _look(bundle, current, teacher, frames, labels, clock, say) -> _Look:
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
    return _Look(frames, labels, labelled, source, reference, plain, found, figures, seconds)


def _settled(look: _Look, current: Runtime, options: Options) -> str | None:
    """The reason to end here, or None."""
    if look.labelled:
        return None
    if not look.found.alarm:
        return "no_drift" if current.generation == 0 else "returned"
    if not (look.figures["alarm"] or (options.again and not options.look_only)):
        return "no_drift"
    plain = look.plain.logits
    if not look.found.beyond_content and _few_classes(plain):
        return "too_few_classes"
    if not look.found.beyond(gate.effective_classes(plain), plain.shape[1]):
        return "too_few_classes"
    return "drifted" if options.look_only else None


def _moved(look: _Look, teacher: Teacher, options: Options, clock, say) -> _Moved:
    mean, var = look.source.mean, look.source.var
    if not look.found.alarm:
        return _Moved(look.plain, mean, var, 0.0, look.seconds)
    say("re-normalising")
    began, n = clock(), len(look.frames)
    # As James and Stein shrink a mean: of a score of 1 all may be chance, of a high one hardly any.
    share = options.share * n / (n + options.share_n0) * (1.0 - 1.0 / look.found.score)
    window = teacher.run(look.frames, share, mean, var)
    mean, var = mixed(mean, var, window, share)
    at = teacher.run(look.frames, 0.0, mean, var)
    return _Moved(at, mean, var, share, look.seconds + clock() - began)


def _solved(
    bundle, current, look: _Look, moved: _Moved, mode, options, report, clock, say, earlier
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


def _fewer_classes(plain: np.ndarray, moved: np.ndarray) -> bool:
    """Whether re-normalising took answers away from some classes: it is then the content that it removed.

    Measured at 64 frames: every window of noisy keywords that lost accuracy lies at .86 or less, every corrupted
    CIFAR-10 window at .98 or more.
    """
    return gate.effective_classes(moved) < FEWER_CLASSES * gate.effective_classes(plain)


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
