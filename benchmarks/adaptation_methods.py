"""Ways to adapt without labels, all on the same windows and in the same runtime: published ones, ours, and ours with
one lever moved.

    python benchmarks/adaptation_methods.py ours BUNDLE FRAMES.npy     seconds and peak memory of one, as JSON
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from edgesolve.device import adapt, gate
from edgesolve.device.board import peak_rss_mib
from edgesolve.device.bundle import Bundle, open_bundle
from edgesolve.device.patch import Statistics
from edgesolve.device.runtime import (
    Head,
    Runtime,
    adapted_graph,
    open_runtime,
    source_statistics,
)
from edgesolve.device.solve import source_moments
from edgesolve.device.teacher import Pass, Teacher, mixed, open_teacher
from edgesolve.kernels.moments import Moments, pooled
from edgesolve.kernels.ridge import ridge

BACKEND = "onnx"


@dataclass(frozen=True)
class Adapted:
    """`predict`: rows (n, D) -> logits (n, c). `statistics`: of the backbone, None as it shipped. `prepare`: what
    frames go through before the backbone."""

    predict: Callable[[np.ndarray], np.ndarray]
    statistics: dict[str, np.ndarray] | None = None
    decision: str = "accepted"
    reason: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Student:
    """A bundle's factory generation, opened once; nothing is written to disk."""

    path: Path
    threads: int = 1
    backend: str = BACKEND

    @cached_property
    def bundle(self) -> Bundle:
        return open_bundle(self.path)

    @cached_property
    def runtime(self) -> Runtime:
        return open_runtime(self.bundle, backend=self.backend, threads=self.threads)

    @cached_property
    def teacher(self) -> Teacher:
        return open_teacher(self.bundle, self.backend, self.threads)

    @cached_property
    def source(self) -> Statistics:
        return source_statistics(self.bundle)

    @cached_property
    def reference(self) -> dict[str, np.ndarray]:
        return self.bundle.reference(self.backend)

    @cached_property
    def moments(self) -> Moments:
        return source_moments(self.reference)

    @property
    def ridge(self) -> float:
        return self.bundle.manifest["solve"]["ridge"]

    def after(self, outcome: adapt.Outcome, current: Runtime | None = None) -> Runtime:
        """The runtime that `outcome` puts in force; nothing accepted leaves `current` (the factory's)."""
        current = current or self.runtime
        if outcome.head is None:
            return current
        graph = adapted_graph(self.bundle, self.backend, outcome.statistics, self.threads)
        return Runtime(self.bundle, self.backend, graph, outcome.head, current.generation + 1, [])

    def rows(self, frames: np.ndarray, statistics: dict[str, np.ndarray] | None) -> np.ndarray:
        if statistics is None:
            return self.runtime.rows(frames)
        graph = adapted_graph(self.bundle, self.backend, statistics, self.threads)
        return Runtime(self.bundle, self.backend, graph, self.runtime.head, 1, []).rows(frames)

    def moved(self, frames: np.ndarray, share: float) -> tuple[Pass, Pass, dict[str, np.ndarray]]:
        """(pass with factory statistics, pass with statistics moved a `share` of the way, those)."""
        mean, var = self.source.mean, self.source.var
        plain = self.teacher.run(frames, 0.0, mean, var)
        window = self.teacher.run(frames, share, mean, var)
        mean, var = mixed(mean, var, window, share)
        found = {"mean": mean.astype(np.float32), "var": var.astype(np.float32)}
        return plain, self.teacher.run(frames, 0.0, mean, var), found


def none(student: Student, frames: np.ndarray) -> Adapted:
    return Adapted(student.runtime.head)


def ours(student: Student, frames: np.ndarray, **options: Any) -> Adapted:
    """The product's own decision with its defaults; refused windows leave the factory network."""
    outcome = adapt.recalibrate(
        student.bundle,
        student.runtime,
        student.teacher,
        frames,
        None,
        adapt.Options(**options),
        time.perf_counter,
    )
    head = student.runtime.head if outcome.head is None else outcome.head
    return Adapted(head, outcome.statistics, outcome.decision, outcome.reason, outcome.report)


def renormalise(student: Student, frames: np.ndarray) -> Adapted:
    """Our statistics, the factory head: no drift test, no re-solve, no gate."""
    defaults = adapt.Options()
    n, source = len(frames), student.source
    share = defaults.share * n / (n + defaults.share_n0)
    window = student.teacher.run(frames, share, source.mean, source.var)
    mean, var = mixed(source.mean, source.var, window, share)
    found = {"mean": mean.astype(np.float32), "var": var.astype(np.float32)}
    return Adapted(student.runtime.head, found)


def careful(student: Student, frames: np.ndarray, least: float = 0.95) -> Adapted:
    """Statistics only, the share halved until the re-normalised teacher answers with as many classes as the plain
    one: where it answers with fewer it is the worse of the two."""
    defaults = adapt.Options()
    n, head = len(frames), student.runtime.head
    share = defaults.share * n / (n + defaults.share_n0)
    for _ in range(4):
        plain, moved, found = student.moved(frames, share)
        before, after = (gate.effective_classes(p.logits) for p in (plain, moved))
        if after >= least * before:
            return Adapted(head, found, reason=f"share {share:.2f}")
        share /= 2
    return Adapted(head, None, "kept", "marginal_shift")


def neo(student: Student, frames: np.ndarray, to_origin: bool = False) -> Adapted:
    """NEO (arXiv 2510.05635) on our rows, which are what the last linear map sees."""
    source = None if to_origin else student.moments.means()[0]
    return Adapted(recentred(student.runtime.rows(frames), student.runtime.head, source))


def t3a(student: Student, frames: np.ndarray, keep: int = 0) -> Adapted:
    return Adapted(templates(student.runtime.rows(frames), student.runtime.head, keep))


def prior(student: Student, frames: np.ndarray) -> Adapted:
    """Prior-shift correction: the window's class shares by EM, the calibration's are those of the anchors."""
    head = student.runtime.head
    source = gate.softmax(student.reference["anchor_logits"].astype(np.float64)).mean(0)
    log_ratio = np.log(shares(head(student.runtime.rows(frames)), source) / source)
    return Adapted(lambda rows: head(rows) + log_ratio.astype(np.float32))


def recentred(window: np.ndarray, head: Head, source: np.ndarray | None) -> Callable:
    """The window's mean taken to `source` (d,), or to the origin as published."""
    shift = (0 if source is None else source) - window.mean(0)
    return lambda rows: head(rows + shift.astype(np.float32))


def templates(window: np.ndarray, head: Head, keep: int) -> Callable:
    """T3A (Iwasawa and Matsuo 2021): a class's template is the mean direction of its weights and of the window's
    rows taken for it, of which the `keep` with the least entropy (0: all) count."""

    def unit(x):
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    seen = np.concatenate([head.weights.T, window])
    logits = head(seen)
    p = gate.softmax(logits.astype(np.float64))
    entropy = -(p * np.log(np.maximum(p, 1e-12))).sum(1)
    classes = logits.argmax(1)
    classes[: head.weights.shape[1]] = np.arange(head.weights.shape[1])
    means = []
    for k in range(head.weights.shape[1]):
        mine = np.flatnonzero(classes == k)
        mine = mine[np.argsort(entropy[mine], kind="stable")][: keep or None]
        means.append(unit(seen[mine]).mean(0))
    T = unit(np.array(means)).T.astype(np.float32)
    return lambda rows: rows @ T


def shares(logits: np.ndarray, source: np.ndarray, steps: int = 100) -> np.ndarray:
    """Class shares (c,) of a window by EM (Saerens, Latinne and Decaestecker 2002); `source` (c,) sums to 1."""
    p = gate.softmax(logits.astype(np.float64))
    q = source
    for _ in range(steps):
        r = p * (q / source)
        q = np.maximum((r / r.sum(1, keepdims=True)).mean(0), 1e-4)
        q /= q.sum()
    return q


@dataclass(frozen=True)
class Levers:
    """Ours without drift test and gate, each choice free.

    held_out: every fourth row judges and isn't learnt from. confident: rows weighted by the teacher's greatest
    probability, to the power given. align: rows first moved, feature by feature, that share of the way to the
    source's mean and spread (folded into the head afterwards; spread False: mean only). flip: mirrored frames join
    the window. ridge: times the bundle's.
    """

    mode: str = "backbone"
    share: float = 0.6
    share_n0: float = 12.0
    mass: float = 0.3
    n0: float = 48.0
    held_out: bool = True
    confident: float = 0.0
    align: float = 0.0
    spread: bool = True
    flip: bool = False
    ridge: float = 1.0

    def __call__(self, student: Student, *windows: np.ndarray) -> Adapted:
        """`windows`, newest first; each older one counts half of the one after it."""
        frames = np.concatenate(windows)
        n = len(frames)
        decay = np.concatenate([np.full(len(w), 0.5**i) for i, w in enumerate(windows)])
        if self.flip:
            frames, decay = np.concatenate([frames, frames[:, :, ::-1]]), np.tile(decay, 2)
        plain, moved, statistics = student.moved(frames, self.share * n / (n + self.share_n0))
        rows = moved.rows if self.mode == "backbone" else plain.rows
        return self.solved(student, rows, moved.logits, decay, statistics)

    def solved(self, student, rows, targets, decay=None, statistics=None) -> Adapted:
        weights = np.ones(len(rows)) if decay is None else decay
        if self.confident:
            weights = weights * gate.softmax(targets).max(1) ** self.confident
        scale, shift = self._alignment(student, rows)
        learnt = slice(None) if not self.held_out else np.arange(len(rows)) % 4 != 3
        window = weighted(rows[learnt] * scale + shift, targets[learnt], weights[learnt])
        mass = self.mass * window.n / (window.n + self.n0)
        together = pooled(student.moments, window, mass)
        relative = student.bundle.backends[student.backend].get("ridge", student.ridge)
        found = ridge(together, self.ridge * relative)
        W, b = found.weights, found.intercept
        head = Head((scale[:, None] * W).astype(np.float32), (b + shift @ W).astype(np.float32))
        return Adapted(head, statistics if self.mode == "backbone" else None)

    def _alignment(self, student, rows):
        if not self.align:
            return np.ones(rows.shape[1]), np.zeros(rows.shape[1])
        n, source = len(rows), student.moments
        a = self.align * n / (n + self.share_n0)
        mean = source.means()[0]
        var = np.diag(source.sxx) / source.n - mean**2
        floor, a = 1e-3 * var.mean(), min(a, 1.0)
        gap = rows.mean(0, dtype=np.float64) - mean
        target_var = (1 - a) * var + a * rows.var(0, dtype=np.float64) + a * (1 - a) * gap**2
        scale = np.sqrt((var + floor) / (target_var + floor)) if self.spread else np.ones_like(var)
        return scale, mean - scale * (mean + a * gap)


def weighted(x: np.ndarray, t: np.ndarray, w: np.ndarray) -> Moments:
    """The record of rows x (n, d) and targets t (n, c), row i counting w_i."""
    x, t = x.astype(np.float64), t.astype(np.float64)
    wx, wt = w[:, None] * x, w[:, None] * t
    return Moments(w.sum(), wx.sum(0), wx.T @ x, wt.T @ x, wt.sum(0), float(np.vdot(wt, t)))


METHODS: dict[str, Callable[[Student, np.ndarray], Adapted]] = {
    "none": none,
    "NEO, to the origin": partial(neo, to_origin=True),
    "NEO, to the source's mean": neo,
    "T3A, 5 a class": partial(t3a, keep=5),
    "T3A, all": t3a,
    "prior shift (EM)": prior,
    "re-normalise only": renormalise,
    "ours, head only": partial(ours, mode="head"),
    "ours": partial(ours, mode="backbone"),
}


CANDIDATES: dict[str, Callable[[Student, np.ndarray], Adapted]] = {
    "candidate, head only: rows aligned": Levers(mode="head", mass=3.0, align=1.0),
    "candidate: statistics only, share by the teacher's classes": careful,
}
MIRRORED = {
    "candidate, head only: aligned, mirrored, all rows, 10 x ridge": Levers(
        mode="head", mass=3.0, align=1.0, flip=True, held_out=False, ridge=10.0
    ),
}
"""Ours as it might become: no drift test, no gate."""


def main() -> None:
    """METHOD BUNDLE FRAMES.npy: opens the bundle, adapts once and says what it took."""
    _, name, path, frames = sys.argv
    student = Student(Path(path))
    began = time.perf_counter()
    METHODS[name](student, np.load(frames))
    print(json.dumps({"seconds": time.perf_counter() - began, "peak_mib": peak_rss_mib()}))


if __name__ == "__main__":
    main()
