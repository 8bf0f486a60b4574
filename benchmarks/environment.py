"""What every benchmark row must carry: the commit and the machine; and how `edgesolve` is called."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesolve.device import board

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Ran:
    """One command: what it printed, wall seconds from start to end of the process, and how to repeat it."""

    report: dict[str, Any]
    wall_s: float
    command: str


def environment(threads: int) -> dict[str, Any]:
    """Commit (with `-dirty`), time, machine and versions; `threads` of the in-process evaluations."""
    found = board.environment(threads=threads)
    found["packages"] |= {name: board.version(name) for name in ("torch", "litert-torch", "onnx")}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"commit": commit(), "time": now, **found}


def commit() -> str:
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--", "host", "device", "kernels", "benchmarks")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("-dirty" if changed else "")


def edgesolve(*args: Any, one_core: bool = False, quiet: bool = True) -> Ran:
    """Run the installed command with --json, from the repository's root, its numerics on one thread.

    `one_core` pins it to a single core as well. Ends the benchmark with the command's own sentence where it fails.
    """
    script = Path(sys.executable).with_name("edgesolve")
    words = [short(a) for a in args]
    pin = ["taskset", "-c", "0"] if one_core else []
    variables = {} if words[0] == "build" else ONE_THREAD
    began = time.perf_counter()
    done = subprocess.run(
        [*pin, str(script), *words, "--json"],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
    )
    wall_s = time.perf_counter() - began
    shown = " ".join([*(f"{k}=1" for k in variables if one_core), *pin, "edgesolve"])
    shown = f"{shown} {shlex.join(words)}"
    if done.returncode:
        raise SystemExit(f"{shown}\nended with {done.returncode}: {done.stdout}{done.stderr or ''}")
    return Ran(json.loads(done.stdout), wall_s, shown)


def short(path: Any) -> str:
    """A path as it reads from the repository's root, where it lies in or beside it; other words as they are."""
    if not isinstance(path, Path):
        return str(path)
    inside = path.is_relative_to(ROOT.parent)
    return os.path.relpath(path, ROOT) if inside else str(path)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
