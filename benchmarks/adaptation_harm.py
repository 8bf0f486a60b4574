"""The sections of the adaptation benchmark that must show no harm: clean and narrow windows, false alarms."""

from __future__ import annotations

import time

import numpy as np
from adaptation_common import POOL, Bench, Result, accuracy
from adaptation_corruptions import corrupted
from adaptation_methods import Student, ours
from compression_cases import IMAGENET
from environment import say
from figures import Figure, at_least, at_most, plain

from edgesolve.device import adapt, drift, gate
from edgesolve.host.capture import frame_statistics
from edgesolve.host.network import trace

NARROW = "Clean windows that are taken for drift"


def harmless(bench: Bench) -> Result:
    """No shift, few frames, few classes, and back to clean: never more than half a point below doing nothing."""
    y = bench.pool.y
    groups: dict[str, list[tuple[str, float, str]]] = {}
    clean = bench.student.rows(bench.clean, None)
    untouched = accuracy(bench.student.runtime.head(clean), bench.y)
    for mode in ("backbone", "head"):
        for case in ("none", "gaussian_noise", "contrast", "brightness")[: bench.job.size(4, 2)]:
            pool, judged = (bench.pool.x, bench.clean) if case == "none" else _wide(bench, case)
            factory = clean if case == "none" else bench.student.rows(judged, None)
            before = accuracy(bench.student.runtime.head(factory), bench.y)
            for what, picks in _pickings(bench, y).items():
                say(f"harmless: {mode}, {case}, {what}")
                for pick in picks:
                    found = ours(bench.student, pool[pick], mode=mode)
                    after = before
                    if found.decision == "accepted":
                        seen = factory
                        if found.statistics is not None:
                            seen = bench.student.rows(judged, found.statistics)
                        after = accuracy(found.predict(seen), bench.y)
                    label = f"{case.replace('none', 'no shift')}, {what}, mode {mode}"
                    tally = f"{found.decision} ({found.reason})"
                    groups.setdefault(label, []).append((tally, after, before))
    figures = [_least(label, found) for label, found in groups.items()]
    figures += [_back(bench, mode, clean, untouched) for mode in ("backbone", "head")]
    return figures, {"windows": groups, "untouched": untouched}


def _wide(bench: Bench, case: str) -> tuple[np.ndarray, np.ndarray]:
    """All 5,000 frames of the pool, so that each class has enough; and the judged ones."""
    both = corrupted(case, np.concatenate([bench.pool.x, bench.clean]))
    return both[: len(bench.pool)], both[len(bench.pool) :]


def _pickings(bench: Bench, y: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Windows: any frames; or frames of one, two or five classes."""
    windows = len(bench.seeds)
    found = {}
    for n in (16, 64):
        rngs = [np.random.default_rng([n, i]) for i in range(windows)]
        found[f"{n} frames"] = [r.permutation(len(y))[:n] for r in rngs]
        for classes in (1, 2, 5):
            picks = []
            for r in rngs:
                chosen = r.permutation(10)[:classes]
                picks.append(r.permutation(np.flatnonzero(np.isin(y, chosen)))[:n])
            found[f"{n} frames of {classes} class{'es' * (classes > 1)}"] = picks
    return found


def _least(label: str, found: list[tuple[str, float, float]]) -> Figure:
    change = [after - before for _, after, before in found]
    tallies = [t for t, _, _ in found]
    tally = ", ".join(f"{tallies.count(t)} {t}" for t in sorted(set(tallies)))
    return at_least(
        f"{label}: least change",
        min(change),
        -0.5,
        " points",
        measured=f"{min(change):+.2f} points (mean {np.mean(change):+.2f}; {tally})",
        baseline=f"untouched {found[0][2]:.2f} %",
    )


def _back(bench: Bench, mode: str, clean: np.ndarray, untouched: float) -> Figure:
    """Adapted to noise, then the shift ends: after the next window the network is the factory's again."""

    student, worst, tally, while_away = bench.student, 0.0, [], []
    pool, _ = bench.under("gaussian_noise")
    for seed in bench.seeds:
        args = (None, adapt.Options(mode=mode), time.perf_counter)
        first = adapt.recalibrate(
            student.bundle, student.runtime, student.teacher, bench.window(pool, seed, 64), *args
        )
        moved = student.after(first)
        while_away.append(accuracy(moved.logits(bench.clean), bench.y))
        window = bench.window(bench.pool.x, seed, 64)
        second = adapt.recalibrate(student.bundle, moved, student.teacher, window, *args)
        tally.append(f"{second.decision} ({second.reason})")
        after = accuracy(student.after(second, moved).logits(bench.clean), bench.y)
        worst = min(worst, after - untouched)
    tally = ", ".join(f"{tally.count(t)} {t}" for t in sorted(set(tally)))
    return at_least(
        f"back to clean after noise, one window of 64, mode {mode}: least change",
        worst,
        -0.5,
        " points",
        measured=f"{worst:+.2f} points ({tally})",
        baseline=f"untouched {untouched:.2f} %; until then {np.mean(while_away):.2f} %",
    )


def alarms(bench: Bench) -> Result:
    """The drift test on windows drawn from clean frames that its thresholds never saw, and under each corruption."""
    student, windows = bench.student, bench.job.size(10_000, 500)
    thresholds = student.bundle.manifest["drift"]
    once_in = thresholds["windows_per_false_alarm"]
    unseen = _unseen_training(bench, thresholds["frames"])[: bench.job.size(4000, 300)]
    clean = {
        "training frames that the thresholds never saw": unseen,
        "test frames": bench.job.cifar.x[: bench.job.size(10_000, 300)],
    }
    figures, details = [], {"tables": {}}
    for what, frames in clean.items():
        say(f"alarms: statistics of {len(frames)} {what}")
        each = _frame_statistics(bench, frames)
        if not details.get("same_as_device"):
            details["same_as_device"] = _same_as_device(student, frames[:64], each)
        for n in (16, 32, 64):
            scores = _scores(student, each, n, windows, replace=True)
            count = int((scores > 1).sum())
            figures.append(
                at_most(
                    f"false alarms in {windows:,} clean windows of {n}: {what}",
                    count,
                    windows / once_in,
                    measured=f"{count} ({windows / max(count, 1):,.0f} windows for each)",
                    baseline=f"configured: one in {once_in:,}; median score {np.median(scores):.2f}",
                )
            )
        for n in (128, 256):
            scores = _scores(student, each, n, windows // 10, replace=True)
            rate = 100.0 * float((scores > 1).mean())
            figures.append(plain(f"false alarms, windows of {n}: {what}", rate))
    lines = [["corruption", "16 frames", "64 frames", "median score at 64", "beyond content at 64"]]
    for case in bench.cases:
        say(f"alarms: {case}")
        pool, _ = bench.under(case)
        each = _frame_statistics(bench, pool[: bench.job.size(POOL, 200)])
        found = {n: _scores(student, each, n, 500, replace=False) for n in (16, 64)}
        thresholds_at = _test(student, each, 64).content
        shown = [f"{100 * (found[n] > 1).mean():.1f} %" for n in (16, 64)]
        beyond = f"{100 * (found[64] > thresholds_at).mean():.1f} %"
        lines.append([case, *shown, f"{np.median(found[64]):.1f}", beyond])
        figures.append(
            plain(
                f"detected at 64 frames: {case}",
                100.0 * float((found[64] > 1).mean()),
                baseline=f"at 16 frames {shown[0]}",
            )
        )
    details["tables"][NARROW] = _narrow(bench)
    details["tables"]["Windows in which the drift test raises its alarm"] = lines
    return figures, details


def _narrow(bench: Bench) -> list[list[str]]:
    """Clean windows of few classes: what adapt takes for drift today, and what would be left if the threshold rose
    with what k of K classes explain: content x (K - k) / (k (K - 1)), k as many as the answers show."""
    student, lines = (
        bench.student,
        [["frames", "classes", "median score", "today", "with the rule"]],
    )
    x, y = bench.pool.x, bench.pool.y
    total = len(np.unique(y))
    for n in (16, 64):
        for classes in (1, 2, 3, 5, 10):
            found = []
            for i in range(bench.job.size(20, 3)):
                rng = np.random.default_rng([n, classes, i])
                of = np.flatnonzero(np.isin(y, rng.permutation(total)[:classes]))
                window = x[rng.permutation(of)[:n]]
                seen = student.teacher.run(window, 0.0, student.source.mean, student.source.var)
                thresholds = student.bundle.manifest["drift"]
                d = drift.test(seen.mean, seen.var, n, student.reference, thresholds)
                k = gate.effective_classes(seen.logits)
                today = d.alarm and (d.beyond_content or k >= min(3.0, 0.35 * total))
                explained = 1 + (d.content - 1) * (total - k) / (k * (total - 1))
                found.append((d.score, today, today and d.score > explained))
            score, today, ruled = np.array(found, float).T
            lines.append(
                [
                    str(n),
                    str(classes),
                    f"{np.median(score):.2f}",
                    *(f"{int(a.sum())} of {len(found)}" for a in (today, ruled)),
                ]
            )
    return lines


def _unseen_training(bench: Bench, used: int) -> np.ndarray:
    """The build takes `used` of its calibration frames, evenly spread, for the thresholds: all others."""
    with np.load(bench.job.calibration("cifar_calibration")) as archive:
        x = archive["x"]
    spread = np.linspace(0, len(x) - 1, used).astype(int)
    return np.delete(x, spread, axis=0)


def _frame_statistics(bench: Bench, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, S) means and mean squares of what each frame sends into each normalisation."""

    network = trace(bench.original.model, (3, 32, 32))
    return frame_statistics(network, IMAGENET, frames)


def _same_as_device(student: Student, frames: np.ndarray, each) -> float:
    """Greatest difference of the device's score of these frames and the one from `each`, relative."""
    window = student.teacher.run(frames, 0.0, student.source.mean, student.source.var)
    n, thresholds = len(frames), student.bundle.manifest["drift"]
    device = drift.test(window.mean, window.var, n, student.reference, thresholds).score
    return abs(_test(student, [a[:n] for a in each], n).score / device - 1.0)


def _test(student: Student, each, n: int) -> drift.Drift:
    mean = each[0].mean(0)
    thresholds = student.bundle.manifest["drift"]
    return drift.test(mean, each[1].mean(0) - mean**2, n, student.reference, thresholds)


def _scores(student: Student, each, n: int, windows: int, *, replace: bool) -> np.ndarray:
    """The drift test's score of `windows` windows of `n` frames."""
    rng, scores = np.random.default_rng(n), np.empty(windows)
    for i in range(windows):
        pick = rng.choice(len(each[0]), n, replace=replace)
        scores[i] = _test(student, [a[pick] for a in each], n).score
    return scores
