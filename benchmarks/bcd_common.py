"""What the sections of the block coordinate descent benchmark share: a run in three parts, and its accuracy."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
from bcd_data import Split
from environment import say

from edgesolve.host import bcd_problem as bcd
from edgesolve.host.bcd_problem import Problem, Settings, State, shipped
from edgesolve.host.bcd_run import Budget, Certify, Run, train
from edgesolve.host.bcd_start import closed_form, output_again
from edgesolve.host.tensor_train_cores import TTCores


def accuracy(split: Split, weights, biases) -> float:
    """Per cent of the test side that the network gets right."""
    step, right = 500 * split.positions, 0
    for k in range(0, len(split.x_test), step):
        out = bcd.forward(split.x_test[k : k + step], split.positions, weights, biases)
        at = k // split.positions
        right += int(np.sum(out.argmax(axis=1) == split.y_test[at : at + len(out)]))
    return 100.0 * right / len(split.y_test)


def staged(
    problem: Problem, settings: Settings, state: State, sweeps: int, bench, tell=None
) -> list[Run]:
    """`sweeps` in three parts, of tau, 3 tau and 9 tau: each is a run of its own objective."""
    runs, parts = [], 3
    for part in range(parts):
        now = replace(settings, tau=settings.tau * 3.0**part)
        budget = Budget(sweeps * (part + 1) // parts)
        runs.append(train(problem, now, state, budget, certify=certified(bench), progress=tell))
        state = runs[-1].state
    return runs


def trained(bench, split, problem, settings, how, seed, sweeps):
    """Start and train; the cells of a table row, the runs, and the accuracy as shipped."""
    began = time.perf_counter()
    state = closed_form(problem, settings, how, seed=seed)
    start = accuracy(split, state.W, state.b)

    def tell(row, at):
        if row["sweep"] % 5 == 0:
            now = [accuracy(split, w, at.b) for w in (at.W, shipped(at))]
            say(
                f"  {row['sweep']}: L {row['objective']:.2f}, W {now[0]:.2f} %, shipped {now[1]:.2f} %"
            )

    runs = staged(problem, settings, state, sweeps, bench, tell)
    seconds, end = time.perf_counter() - began, runs[-1].state
    found = [accuracy(split, end.W, end.b), accuracy(split, shipped(end), end.b)]
    found.append(accuracy(split, *output_again(problem, shipped(end), end.b, how.ridge)))
    held = [(W, C) for W, C in zip(end.W, end.C, strict=True) if C is not None]
    numbers, dense = sum(C.n_params for _, C in held), sum(W.size for W, _ in held)
    apart = sum(_runs_factored(C) for _, C in held)
    cells = [f"{numbers:,}", f"{numbers / dense:.2%}", f"{apart} of {len(held)}"]
    cells += [f"{v:.2f}" for v in (start, *found)]
    cells += [str(sweeps), f"{seconds:.0f}", str(sum(r.trace.rises for r in runs))]
    say(f"{cells}")
    return cells, runs, found[1]


def _runs_factored(train_: TTCores) -> bool:
    return train_.shape[0] in np.cumprod(train_.modes)


def parts(name, runs):
    return {f"{name}, part {k}": run.trace.rows for k, run in enumerate(runs, 1)}


def certified(bench) -> Certify:
    return Certify(gradient_every=bench.gradient_every)


def short_row(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "blocks"}


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.2f} % ± {np.std(values):.2f} ({len(values)})"
