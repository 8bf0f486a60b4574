"""The sections of the adaptation benchmark that compare methods under corruptions."""

from __future__ import annotations

import time
from functools import partial

import adaptation_torch as upper
import numpy as np
from adaptation_common import (
    UPPER_FRAMES,
    Bench,
    Result,
    Row,
    accuracy,
    adapted,
    compared,
    judge,
    means,
    summary,
)
from adaptation_corruptions import CORRUPTIONS
from adaptation_filters import FILTERED
from adaptation_methods import CANDIDATES, METHODS, Levers, recentred, templates
from environment import say
from figures import Figure, at_least, plain
from scipy import stats

PUBLISHED = dict(
    zip(
        CORRUPTIONS,
        (27.7, 34.3, 27.1, 53.1, 45.7, 65.2, 58.0, 74.9, 58.7, 74.0, 90.7, 53.3, 73.4, 41.5, 69.7),
        strict=True,
    )
)
"""Accuracy of RobustBench's standard WRN-28-10 on CIFAR-10-C, severity 5."""


HEAD = partial(Levers, mode="head", mass=3.0)
LEVERS = {
    "head: defaults": HEAD(),
    "head: every row learnt from": HEAD(held_out=False),
    "head: mass 1": HEAD(mass=1.0),
    "head: mass 10": HEAD(mass=10.0),
    "head: 10 x ridge": HEAD(ridge=10.0),
    "head: share 0.9": HEAD(share=0.9),
    "head: weights by confidence": HEAD(confident=1.0),
    "head: mirrored frames too": HEAD(flip=True),
    "head: aligned, mean only": HEAD(align=1.0, spread=False),
    "head: aligned": HEAD(align=1.0),
    "head: aligned, every row": HEAD(align=1.0, held_out=False),
    "head: aligned, mirrored": HEAD(align=1.0, flip=True),
    "head: aligned, mirrored, every row, 10 x ridge": HEAD(
        align=1.0, flip=True, held_out=False, ridge=10.0
    ),
    "backbone: defaults": Levers(),
    "backbone: every row learnt from": Levers(held_out=False),
    "backbone: mass 1": Levers(mass=1.0),
    "backbone: weights by confidence": Levers(confident=1.0),
    "backbone: aligned": Levers(align=1.0),
    "backbone: mirrored frames too": Levers(flip=True),
    "backbone: share 0.4": Levers(share=0.4),
    "backbone: share 0.8": Levers(share=0.8),
}


def corruptions(bench: Bench) -> Result:
    rows = [row for case in bench.cases for row in _every(bench, case)]
    mean = means(rows)
    what = f"mean over {len(bench.cases)} corruptions at severity 5, {bench.frames} frames: "
    figures = [_generator(rows, bench.cases)] if len(bench.cases) > 2 else []
    for kind in ("NEO", "T3A"):
        rival = max((k for k in mean if k.startswith(kind)), key=mean.__getitem__)
        figures.append(_over(f"{what}ours over the best {kind}", mean, "ours", rival, 10.0))
    whole = f"BN re-estimated, {UPPER_FRAMES} frames (torch)"
    figures += [
        _over(f"{what}ours over BN re-estimated on the whole original", mean, "ours", whole, -2.0),
        _over(f"{what}backbone untouchable over nothing", mean, "ours, head only", "none", 15.0),
    ]
    return figures, summary(bench, rows, "Accuracy (%) by corruption", cost=True)


def _over(what: str, mean: dict[str, float], name: str, rival: str, bar: float) -> Figure:
    return at_least(
        what,
        mean[name] - mean[rival],
        bar,
        " points",
        baseline=f"{rival}: {mean[rival]:.2f} %; {name}: {mean[name]:.2f} %",
    )


def recompressed(bench: Bench) -> Result:
    """JPEG at quality 75: what every upload does."""
    rows = _every(bench, "jpeg_q75")
    mean = means(rows)
    figures = [
        plain(f"JPEG q75, {name}", value, baseline=f"none {mean['none']:.2f} %")
        for name, value in mean.items()
    ]
    return figures, summary(bench, rows, "Accuracy (%), JPEG q75")


def levers(bench: Bench) -> Result:
    """Ours without drift test and gate, one choice moved at a time."""
    student, rows = bench.student, []
    for case in bench.cases:
        pool, judged = bench.under(case)
        factory = student.rows(judged, None)
        for seed in bench.upper_seeds:
            say(f"levers: {case}, seed {seed}")
            both = bench.window(pool, seed, 2 * bench.frames)
            window, older = both[: bench.frames], both[bench.frames :]
            done = {name: adapted(f, student, window) for name, f in LEVERS.items()}
            for name in ("head: defaults", "backbone: defaults"):
                two = name.replace("defaults", "two windows, decay 0.5")
                done[two] = adapted(LEVERS[name], student, window, older)
            rows += judge(student, case, seed, judged, bench.y, factory, done)
    mean = means(rows)
    figures = [
        plain(
            f"{name}, mean over {len(bench.cases)} corruptions",
            value,
            baseline=f"defaults {mean[name.partition(':')[0] + ': defaults']:.2f} %",
        )
        for name, value in mean.items()
    ]
    return figures, summary(bench, rows, "Accuracy (%) by lever")


def sizes(bench: Bench) -> Result:
    """Windows of 16, 256 and 512 frames."""
    student, rows = bench.student, []
    for case in bench.cases:
        pool, judged = bench.under(case)
        factory = student.rows(judged, None)
        for n in (16, 256, UPPER_FRAMES):
            say(f"{n} frames: {case}")
            window = bench.window(pool, 0, n)
            done = {
                f"{name}, {n} frames": adapted(METHODS[name], student, window)
                for name in ("ours", "ours, head only")
            }
            rows += judge(student, case, 0, judged, bench.y, factory, done)
    figures = [plain(name, value) for name, value in means(rows).items()]
    return figures, summary(bench, rows, "Accuracy (%) by window size")


def _every(bench: Bench, case: str) -> list[Row]:
    say(case)
    pool, judged = bench.under(case)
    rows = compared(
        bench, bench.student, case, pool, judged, bench.y, METHODS | CANDIDATES | FILTERED
    )
    return rows + _references(bench, case, pool, judged)


def _references(bench: Bench, case: str, pool: np.ndarray, judged: np.ndarray) -> list[Row]:
    """The original in torch: untouched, NEO and T3A on its own embedding, BN re-estimated, Tent."""
    original, rows = bench.original, []
    seen, head = original.embedding(judged), original.head
    source = original.embedding(bench.job.cifar.x[9000:9512]).mean(0)
    for seed in bench.seeds:
        began = time.perf_counter()
        window = original.embedding(bench.window(pool, seed, bench.frames))
        forward = time.perf_counter() - began
        on = "on the original's embedding (torch)"
        done = {
            "none (torch, whole original)": head,
            f"NEO, to the origin, {on}": recentred(window, head, None),
            f"NEO, to the source's mean, {on}": recentred(window, head, source),
            f"T3A, 5 a class, {on}": templates(window, head, 5),
            f"T3A, all, {on}": templates(window, head, 0),
        }
        rows += [
            Row(case, name, seed, accuracy(f(seen), bench.y), forward) for name, f in done.items()
        ]
    for seed in bench.upper_seeds:
        for name, method in bench.upper_methods.items():
            for n in (bench.frames, UPPER_FRAMES):
                if n == bench.frames and name == "Tent":
                    continue
                began = time.perf_counter()
                model = method(original, bench.window(pool, seed, n))
                seconds = time.perf_counter() - began
                value = accuracy(upper.logits(model, judged), bench.y)
                rows.append(Row(case, f"{name}, {n} frames (torch)", seed, value, seconds))
    return rows


def _generator(rows: list[Row], cases: list[str]) -> Figure:
    """Is this CIFAR-10-C? The corruptions' order of difficulty, against a published network's."""
    plain_ = "none (torch, whole original)"
    found = [means([r for r in rows if r.case == c and r.method == plain_])[plain_] for c in cases]
    rank = float(stats.spearmanr(found, [PUBLISHED[c] for c in cases]).statistic)
    return at_least(
        "our corruptions: rank correlation of the original's accuracies with published ones",
        rank,
        0.8,
        "",
        baseline=f"mean {np.mean(found):.1f} %; WRN-28-10 on the published images "
        f"{np.mean([PUBLISHED[c] for c in cases]):.1f} %",
    )
