"""What the sections of the adaptation benchmark share: windows, judged frames, one table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import adaptation_torch as upper
import numpy as np
from adaptation_corruptions import CORRUPTIONS, corrupted, jpeg, whole
from adaptation_methods import METHODS, Adapted, Student
from environment import ONE_THREAD
from figures import Figure
from job import Job

Result = tuple[list[Figure], dict[str, Any]]
POOL, JUDGED_FROM, UPPER_FRAMES = 1024, 6000, 512


@dataclass(frozen=True)
class Row:
    """One method on one window: accuracy (%) on the judged frames, seconds of adapting alone."""

    case: str
    method: str
    seed: int
    accuracy: float
    seconds: float
    decision: str = "accepted"
    reason: str = ""


class Bench:
    """Windows come from the first 1,024 test images (harmless: 5,000), judged are 2,000 from number 6,000 on."""

    def __init__(self, job: Job, seeds: int, frames: int = 64, judged: int = 2000):
        self.job, self.frames = job, frames
        self.seeds = range(job.size(seeds, 1))
        self.upper_seeds = range(job.size(min(2, seeds), 1))
        self.cases = list(CORRUPTIONS) if not job.quick else ["gaussian_noise", "brightness"]
        judged = job.cifar.take(slice(JUDGED_FROM, JUDGED_FROM + job.size(judged, 300)))
        self.clean, self.y = judged.x, judged.y
        self.pool = job.cifar.take(slice(5000))
        self.original, self.upper_methods = upper.Original(), upper.METHODS

    @cached_property
    def student(self) -> Student:
        return Student(self.job.bundle("resnet20"), self.job.threads)

    def under(self, case: str) -> tuple[np.ndarray, np.ndarray]:
        """(frames of the pool, judged frames) under a corruption; "jpeg_q75"; "none"."""
        both = np.concatenate([self.pool.x[:POOL], self.clean])
        if case == "jpeg_q75":
            both = whole(jpeg(both.astype(np.float32) / 255, 75))
        else:
            both = corrupted(case, both)
        return both[:POOL], both[POOL:]

    def window(self, pool: np.ndarray, seed: int, n: int) -> np.ndarray:
        """Larger windows hold the smaller ones of the same seed."""
        return pool[np.random.default_rng(100 + seed).permutation(len(pool))[:n]]


def accuracy(answers: np.ndarray, y: np.ndarray) -> float:
    return 100.0 * float((answers.argmax(1) == y).mean())


def compared(
    bench: Bench,
    student: Student,
    case: str,
    pool: np.ndarray,
    judged: np.ndarray,
    y: np.ndarray,
    methods: Mapping[str, Callable],
) -> list[Row]:
    """Every method on every seed's window of `pool`."""
    factory = student.rows(judged, None)
    rows: list[Row] = []
    for seed in bench.seeds:
        window = bench.window(pool, seed, bench.frames)
        done = {name: adapted(f, student, window) for name, f in methods.items()}
        rows += judge(student, case, seed, judged, y, factory, done)
    return rows


def adapted(method: Callable, student: Student, *windows: np.ndarray) -> tuple[Adapted, float]:
    began = time.perf_counter()
    found = method(student, *windows)
    return found, time.perf_counter() - began


def judge(student, case, seed, judged, y, factory, done) -> list[Row]:
    """`factory`: rows of the judged frames as the bundle shipped. Equal statistics are looked at once."""
    known: dict[tuple, np.ndarray] = {}
    rows = []
    for name, (made, seconds) in done.items():
        seen = factory
        if made.statistics is not None or made.prepare is not None:
            frames = judged if made.prepare is None else made.prepare(judged)
            moved = made.statistics and made.statistics["mean"].tobytes()
            key = (moved, frames[:100].tobytes())
            if key not in known:
                known[key] = student.rows(frames, made.statistics)
            seen = known[key]
        value = accuracy(made.predict(seen), y)
        rows.append(Row(case, name, seed, value, seconds, made.decision, made.reason))
    return rows


def means(rows: Iterable[Row]) -> dict[str, float]:
    names = dict.fromkeys(r.method for r in rows)
    return {k: float(np.mean([r.accuracy for r in rows if r.method == k])) for k in names}


def summary(bench: Bench, rows: list[Row], caption: str, *, cost: bool = False) -> dict[str, Any]:
    cases = list(dict.fromkeys(r.case for r in rows))
    peaks = _peaks(bench) if cost else {}
    heading = [
        "method",
        *(c.replace("_", " ") for c in cases),
        "mean",
        "by seed",
        "s",
        "MiB",
        "kept",
    ]
    lines = [heading]
    for name in dict.fromkeys(r.method for r in rows):
        mine = [r for r in rows if r.method == name]
        by_seed = [
            np.mean([r.accuracy for r in mine if r.seed == s])
            for s in sorted({r.seed for r in mine})
        ]
        kept = sum(r.decision == "kept" for r in mine)
        lines.append(
            [
                name,
                *(f"{np.mean([r.accuracy for r in mine if r.case == c]):.1f}" for c in cases),
                f"{np.mean(by_seed):.2f}",
                f"{min(by_seed):.2f} to {max(by_seed):.2f}" if len(by_seed) > 1 else "",
                f"{np.median([r.seconds for r in mine]):.2f}",
                f"{peaks[name]['peak_mib']:.0f}" if name in peaks else "",
                f"{kept} of {len(mine)}" if kept else "",
            ]
        )
    caption += (
        f"; windows of {bench.frames} frames, seeds {', '.join(map(str, bench.seeds))} "
        f"(BN, Tent: {len(bench.upper_seeds)} of them); s: adapting alone, MiB: of a process that does just that"
    )
    return {"tables": {caption: lines}, "rows": [asdict(r) for r in rows], "cost": peaks}


def _peaks(bench: Bench) -> dict[str, dict[str, float]]:
    """Each method once in a process of its own."""
    here, found = Path(__file__).parent, {}
    folder = bench.job.out / "windows"
    folder.mkdir(parents=True, exist_ok=True)
    pool, _ = bench.under("gaussian_noise")
    for n in (bench.frames, UPPER_FRAMES):
        np.save(folder / f"adaptation_{n}.npy", bench.window(pool, 0, n))
    runs = {
        name: (
            "adaptation_methods.py",
            name,
            bench.student.path,
            folder / f"adaptation_{bench.frames}.npy",
        )
        for name in METHODS
        if name != "none"
    }
    for name in bench.upper_methods:
        label = f"{name}, {UPPER_FRAMES} frames (torch)"
        runs[label] = ("adaptation_torch.py", name, folder / f"adaptation_{UPPER_FRAMES}.npy")
    for label, (script, *args) in runs.items():
        command = [sys.executable, str(here / script), *map(str, args)]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, **ONE_THREAD}
        )
        found[label] = json.loads(done.stdout)
    return found
