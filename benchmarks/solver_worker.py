"""One solver on one problem, in a process of its own: a JSON line per run, judged by the referee.

    python benchmarks/solver_worker.py problem.npz adelie 1e-6,1e-7 --cap-s 60

What compiles is compiled on a tiny problem first. A run that needs more CPU seconds than the cap ends the
process with SIGPROF: no Python code could interrupt a C++ solver. It imports the solver under test and no other.
"""

from __future__ import annotations

import argparse
import json
import signal
from importlib import metadata
from pathlib import Path

from solver_clock import Clock, Skip
from solver_problems import Problem, problem
from solver_referee import judge
from solvers import SOLVERS


def main() -> None:
    args = _arguments()
    solver, task = SOLVERS[args.solver], Problem.load(args.problem)
    try:
        _emit(version=metadata.version(solver.package))
        _warm_up(solver, task, args.levels[0])
        for level in args.levels:
            if _runs(solver, task, level, args) <= args.enough:
                break
    except (ImportError, metadata.PackageNotFoundError) as missing:
        _emit(skip=f"not installed: {missing}")
    except (Skip, MemoryError) as reason:
        _emit(skip=str(reason) or "out of memory")


def _warm_up(solver, task, level):
    outputs = min(task.shape[2], 3)
    tiny = problem("tiny", 0.1, Path(), outputs=outputs, by_output=task.by_output)
    solver.run(tiny, level, Clock())


def _runs(solver, task, level, args) -> float:
    """All repeats at one level; the relative gap of the last."""
    for _ in range(args.repeats):
        clock = Clock()
        signal.setitimer(signal.ITIMER_PROF, args.cap_s)
        found = solver.run(task, level, clock)
        signal.setitimer(signal.ITIMER_PROF, 0)
        weights, dual = found if isinstance(found, tuple) else (found, None)
        seen = judge(task, weights, dual)
        figures = {"objective": seen.objective, "gap": seen.gap}
        _emit(level=level, cpu_s=clock.cpu_s, wall_s=clock.wall_s, **figures)
        if clock.cpu_s > args.fast_s:
            break
    return seen.relative_gap


def _emit(**found) -> None:
    print(json.dumps(found), flush=True)


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("problem", type=Path)
    p.add_argument("solver", choices=SOLVERS)
    p.add_argument("levels", type=lambda text: [float(x) for x in text.split(",")])
    p.add_argument("--repeats", type=int, default=1)
    p.add_argument("--cap-s", type=float, default=60.0)
    p.add_argument("--fast-s", type=float, default=1.0, help="longer runs are not repeated")
    p.add_argument("--enough", type=float, default=5e-7, help="relative gap that ends the ladder")
    return p.parse_args()


if __name__ == "__main__":
    main()
