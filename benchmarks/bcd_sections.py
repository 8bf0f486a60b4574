"""Sections of the block coordinate descent benchmark: MNIST and human activity, in tensor trains."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import bcd_adam as adam
import numpy as np
from bcd_common import accuracy, parts, spread, trained
from bcd_data import Split, activity, digits
from environment import say
from figures import Figure, at_least, at_most

from edgesolve.host.bcd_problem import Problem, Settings, Train
from edgesolve.host.bcd_start import Start
from edgesolve.host.tensor_train_cores import TTCores

MNIST = (32, 1024, 1024, 10)
MNIST_MODES = {
    "as published": {2: (26, 26, 4, 4, 4, 4, 4, 2, 2, 2), 3: (4,) * 10},
    "sizes apart": {2: (4, 4, 4, 4, 4, 13, 13, 32), 3: (4,) * 10},
}
MNIST_BARS = {40: 98.2, 220: 98.4}
MNIST_SETTINGS = Settings(gamma=1.0, rho=1.0, tau=30.0, alpha=0.1, alpha_weights=30.0)
MNIST_START = Start(directions=30, labels=0.5, smooth=50.0)
ACTIVITY = {
    "4-layer": (
        (1024, 1024, 1024, 512),
        ((6, 22, 34, *(2,) * 7), (4,) * 10, (4,) * 10, (*(4,) * 9, 2)),
    ),
    "5-layer": (
        (1024, 1024, 1024, 512, 512),
        ((6, 22, 34, *(2,) * 7), (4,) * 10, (4,) * 10, (*(4,) * 9, 2), (4,) * 9),
    ),
}
ACTIVITY_SETTINGS = Settings(gamma=1.0, rho=1.0, tau=100.0, alpha=0.1, alpha_weights=1000.0)
ACTIVITY_START = Start(directions=60, labels=2.0, smooth=1e4, ridge=30.0)
Table = list[list[str]]


def by_adam(split: Split, widths: tuple[int, ...], seed: int, epochs: int) -> float:
    """Test accuracy by the better of two losses, cross-entropy and squares: chosen in Adam's favour."""
    nets = (
        adam.trained(split, widths, seed=seed, epochs=epochs, squared=squared)
        for squared in (False, True)
    )
    return max(accuracy(split, *adam.arrays(net)) for net in nets)


def mnist(bench) -> tuple[list[Figure], dict[str, Any]]:
    """6,000 images, 3x3 convolution of stride 2 with 32 filters, 5408-1024-1024-10."""
    n, n_test = bench.size(6000, 600), bench.size(10_000, 500)
    sweeps, figures, traces = bench.size(bench.sweeps or 18, 3), [], {}
    table = [
        ["modes", "rank", "seed", "numbers", "share", "runs factored", "start", "W", "shipped"]
    ]
    table[0] += ["with the output again", "sweeps", "seconds", "rises"]
    gradient = []
    for seed in bench.seeds:
        split = digits(seed, n, n_test)
        began = time.perf_counter()
        gradient.append(by_adam(split, MNIST, seed, bench.size(12, 1)))
        say(f"seed {seed}: Adam {gradient[-1]:.2f} %, {time.perf_counter() - began:.0f} s")
    for rank in bench.ranks:
        for kind in bench.modes:
            shown = []
            for seed in bench.seeds:
                split = digits(seed, n, n_test)
                formats = {i: Train(m, rank) for i, m in MNIST_MODES[kind].items()}
                problem = Problem(split.x, split.one_hot, MNIST, formats, split.positions)
                row, runs, best = trained(
                    bench, split, problem, MNIST_SETTINGS, MNIST_START, seed, sweeps
                )
                shown.append(best)
                traces |= parts(f"MNIST rank {rank}, {kind}, seed {seed}", runs)
                table.append([kind, str(rank), str(seed), *row])
                what = f"rises of L, {kind}, {rank}, seed {seed}"
                figures.append(at_most(what, int(row[-1]), 0))
            figures.append(
                at_least(
                    f"MNIST, rank {rank}, modes {kind}, {sweeps} sweeps, shipped weights",
                    float(np.mean(shown)),
                    MNIST_BARS.get(rank, 0.0),
                    baseline=f"Adam, dense, the better of two losses: {spread(gradient)}",
                    measured=spread(shown),
                )
            )
    return figures, {"tables": {"Accuracy on the test images, %": table}, "traces": traces}


def human_activity(bench) -> tuple[list[Figure], dict[str, Any]]:
    """561 features, MLPs of 4 and 5 hidden layers at rank 80, tested on people never seen."""
    split, figures, traces = activity(), [], {}
    if bench.quick:
        split = replace(split, x=split.x[::8], y=split.y[::8])
    table = [["network", "seed", "numbers", "share", "runs factored", "start", "W", "shipped"]]
    table[0] += [
        "with the output again",
        "sweeps",
        "seconds",
        "rises",
        "Adam dense",
        "Adam equal size",
    ]
    sweeps = bench.size(bench.sweeps or 12, 3)
    for name, (hidden, modes) in ACTIVITY.items():
        widths, shown, dense, equal = (*hidden, split.n_classes), [], [], []
        formats = {i: Train(m, 80) for i, m in enumerate(modes, 1)}
        for seed in bench.seeds:
            problem = Problem(split.x, split.one_hot, widths, formats)
            row, runs, best = trained(
                bench, split, problem, ACTIVITY_SETTINGS, ACTIVITY_START, seed, sweeps
            )
            end = runs[-1].state
            shown.append(best)
            size = sum(
                C.n_params if isinstance(C, TTCores) else W.size
                for C, W in zip(end.C, end.W, strict=True)
            )
            width = adam.equal_width(split.x.shape[1], len(hidden), split.n_classes, size)
            for into, w in ((dense, widths), (equal, (*(width,) * len(hidden), split.n_classes))):
                into.append(by_adam(split, w, seed, bench.size(12, 1)))
            table.append([name, str(seed), *row, f"{dense[-1]:.2f}", f"{equal[-1]:.2f} ({width})"])
            traces |= parts(f"activity {name}, seed {seed}", runs)
            figures.append(at_most(f"rises of L, {name}, seed {seed}", int(row[-1]), 0))
        figures.append(
            at_least(
                f"activity, {name}, {sweeps} sweeps, shipped weights",
                float(np.mean(shown)),
                float(np.mean(equal)),
                measured=spread(shown),
                baseline=f"Adam, the better of two losses, equal size: {spread(equal)}; dense: {spread(dense)}",
            )
        )
    return figures, {"tables": {"Accuracy on subjects 10 to 14, %": table}, "traces": traces}
