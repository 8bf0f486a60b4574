"""Section sizes: time and peak memory from D = 1e3 to 1e5 weights and n = 1e2 to 1e6 rows, against the formula.

Rows are drawn from a fixed seed; beyond D = 1e3 the solve sees all rows, held in memory, and its own memory is
what is measured. At D = 1e3 the rows stream through `Moments`, four thousand at a time, and nothing else is held.
Each size runs in a process of its own, on one thread; memory is tracemalloc's peak from before the solve.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import tracemalloc
from typing import Any

import numpy as np
from environment import ONE_THREAD, ROOT, say
from figures import Figure, at_most

CHUNK = 4096
STREAMED, HELD = (50, 20), ((200, 50), (200, 500))  # (m, d)
SIZES = [
    *(("moments", *STREAMED, n) for n in (100, 1000, 10_000, 100_000, 1_000_000)),
    *(("rows", *HELD[0], n) for n in (100, 1000, 10_000, 100_000)),
    *(("rows", *HELD[1], n) for n in (100, 1000, 10_000)),
]
QUICK = 10_000
"""Rows that a --quick run stops at."""


def sizes(bench) -> tuple[list[Figure], dict[str, Any]]:
    """Time and memory of every size; memory beside the data must stay within the stated formula."""
    found = []
    for kind, m, d, n in SIZES:
        if bench.quick and n > QUICK:
            continue
        say(f"sizes: {kind}, D = {m * d:,}, n = {n:,}")
        command = [sys.executable, __file__, kind, str(m), str(d), str(n)]
        env = {**os.environ, **ONE_THREAD}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"sizes, {kind} {m} {d} {n}: {done.stderr.strip()[-400:]}")
        found.append(json.loads(done.stdout))
    header = ["from", "D", "n", "rows s", "solve s", "rounds", "gap", "peak MiB", "formula MiB"]
    shown = ("{kind}", "{D:,}", "{n:,}", "{rows_s:.2f}", "{solve_s:.2f}", "{n_iter}", "{gap:.0e}")
    shown += ("{peak_mib:.1f}", "{formula_mib:.1f}")
    rows = [[cell.format(**f) for cell in shown] for f in found]
    streamed = [f for f in found if f["kind"] == "moments" and f["n"] >= CHUNK]
    figures = [
        at_most(
            "peak memory over its formula, worst size",
            max(f["peak_mib"] / f["formula_mib"] for f in found),
            1.0,
            "×",
        ),
        at_most(
            f"memory of n = {streamed[-1]['n']:,} streamed rows over that of {streamed[0]['n']:,}",
            streamed[-1]["peak_mib"] / streamed[0]["peak_mib"],
            1.1,
            "×",
            baseline=f"{streamed[0]['peak_mib']:.1f} MiB",
        ),
        at_most("largest certified gap", max(f["gap"] for f in found), 1e-6),
    ]
    draw(found, bench.out / "solver_sizes.png")
    return figures, {"tables": {"sizes, c = 10, 0.05 lam_max": [header, *rows]}, "sizes": found}


def draw(found: list[dict], path) -> None:
    """Seconds and MiB against n, a line for each D."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for D in sorted({f["D"] for f in found}):
        line = [f for f in found if f["D"] == D]
        n = [f["n"] for f in line]
        shown = axes[0].loglog(
            n, [f["rows_s"] + f["solve_s"] for f in line], "o-", label=f"D = {D:,}"
        )
        axes[1].loglog(n, [f["peak_mib"] for f in line], "o-", color=shown[0].get_color())
        axes[1].loglog(n, [f["formula_mib"] for f in line], ":", color=shown[0].get_color())
    axes[0].set(xlabel="rows n", ylabel="seconds, rows and solve", title="time, one thread")
    axes[1].set(xlabel="rows n", ylabel="MiB beside the data", title="peak memory; dotted: formula")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _chunks(m, d, n):
    """(X, D, Y) of up to CHUNK rows, the same whatever n is."""
    rng = np.random.default_rng(0)
    mix, G, top = (rng.standard_normal(s) / math.sqrt(d) for s in ((d, d), (d, m), (d, 10)))
    for start in range(0, n, CHUNK):
        draws = np.random.default_rng([1, start // CHUNK]).standard_normal((CHUNK, d))
        X = (draws @ mix + draws)[: n - start]
        noise = np.random.default_rng([2, start // CHUNK]).standard_normal((CHUNK, 10))
        Y = np.maximum(X @ top, 0.0) + 0.1 * noise[: len(X)]
        yield X.astype(np.float32), X @ G >= 0, Y


def _worker(kind, m, d, n):
    from edgesolve.kernels.designs import Masked
    from edgesolve.kernels.losses import SquaredMoments, SquaredRows
    from edgesolve.kernels.moments import Moments
    from edgesolve.kernels.peak import peak_mib
    from edgesolve.kernels.penalties import GroupL2, lam_max
    from edgesolve.kernels.solve import able, solve
    from edgesolve.kernels.warm import warm

    warm()
    penalty = GroupL2(1.0, np.arange(m + 1) * d)
    began = time.perf_counter()
    if kind == "moments":
        tracemalloc.start()
        total = Moments.zeros(m * d, 10)
        for X, D, Y in _chunks(m, d, n):
            total = total + Moments.of((D[:, :, None] * X[:, None]).reshape(len(X), -1), Y)
        loss = SquaredMoments.of(total, 0.0)
        # One chunk, its gated rows, their copies, and the sums.
        held = 8 * (2.5 * min(n, CHUNK) * m * d + 6 * (m * d) ** 2) / 2**20
    else:
        X, D, Y = (np.concatenate(part) for part in zip(*_chunks(m, d, n), strict=True))
        loss, held = SquaredRows.of(Masked(X, D), Y, 0.0), 0.0
        del X, D, Y
        tracemalloc.start()
    rows_s = time.perf_counter() - began
    lam = 0.05 * lam_max(loss, penalty)
    base = tracemalloc.get_traced_memory()[0] if kind == "rows" else 0
    found = solve(loss, GroupL2(lam, penalty.starts))
    peak = (tracemalloc.get_traced_memory()[1] - base) / 2**20
    method = able(loss, penalty)[0]
    return {
        "kind": kind,
        "D": m * d,
        "n": n,
        "rows_s": rows_s,
        "solve_s": found.seconds,
        "n_iter": found.n_iter,
        "gap": found.relative_gap,
        "peak_mib": peak,
        "formula_mib": peak_mib(loss, method) + held,
    }


if __name__ == "__main__":
    kind, *numbers = sys.argv[1:]
    print(json.dumps(_worker(kind, *map(int, numbers))))
