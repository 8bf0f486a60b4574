"""Recalibration without labels: accuracy on other frames before and after, and no harm where nothing shifted.

Windows come from the first 5,000 test images and the judged frames from the rest, whatever the window.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from environment import edgesolve, say
from figures import Figure, at_least, plain, spread
from job import Job
from main_accuracy import original_predictions, percent
from shifts import SHIFTS, shifted

from edgesolve.device.bundle import open_bundle
from edgesolve.device.runtime import factory_head, open_runtime, source_statistics
from edgesolve.device.teacher import mixed, open_teacher

POOL = 5000
BARS = {
    "backbone": {"noise": 65.0, "blur": 81.0, "contrast": 87.0},
    "head": {"noise": 54.0, "blur": 66.0, "contrast": 73.0},
}
MODES = {"backbone": "statistics adaptable", "head": "backbone untouchable"}


class Bench:
    """One bundle under every shift; each window starts from a fresh state."""

    def __init__(self, job: Job, name: str):
        self.job, self.name, self.path = job, name, job.bundle(name)
        self.bundle = open_bundle(self.path)
        judged = job.cifar.take(slice(POOL + 1000, POOL + 1000 + job.size(4000, 1000)))
        self.y, self.judged = judged.y, {s: shifted(s, judged.x) for s in SHIFTS}
        self.pool = job.cifar.take(slice(POOL))
        self.untouched = cache(self._untouched)
        self.runs: list[dict[str, Any]] = []

    def window(self, shift: str, n: int, seed: int) -> np.ndarray:
        """`n` frames of the pool drawn with `seed`; larger windows hold the smaller ones."""
        order = np.random.default_rng(100 + seed).permutation(len(self.pool))
        return shifted(shift, self.pool.x[order[:n]])

    def recalibrate(self, shift: str, n: int, mode: str, backend: str, seed: int = 0) -> dict:
        """Run the command on one window; what it decided, and accuracy before and after."""
        label = f"{shift}_{n}_seed{seed}"
        say(f"recalibrate on {label}, mode {mode}, {backend}")
        frames = self.job.window(label, self.window(shift, n, seed))
        state = self.job.state(f"{label}_{mode}_{backend}")
        args = ("--state", state, "--mode", mode, "--backend", backend)
        done = edgesolve("recalibrate", self.path, frames, *args)
        rows, head = self._rows(shift, backend, state)
        found = {
            "shift": shift,
            "n": n,
            "mode": mode,
            "backend": backend,
            "seed": seed,
            **{k: done.report[k] for k in ("decision", "reason", "relative_gap", "seconds")},
            "peak_rss_mib": done.report["peak_rss_mib"],
            "drift": done.report.get("drift"),
            "before": self.untouched(shift, backend),
            "after": percent(head(rows).argmax(1) == self.y),
            "factory_head_after": percent(factory_head(self.bundle)(rows).argmax(1) == self.y),
            "command": done.command,
        }
        self.runs.append(found)
        return found

    def _untouched(self, shift: str, backend: str) -> float:
        rows, head = self._rows(shift, backend, None)
        return percent(head(rows).argmax(1) == self.y)

    def _rows(self, shift, backend, state):
        runtime = open_runtime(self.bundle, backend=backend, state=state, threads=self.job.threads)
        return runtime.rows(self.judged[shift]), runtime.head

    def upper(self, shift: str, n: int, seed: int = 0) -> dict[str, float]:
        """The original network: as it is, and with its statistics moved half-way to the window's."""
        teacher = open_teacher(self.bundle, "onnx", self.job.threads)
        source = source_statistics(self.bundle)
        window = teacher.run(self.window(shift, n, seed), 0.5, source.mean, source.var)
        mean, var = mixed(source.mean, source.var, window, 0.5)
        moved = teacher.run(self.judged[shift], 0.0, mean, var).logits.argmax(1)
        plain_ = original_predictions(self.job, self.name, self.judged[shift])
        return {"original": percent(plain_ == self.y), "half_way": percent(moved == self.y)}


def run(job: Job) -> tuple[list[Figure], dict[str, Any]]:
    bench = Bench(job, "resnet20")
    upper = {s: bench.upper(s, 64) for s in SHIFTS}
    figures = []
    for mode, bars in BARS.items():
        for shift, bar in bars.items():
            seeds = range(job.size(5, 2))
            runs = [bench.recalibrate(shift, 64, mode, "onnx", seed) for seed in seeds]
            figures.append(_bar_row(runs, bar, upper[shift], job))
            runs = [bench.recalibrate(shift, 64, mode, "litert")]
            figures.append(_bar_row(runs, bar, upper[shift], job))
            figures.append(_plain_row(bench.recalibrate(shift, 512, mode, "onnx")))
    figures += _no_shift(bench) + _windows(bench) + _one_class(bench)
    return figures, {"runs": bench.runs, "original": upper, "judged": len(bench.y)}


def _bar_row(runs: list[dict], bar: float, upper: dict[str, float], job: Job) -> Figure:
    """The bar holds for the mean over windows."""
    first, after = runs[0], [r["after"] for r in runs]
    source = np.mean([r["factory_head_after"] for r in runs])
    more = f", factory head on these statistics {source:.1f} %" * (first["mode"] == "backbone")
    accepted = sum(r["decision"] == "accepted" for r in runs)
    return at_least(
        f"{first['shift']}, 64 frames, {MODES[first['mode']]}, {first['backend']}",
        float(np.mean(after)),
        bar,
        measured=f"{spread(after)}, {accepted} accepted",
        baseline=f"untouched {first['before']:.1f} %{more}; original {upper['original']:.1f} %, "
        f"re-normalised half-way {upper['half_way']:.1f} %",
        command=first["command"],
    )


def _plain_row(r: dict) -> Figure:
    what = f"{r['shift']}, {r['n']} frames, {MODES[r['mode']]}, {r['backend']}"
    gap = f", gap {r['relative_gap']:.0e}" if r["relative_gap"] is not None else ""
    return plain(
        what,
        r["after"],
        measured=f"{r['after']:.1f} % ({r['decision']}, {r['seconds']:.1f} s, "
        f"{r['peak_rss_mib']:.0f} MiB{gap})",
        baseline=f"untouched {r['before']:.1f} %",
        command=r["command"],
    )


def _no_shift(bench: Bench) -> list[Figure]:
    cases = [(n, m, "onnx") for n in (64, 512) for m in MODES] + [(64, m, "litert") for m in MODES]
    figures = []
    for n, mode, backend in cases:
        r = bench.recalibrate("none", n, mode, backend)
        figures.append(
            Figure(
                f"no shift, {n} frames, {MODES[mode]}, {backend}",
                f"{r['decision']} ({r['reason']}), {r['after']:.2f} %",
                "kept (no_drift), unchanged",
                (r["decision"], r["reason"]) == ("kept", "no_drift") and r["after"] == r["before"],
                f"untouched {r['before']:.2f} %",
                r["command"],
                r["after"],
            )
        )
    return figures


def _windows(bench: Bench) -> list[Figure]:
    """Windows without shift that share no frame."""
    order = np.random.default_rng(7).permutation(len(bench.pool))
    figures = []
    for n, count in ((64, bench.job.size(20, 4)), (512, bench.job.size(9, 2))):
        parts = {f"clean_{n}_{i}": order[i * n : (i + 1) * n] for i in range(count)}
        figures.append(_kept(bench, f"no shift, {count} windows of {n} frames", parts, "no_drift"))
    return figures


def _one_class(bench: Bench) -> list[Figure]:
    """Windows without shift in which only one class is seen."""
    y = bench.pool.y
    classes = range(bench.job.size(10, 3))
    parts = {f"class_{k}": np.flatnonzero(y == k)[:64] for k in classes}
    return [_kept(bench, f"no shift, {len(parts)} windows of one class, 64 frames", parts)]


def _kept(bench: Bench, what: str, parts: dict[str, np.ndarray], reason: str = "") -> Figure:
    """Every window must be kept (with `reason`, where one is given)."""
    found, command = [], ""
    for name, pick in parts.items():
        say(f"recalibrate on {name}")
        frames, state = bench.job.window(name, bench.pool.x[pick]), bench.job.state(name)
        done = edgesolve("recalibrate", bench.path, frames, "--state", state, "--backend", "onnx")
        found.append((done.report["decision"], done.report["reason"]))
        keys = ("decision", "reason", "drift", "seconds", "peak_rss_mib")
        bench.runs.append({"window": name, **{k: done.report.get(k) for k in keys}})
        command = command or done.command
    good = sum(d == "kept" and (not reason or r == reason) for d, r in found)
    tally = ", ".join(f"{found.count(f)} {f[0]} ({f[1]})" for f in sorted(set(found)))
    bar = f"all kept ({reason})" if reason else "all kept"
    return Figure(what, tally, bar, good == len(found), command=command, value=float(good))
