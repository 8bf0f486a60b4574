"""Sections of the block coordinate descent benchmark: pruning, and the published steps beside ours."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import bcd_adam as adam
import numpy as np
from bcd_common import accuracy, parts, short_row, spread, staged
from bcd_data import digits
from environment import say
from figures import Figure, at_least, at_most, plain

from edgesolve.host import bcd_problem as bcd
from edgesolve.host.bcd_problem import Problem, Settings, Sparse, State, Train, shipped
from edgesolve.host.bcd_run import Budget, Certify, train
from edgesolve.host.bcd_start import output_again

LENET = (300, 100, 10)
PRUNE_SETTINGS = Settings(gamma=1.0, rho=1.0, tau=100.0, alpha=1.0, alpha_weights=3.0)


def prune(bench) -> tuple[list[Figure], dict[str, Any]]:
    """LeNet-300-100 on MNIST, the output dense: pruned against its own outputs, without labels."""
    n, n_test, figures, traces = bench.size(6000, 1000), bench.size(10_000, 500), [], {}
    table = [
        ["sparsity", "seed", "dense", "magnitude", "and its output again", "and Adam, 2 epochs"]
    ]
    table[0] += ["shipped", "with the output again", "sweeps", "seconds", "rises"]
    for sparsity in (0.9, 0.95, 0.98):
        ours, cut = [], []
        for seed in bench.seeds:
            split = digits(seed, n, n_test, flat=True)
            net = adam.trained(split, LENET, seed=seed, epochs=bench.size(12, 1))
            weights, biases = adam.arrays(net)
            keep = {i: Sparse(round((1 - sparsity) * weights[i - 1].size)) for i in (1, 2)}
            teacher = bcd.forward(split.x, 1, weights, biases)
            problem = Problem(split.x, teacher, LENET, keep)
            state = bcd.at(problem, PRUNE_SETTINGS, weights, biases)
            thin = shipped(state)
            sweeps, began = bench.size(bench.sweeps or 90, 6), time.perf_counter()
            runs = staged(problem, PRUNE_SETTINGS, state, sweeps, bench)
            seconds, rises = time.perf_counter() - began, sum(r.trace.rises for r in runs)
            end = runs[-1].state
            masks = [None if i == 2 else (w != 0).astype(np.float32) for i, w in enumerate(thin)]
            for layer, w in zip(net.maps, thin, strict=True):
                layer.weight.data[:] = adam.torch.from_numpy(w)
            tuned = adam.trained(split, LENET, seed=seed, epochs=2, net=net, masks=masks, rate=3e-4)
            magnitude = accuracy(split, thin, biases)
            refit = accuracy(split, *output_again(problem, thin, biases, 1.0))
            found = accuracy(split, shipped(end), end.b)
            again = output_again(problem, shipped(end), end.b, 1.0)
            ours.append(found)
            cut.append(magnitude)
            rows = [accuracy(split, weights, biases), magnitude, refit]
            rows += [accuracy(split, *adam.arrays(tuned)), found, accuracy(split, *again)]
            table.append([f"{sparsity:.0%}", str(seed), *(f"{v:.2f}" for v in rows)])
            table[-1] += [str(sweeps), f"{seconds:.0f}", str(rises)]
            figures.append(at_most(f"rises of L, {sparsity:.0%} pruned, seed {seed}", rises, 0, ""))
            traces |= parts(f"pruning {sparsity:.0%}, seed {seed}", runs)
            say(f"{table[-1]}")
        what, bar = f"LeNet-300-100, {sparsity:.0%} pruned", float(np.mean(cut)) + 0.5
        shown = {"measured": spread(ours), "baseline": f"magnitude: {spread(cut)}"}
        figures.append(at_least(what, float(np.mean(ours)), bar, **shown))
    return figures, {"tables": {"Accuracy on the test images, %": table}, "traces": traces}


def published(bench) -> tuple[list[Figure], dict[str, Any]]:
    """The authors' steps beside ours from the same start: every block watched, the logged loss too."""
    figures, traces, n = [], {}, bench.size(600, 200)
    table = [["task", "steps", "precision", "sweeps", "rises of L", "of the logged loss"]]
    table[0] += ["blocks that rose", "below their constant", "last L", "last ||W - C||² term"]
    split, flat = digits(0, n, 200), digits(0, n, 200, flat=True)
    trains = {i: Train(m, 20) for i, m in ((2, (4,) * 4 + (13, 13, 4)), (3, (4,) * 8))}
    tasks = {
        "trains": (split, (4, 256, 256, 10), trains, Settings(tau=0.1)),
        "pruned": (
            flat,
            (300, 100, 10),
            {1: Sparse(23_520), 2: Sparse(3_000)},
            Settings(100, 1, 200),
        ),
    }
    for task, (data, widths, formats, base) in tasks.items():
        for dtype in ("float64", "float32"):
            problem = Problem(data.x, data.one_hot, widths, formats, data.positions)
            problem = replace(problem, x=problem.x.astype(dtype), y=problem.y.astype(dtype))
            for theirs in (False, True):
                settings = replace(base, dtype=dtype, published=theirs)
                state = random_start(problem, settings)
                run = train(
                    problem, settings, state, Budget(bench.size(bench.sweeps or 200, 10)),
                    certify=Certify(blocks=True, gradient_every=1),
                )  # fmt: skip
                t, last = run.trace, run.trace.rows[-1]
                kind = "published" if theirs else "ours"
                table.append(
                    [task, kind, dtype, str(last["sweep"]), str(t.rises), str(t.logged_rises)]
                )
                table[-1] += [str(t.block_rises), str(t.violations), f"{last['objective']:.4g}"]
                table[-1] += [f"{last['objective_formats']:.2e}"]
                traces[f"{task}, {kind}, {dtype}"] = [short_row(r) for r in t.rows]
                if not theirs:
                    what = f"{task}, {dtype}: rises of L, of a block, below a constant"
                    count = t.rises + t.block_rises + t.violations
                    figures.append(at_most(what, count, 0))
                else:
                    figures.append(plain(f"{task}, {dtype}: rises of L, published", t.rises, ""))
    return figures, {"tables": {"Rises over all sweeps": table}, "traces": traces}


def random_start(problem: Problem, settings: Settings) -> State:
    """He's normal weights, biases 0: what the published runs start from."""
    rng = np.random.default_rng(0)
    shapes = [problem.shape(i) for i in range(1, problem.n_layers + 1)]
    weights = [rng.standard_normal(s) * np.sqrt(2.0 / s[1]) for s in shapes]
    return bcd.at(problem, settings, weights, [np.zeros(s[0]) for s in shapes])
