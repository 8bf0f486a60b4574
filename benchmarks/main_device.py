"""What a device pays: one recalibration on one core, one inference, one cold start."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

from environment import ROOT, edgesolve, say, short
from figures import Figure, at_most, plain
from job import RECIPES, Job
from shifts import shifted

COLD_S = 1.0
_ORIGINAL = """
import sys, numpy, onnxruntime
from PIL import Image
frame = numpy.asarray(Image.open(sys.argv[2]))[None]
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(session.run(None, {session.get_inputs()[0].name: frame})[0].argmax())
"""
_MODULES = """
import json, sys
from edgesolve.device.cli import main
code = main(sys.argv[1:])
own = sorted(m for m in sys.modules if m.startswith("edgesolve.kernels"))
top = {m.partition(".")[0] for m in sys.modules} - set(sys.stdlib_module_names)
print(json.dumps({"code": code, "top": sorted(top - {"__main__"}), "kernels": own}))
"""


def cost(job: Job) -> tuple[list[Figure], dict[str, Any]]:
    """Recalibration on 512 noisy CIFAR frames, one core; the middle of three by total time."""
    figures, details = [], {}
    for name in job.names("resnet20", "resnet56"):
        title, bundle = RECIPES[name].title, job.bundle(name)
        frames = job.window("cost_512", shifted("noise", job.cifar.x[:512]))
        runs = []
        for repeat in range(job.size(3, 1)):
            say(f"recalibrate {name} on 512 frames, one core, {repeat + 1}")
            state = job.state(f"cost_{name}")
            args = ("--state", state, "--backend", "onnx", "--threads", 1)
            done = edgesolve("recalibrate", bundle, frames, *args, one_core=True)
            report = done.report
            keys = ("decision", "n", "seconds", "forward_seconds", "solve_seconds", "peak_rss_mib")
            runs.append({**{k: report.get(k) for k in keys}, "wall_s": done.wall_s})
        details[name] = runs
        r = sorted(runs, key=lambda r: r["seconds"])[len(runs) // 2]
        share, of_wall = (100 * (1 - r["forward_seconds"] / r[k]) for k in ("seconds", "wall_s"))
        what = f"{title}, recalibration, {r['n']} frames, one core"
        figures += [
            at_most(
                f"{what}: time beyond forward passes",
                share,
                20.0,
                " %",
                measured=f"{share:.1f} % of {r['seconds']:.2f} s",
                baseline=f"forward passes {r['forward_seconds']:.2f} s; of the process's wall time, "
                f"interpreter and imports included ({r['wall_s']:.2f} s): {of_wall:.1f} %",
                command=done.command,
            ),
            at_most(
                f"{what}: peak RSS",
                max(r["peak_rss_mib"] for r in runs),
                300.0,
                " MiB",
                command=done.command,
            ),
        ]
    return figures, details


def latency(job: Job) -> tuple[list[Figure], dict[str, Any]]:
    """`edgesolve bench`: batch 1, one thread, the bundle and the original alternating in fresh processes."""
    figures, details = [], {}
    for name in job.names("resnet56", "resnet20"):
        say(f"bench {name}")
        macs = _macs(job, name)
        args = ("--against", job.original(name), "--backend", "onnx", "--threads", 1)
        args += ("--state", job.state(f"bench_{name}"), *["--quick"] * job.quick)
        done = edgesolve("bench", job.bundle(name), *args)
        found, original = done.report, done.report["against"]
        skip = ("runs_ms",)
        details[name] = {k: v for k, v in found.items() if k not in skip}
        details[name]["against"] = {k: v for k, v in original.items() if k not in skip}
        ratio = found["p50_ms"] / original["p50_ms"]
        doubts = ", ".join([*found["reasons"], *found["warnings"]])
        figures.append(
            at_most(
                f"{RECIPES[name].title}, p50 at batch 1, one thread, over the original's",
                ratio,
                macs * 1.15,
                measured=f"{ratio:.3f} ({found['p50_ms']:.3f} ms; {found['verdict']}"
                f"{': ' * bool(doubts)}{doubts})",
                bar_note=f" ({macs:.3f} × 1.15)",
                baseline=f"original {original['p50_ms']:.3f} ms",
                command=done.command,
            )
        )
    return figures, details


def _macs(job: Job, name: str) -> float:
    job.bundle(name)
    macs = job.builds[name]["report"]["macs"]
    return macs["after"] / macs["before"]


def cold(job: Job) -> tuple[list[Figure], dict[str, Any]]:
    """`predict` of one PNG by a new process each time (files in the page cache), and what it imports."""
    from PIL import Image

    photo, bundle = job.out / "photo.png", job.bundle("resnet20")
    Image.fromarray(job.cifar.x[0]).save(photo)
    figures, details = [], {}
    bare = [sys.executable, "-c", _ORIGINAL, short(job.original("resnet20")), short(photo)]
    repeats = job.size(5, 2)
    details["original"] = _walls(bare, repeats)
    for backend in ("onnx", "litert"):
        say(f"predict one image, cold, {backend}")
        args = ("predict", bundle, photo, "--backend", backend, "--state", job.state("cold"))
        runs = [edgesolve(*args) for _ in range(repeats)]
        walls = [run.wall_s for run in runs]
        found = _modules([short(a) for a in args])
        details[backend] = {"wall_s": walls, **found}
        middle = statistics.median(walls)
        more = {
            "measured": f"{middle:.2f} s ({min(walls):.2f} to {max(walls):.2f})",
            "baseline": f"a bare script around the original in ONNX Runtime: "
            f"{statistics.median(details['original']):.2f} s",
            "command": runs[0].command,
        }
        what = f"ResNet-20, predict of one image, cold process, {backend}"
        bar = backend == "onnx"
        figures.append(
            at_most(what, middle, COLD_S, " s", **more) if bar else plain(what, middle, **more)
        )
        heavy = {"numba", "torch", "llvmlite"} & set(found["top"])
        figures.append(
            Figure(
                f"its imports, {backend}",
                ", ".join(found["top"]) + "; " + (", ".join(found["kernels"]) or "no kernels"),
                "neither numba, torch nor the solver",
                not heavy and not found["kernels"],
            )
        )
    return figures, details


def _walls(command: list[str], repeats: int) -> list[float]:
    walls = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        walls.append(time.perf_counter() - began)
    return walls


def _modules(args: list[str]) -> dict[str, Any]:
    """Top-level modules outside the standard library, and ours of the solver, after the command has run."""
    command = [sys.executable, "-c", _MODULES, *args]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])
