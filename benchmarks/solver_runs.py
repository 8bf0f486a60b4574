"""Runs solvers on problems, each pair in its own single-threaded process of the peers' environment, and reads
off the time to an accuracy.

First every solver goes down its tolerances once; the best objective and the highest dual bound of all of them
bracket the optimum. Then each is repeated at the loosest tolerances that reached an accuracy and half a step
before, so that nobody is charged for a coarse ladder. CPU seconds decide: the machine may be shared.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from environment import ONE_THREAD, ROOT, say
from solver_problems import activations, problem
from solvers import OURS, SOLVERS

PYTHON = ROOT / ".venv-peers" / "bin" / "python"
ERRORS = {"error 1e-3": 1e-3, "error 1e-6": 1e-6}
GAPS = {"gap 1e-4": 1e-4, "gap 1e-6": 1e-6}
GOAL = "error 1e-6"
ENOUGH = (5e-7, 1e-10)
"""Relative gap that ends a ladder: the peers', and ours, which brackets the optimum."""
FAST_S = 1.0
"""A run shorter than this is repeated."""


@dataclass(frozen=True, slots=True)
class Bench:
    """quick : problems a quarter as large. cap_s : CPU seconds of one run. reuse : keep the peers' earlier runs."""

    out: Path
    quick: bool
    reuse: bool
    repeats: int
    cap_s: float

    def features(self) -> Path:
        """The file of ResNet-20 activations that problems are cut from; made if it isn't there."""
        return activations(self.out / "solver_features.npz")

    def problem(self, name: str, ratio: float, **more) -> Path:
        """The file that holds a problem."""
        kind = "-".join(f"{key}{value:d}" for key, value in more.items())
        path = self.out / "solver_problems" / f"{name}-{ratio}{kind and '-' + kind}.npz"
        cache = self.out / "solver_features.npz"
        return problem(name, ratio, cache, shrink=4 if self.quick else 1, **more).save(path)


@dataclass(slots=True)
class Measured:
    """One solver on one problem. `runs`: level, cpu_s, wall_s, objective, gap. `note`: why they end early."""

    solver: str
    version: str = ""
    note: str = ""
    runs: list[dict] = field(default_factory=list)

    def points(self) -> list[dict]:
        """One row per level, its times the median of the repeats, fastest first."""
        by_level = defaultdict(list)
        for run in self.runs:
            by_level[run["level"]].append(run)
        rows = [
            {**runs[-1]} | {k: statistics.median(r[k] for r in runs) for k in ("cpu_s", "wall_s")}
            for runs in by_level.values()
        ]
        return sorted(rows, key=lambda row: row["cpu_s"])

    def first(self, goal: str, best: float) -> dict | None:
        """The fastest point that reached `goal`, a key of ERRORS or GAPS."""
        return next((row for row in self.points() if reached(row, goal, best)), None)

    def seconds(self, goal: str, best: float) -> float | None:
        row = self.first(goal, best)
        return row and row["cpu_s"]


def reached(row: dict, goal: str, best: float) -> bool:
    if goal in ERRORS:
        return row["objective"] - best <= ERRORS[goal] * best
    return row["gap"] <= GAPS[goal] * row["objective"]


def compare(bench: Bench, path: Path, solvers: list[str], turn: int = 0) -> dict[str, Measured]:
    """Every solver on the problem at `path`; `turn` rotates their order."""
    order = [solvers[(i + turn) % len(solvers)] for i in range(len(solvers))]
    kept = _kept(bench, path)
    found = {name: kept.get(name) or measure(bench, path, name) for name in order}
    best = optimum(found)[0]
    for name in order:
        if name not in kept:
            _refine(bench, path, found[name], best)
            _keep(bench, path, found[name])
    return {name: found[name] for name in solvers}


def optimum(found: dict[str, Measured]) -> tuple[float, float]:
    """The lowest objective and the highest dual bound of all runs: P* lies between."""
    runs = [run for measured in found.values() for run in measured.runs]
    lowest = min((run["objective"] for run in runs), default=float("nan"))
    highest = max((run["objective"] - run["gap"] for run in runs), default=float("nan"))
    return lowest, highest


def measure(bench: Bench, path: Path, name: str, levels=None, repeats: int = 1) -> Measured:
    """One process: `name` at its levels, loosest first, until the cap."""
    words = [path, name, ",".join(f"{x:.3g}" for x in levels or SOLVERS[name].levels)]
    words += ["--repeats", repeats, "--cap-s", bench.cap_s, "--fast-s", FAST_S]
    words += ["--enough", 0 if levels else ENOUGH[name == OURS]]
    core = max(os.sched_getaffinity(0))
    done = subprocess.run(
        ["taskset", "-c", str(core), PYTHON, ROOT / "benchmarks" / "solver_worker.py"]
        + [str(word) for word in words],
        env={**os.environ, **ONE_THREAD, "NUMBA_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )
    measured = Measured(name)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            said = json.loads(line)
            measured.version = said.get("version", measured.version)
            measured.note = said.get("skip", measured.note)
            if "level" in said:
                measured.runs.append(said)
    if done.returncode < 0:
        measured.note = f"stopped after {bench.cap_s:.0f} s"
    elif done.returncode:
        measured.note = (done.stderr.strip().splitlines() or ["failed"])[-1]
    last = measured.points()[-1:]
    shown = [f"{row['cpu_s']:.2f} s, gap {row['gap'] / row['objective']:.0e}" for row in last]
    say(f"   {path.stem} {name}: {len(measured.runs)} runs {'; '.join([*shown, measured.note])}")
    return measured


def _refine(bench: Bench, path: Path, measured: Measured, best: float) -> None:
    """Repeat where an accuracy was reached, and half a step looser; what takes seconds is not run again."""
    reach = [row for goal in (*ERRORS, *GAPS) if (row := measured.first(goal, best)) is not None]
    halves = {SOLVERS[measured.solver].between(row["level"]) for row in reach}
    levels = sorted(halves | {row["level"] for row in reach if row["cpu_s"] < FAST_S})
    if levels:
        again = measure(bench, path, measured.solver, levels[::-1], bench.repeats)
        # The first pass also paged things in: where a level was repeated, the repeats count.
        repeated = {run["level"] for run in again.runs}
        measured.runs = [r for r in measured.runs if r["level"] not in repeated] + again.runs


def _record(bench: Bench) -> Path:
    return bench.out / "solver_peers.json"


def _key(bench: Bench, path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return f"{path.stem} {digest} cap {bench.cap_s:g}"


def _kept(bench: Bench, path: Path) -> dict[str, Measured]:
    """The peers' runs on this very problem in an earlier call, where their versions are unchanged."""
    record = _record(bench)
    if not (bench.reuse and record.is_file()):
        return {}
    rows = json.loads(record.read_text()).get(_key(bench, path), [])
    return {r["solver"]: Measured(**r) for r in rows if r["version"] == _version(r["solver"])}


def _keep(bench: Bench, path: Path, measured: Measured) -> None:
    """Put a peer's runs into the record; ours are always made again."""
    if measured.solver == OURS:
        return
    record = _record(bench)
    kept = json.loads(record.read_text()) if record.is_file() else {}
    rows = [r for r in kept.get(_key(bench, path), []) if r["solver"] != measured.solver]
    row = {name: getattr(measured, name) for name in Measured.__slots__}
    record.write_text(json.dumps({**kept, _key(bench, path): [*rows, row]}) + "\n")


def _version(name: str) -> str:
    code = f"from importlib.metadata import version; print(version({SOLVERS[name].package!r}))"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True)
    return done.stdout.strip()


if not PYTHON.is_file():
    sys.exit(f"{PYTHON}: no such file. Run `make bench-solvers`, which creates it.")
