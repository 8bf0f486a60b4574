"""Counts the instructions of the inner kernels and of small solves. Runs in the emulated Python alone:

    ARM_ICOUNT=1 ICOUNT_OUT=EMPTY_FILE deploy/arm64/python -P benchmarks/count_instructions.py

prints {"versions", "counts": {name: instructions}, "iterations": {solve: number}} as JSON, each case
once with Numba and once with its NumPy twin. `instructions.py` compares them with a reference.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgesolve.kernels import accel
from edgesolve.kernels.designs import Masked, _masked_spread, _masked_sum
from edgesolve.kernels.fista import fista
from edgesolve.kernels.gated import gated_pool
from edgesolve.kernels.losses import SquaredMoments, SquaredRows
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.newton import newton
from edgesolve.kernels.penalties import GroupL2, lam_max
from edgesolve.kernels.prox import prox_group_l2
from edgesolve.kernels.solution import Solution, Status
from edgesolve.kernels.surrogate import secular
from edgesolve.kernels.variational import variational

C = 4
LAM_SHARE = 0.05
KERNEL_RUNS, SOLVE_RUNS = 12, 2
"""The smallest count is kept: the first runs compile, and specialise the interpreter's bytecode."""

NO_PROCESS = 1 << 23
"""Above every process number, so that the call that marks always fails, and always costs the same."""

Case = Callable[[], Any]


def main() -> None:
    marks = Path(os.environ.get("ICOUNT_OUT", ""))
    if "ARM_ICOUNT" not in os.environ or not marks.is_file():
        sys.exit("Nothing counts: run deploy/arm64/python, ARM_ICOUNT=1, ICOUNT_OUT an empty file.")
    names, iterations = ["nothing"], {}
    bracketed(lambda: None, KERNEL_RUNS, NO_PROCESS)
    cases = [(KERNEL_RUNS, *case) for case in kernels()]
    cases += [(SOLVE_RUNS, *case) for case in solves()]
    for twin in ("numba", "numpy"):
        choose(twin)
        for runs, name, case in cases:
            result = bracketed(case, runs, NO_PROCESS + len(names))
            names.append(f"{name}, {twin}")
            if isinstance(result, Solution):
                iterations[names[-1]] = result.n_iter
    nothing, *counts = smallest(marks.read_text())
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "numba")}
    report = {
        "versions": {**versions, "python": platform.python_version()},
        "counts": {n: c - nothing for n, c in zip(names[1:], counts, strict=True)},
        "iterations": iterations,
    }
    print(json.dumps(report, indent=2))


def choose(twin: str) -> None:
    """All that follows runs with the compiled kernels, or all without."""
    os.environ["EDGESOLVE_NUMBA"] = "1" if twin == "numba" else "0"
    accel.compiled.cache_clear()
    if (accel.compiled() is None) == (twin == "numba"):
        sys.exit("The compiled kernels are missing: no numba, or no writable NUMBA_CACHE_DIR?")


def kernels() -> list[tuple[str, Case]]:
    """Each is called through the function that chooses between the compiled kernel and its twin."""
    rng, cases = np.random.default_rng(0), []

    def add(name, function, *args):
        cases.append((name, lambda: function(*args)))

    for dtype in (np.float32, np.float64):
        kind, D = np.dtype(dtype).name, rng.random((256, 64)) < 0.5
        z = normal(rng, (128, 8, 16), dtype)
        add(f"gated_pool {kind}", gated_pool, z, D.reshape(z.shape))
        for c in (1, C):
            R, wide = normal(rng, (256, c), dtype), normal(rng, (256, 64 * c), dtype)
            add(f"masked_sum {kind} c={c}", _masked_sum, wide, D, np.empty_like(R))
            add(f"masked_spread {kind} c={c}", _masked_spread, R, D, np.empty_like(wide))
    V, starts = normal(rng, (2048, C)), np.arange(65) * 32
    # About half of the groups, of norm sqrt(32 C), are switched off.
    add("prox_group_l2 float64", prox_group_l2, V, starts, np.sqrt(32.0 * C), np.empty_like(V))
    add("secular float64", secular, *rng.random((2, 64, 16)), rng.random(64))
    return cases


def solves() -> list[tuple[str, Case]]:
    rng = np.random.default_rng(1)
    x, t = normal(rng, (64, 200), np.float32), normal(rng, (64, C), np.float32)
    design, targets = problem(rng, n=300, d=16, m=12)
    pooled = gated_pool(design.X[:, None], design.D[:, None])
    moments = SquaredMoments.of(Moments.of(pooled, targets), 1e-3)
    rows = SquaredRows.of(*problem(rng, n=200, d=16, m=16), 1e-3)
    few = SquaredRows.of(*problem(rng, n=40, d=32, m=16), 1e-3)

    def solve(solver, loss, d, expected=Status.CONVERGED, **options):
        starts = np.arange(0, loss.shape[0] + 1, d)
        penalty = GroupL2(LAM_SHARE * lam_max(loss, GroupL2(0.0, starts)), starts)
        return lambda: ended(expected, solver(loss, penalty, **options))

    fifty = solve(fista, moments, 16, Status.MAX_ITER, tol=0.0, max_iter=50)
    return [
        ("Moments.of 64 x 200", lambda: Moments.of(x, t)),
        ("newton, moments, D=192", solve(newton, moments, 16)),
        ("newton, rows, n=200", solve(newton, rows, 16)),
        ("variational, n=40", solve(variational, few, 32)),
        ("fista, 50 steps, D=192", fifty),
    ]


def problem(rng, n: int, d: int, m: int) -> tuple[Masked, np.ndarray]:
    """A design, and C targets that a quarter of its gates explain, with noise."""
    X, G = normal(rng, (n, d)), normal(rng, (d, m))
    design, U = Masked(X, X @ G >= 0), np.zeros((m * d, C))
    U[: m // 4 * d] = normal(rng, (m // 4 * d, C))
    return design, design.forward(U) + normal(rng, (n, C))


def normal(rng, shape, dtype=np.float64):
    return rng.standard_normal(shape).astype(dtype)


def ended(expected: Status, found: Solution) -> Solution:
    if found.status is not expected:
        sys.exit(
            f"A solve ended {found.status.name} and not {expected.name}: {found.n_iter} steps."
        )
    return found


def bracketed(case: Case, runs: int, tag: int) -> Any:
    """What the case returns; every run lies between two marks of that tag."""
    for _ in range(runs):
        gc.collect()
        gc.disable()
        mark(tag)
        result = case()
        mark(tag)
        gc.enable()
    return result


def mark(tag: int) -> None:
    try:
        os.getpriority(os.PRIO_PROCESS, tag)
    except OSError:
        pass


def smallest(text: str) -> list[int]:
    """By rising tag, the fewest instructions between a first mark and the next one of its tag."""
    at: dict[int, list[int]] = {}
    for line in text.splitlines():
        word, *numbers = line.split()
        if word == "mark" and int(numbers[0]) >= NO_PROCESS:
            at.setdefault(int(numbers[0]), []).append(int(numbers[1]))
    return [min(b - a for a, b in zip(n[::2], n[1::2], strict=True)) for _, n in sorted(at.items())]


if __name__ == "__main__":
    main()
