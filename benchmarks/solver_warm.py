"""Section warm: a head that has seen 64 more rows, from its last optimum against from scratch.

Rows are the gated features of 12,000 CIFAR-10 training images before ResNet-20's last block, 8 gates of 128
inputs, D = 1024, targets the network's ten logits. From scratch: moments of all rows and a cold solve; warm: moments
of 64 rows, one addition and a warm solve. Both to a certified gap of 1e-6, in this process, on one thread.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import ONE_THREAD, ROOT, say
from figures import Figure, at_least, at_most

GATES, NEW, REPEATS = 8, 64, 5
RATIOS = (0.1, 0.01)


def warm(bench) -> tuple[list[Figure], dict[str, Any]]:
    """How many times as fast, and that both find the same optimum."""
    cache = bench.features()
    figures, rows = [], []
    for ratio in RATIOS:
        say(f"warm: {ratio} lam_max")
        command = [sys.executable, __file__, str(cache), str(ratio)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"warm, {ratio}: {done.stderr.strip()[-400:]}")
        f = json.loads(done.stdout)
        title = f"{NEW} new rows of {f['n']:,}, D = {f['D']:,}, c = 10, {ratio} lam_max"
        figures.append(
            at_least(
                f"{title}: warm, times as fast",
                f["scratch_s"] / f["warm_s"],
                10.0,
                "×",
                baseline=f"from scratch {f['scratch_s']:.3g} s, warm {f['warm_s']:.3g} s",
            )
        )
        figures.append(at_most(f"{title}: objectives differ by", f["objectives_differ"], 1e-6))
        rows.append(
            [f"{ratio}", *(f"{f[k]:.3f}" for k in ("rows_s", "cold_s", "add_s", "solve_s"))]
        )
    header = ["lam/lam_max", "moments s", "cold solve s", "add 64 rows s", "warm solve s"]
    return figures, {"tables": {"warm re-solve, medians": [header, *rows]}}


def _worker(cache: Path, ratio: float) -> dict[str, Any]:
    from solver_problems import gates, standardised

    from edgesolve.kernels.losses import SquaredMoments
    from edgesolve.kernels.moments import Moments
    from edgesolve.kernels.online import Online
    from edgesolve.kernels.penalties import GroupL2, lam_max

    with np.load(cache) as archive:
        X, Y = standardised(archive["features_x"]), archive["features_y"].astype(np.float64)
    _, D = gates(X, GATES)
    A = (D[:, :, None] * X[:, None]).reshape(len(X), -1)
    starts = np.arange(GATES + 1) * X.shape[1]
    before = Online(Moments.of(A[:-NEW], Y[:-NEW]))
    top = lam_max(SquaredMoments.of(before.moments, 0.0), GroupL2(1.0, starts))
    penalty = GroupL2(ratio * top, starts)
    before, _ = before.solve(penalty)
    spent = {name: [] for name in ("rows_s", "cold_s", "add_s", "solve_s")}
    for _ in range(REPEATS):
        t0 = time.perf_counter()
        fresh = Online(Moments.of(A, Y))
        t1 = time.perf_counter()
        _, cold = fresh.solve(penalty)
        t2 = time.perf_counter()
        grown = before.add(A[-NEW:], Y[-NEW:])
        t3 = time.perf_counter()
        _, warm = grown.solve(penalty)
        t4 = time.perf_counter()
        for name, seconds in zip(spent, np.diff([t0, t1, t2, t3, t4]), strict=True):
            spent[name].append(float(seconds))
    medians = {name: statistics.median(values) for name, values in spent.items()}
    return {
        **medians,
        "n": len(A),
        "D": A.shape[1],
        "scratch_s": medians["rows_s"] + medians["cold_s"],
        "warm_s": medians["add_s"] + medians["solve_s"],
        "objectives_differ": abs(warm.objective / cold.objective - 1.0),
        "gap": warm.relative_gap,
    }


if __name__ == "__main__":
    print(json.dumps(_worker(Path(sys.argv[1]), float(sys.argv[2]))))
