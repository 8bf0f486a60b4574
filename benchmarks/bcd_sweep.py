"""How fast a sweep of the MNIST network is against the matrix products of this machine, in the same run."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from bcd_data import digits
from bcd_sections import MNIST, MNIST_MODES, MNIST_SETTINGS
from environment import say
from figures import Figure, at_least, plain

from edgesolve.host.bcd import sweep
from edgesolve.host.bcd_objective import objective
from edgesolve.host.bcd_problem import Problem, Train
from edgesolve.host.bcd_start import closed_form


def sweep_time(bench) -> tuple[list[Figure], dict[str, Any]]:
    """Median of five sweeps, with the products' rate measured before and after each."""
    table = [["modes", "rank", "n", "sweep, s", "objective, s", "flop", "Gflop/s", "GEMM Gflop/s"]]
    figures = []
    split = digits(0, bench.size(6000, 600), 10)
    for rank in bench.ranks:
        formats = {i: Train(m, rank) for i, m in MNIST_MODES["as published"].items()}
        problem = Problem(split.x, split.one_hot, MNIST, formats, split.positions)
        state, cache, seconds, rates = closed_form(problem, MNIST_SETTINGS, seed=0), {}, [], []
        state = sweep(problem, MNIST_SETTINGS, state, cache)
        for _ in range(bench.size(5, 1)):
            rates.append(gemm_rate())
            began = time.perf_counter()
            state = sweep(problem, MNIST_SETTINGS, state, cache)
            seconds.append(time.perf_counter() - began)
            say(f"  {seconds[-1]:.2f} s, GEMM {rates[-1] / 1e9:.1f} Gflop/s")
        began = time.perf_counter()
        objective(problem, MNIST_SETTINGS, state)
        measured = time.perf_counter() - began
        took, rate, work = float(np.median(seconds)), float(np.median(rates)), flop(problem)
        row = [took, measured, work, work / took / 1e9, rate / 1e9]
        table.append(["as published", str(rank), str(len(split.y)), *(f"{v:.4g}" for v in row)])
        figures.append(plain(f"a sweep, rank {rank}", took, " s"))
        figures.append(
            at_least(
                f"a sweep's flop rate, rank {rank}, share of GEMM",
                100.0 * work / took / rate,
                50.0,
                baseline=f"{rate / 1e9:.1f} Gflop/s, float32 products",
            )
        )
    return figures, {"tables": {"One sweep": table}}


def gemm_rate(size: int = 2048) -> float:
    """Flop per second of a float32 product (3 size, size) (size, size): the best of three."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3 * size, size), np.float32)
    b = rng.standard_normal((size, size), np.float32)
    best = np.inf
    for _ in range(3):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2.0 * a.size * size / best


def flop(problem: Problem) -> float:
    """Multiplications and additions that the updates of one sweep need, tensor trains and ReLU steps apart.

    A symmetric product counts half of a full one, a Cholesky factor d³/3, a solve with it 2 d² a column.
    """
    n, total = len(problem.y), 0.0
    for i in range(1, problem.n_layers + 1):
        d_out, d_in = problem.shape(i)
        rows = n * (problem.positions if i == 1 else 1)
        total += 2.0 * rows * d_out * d_in  # the pull on W
        total += 2.0 * d_in**2 * d_out  # its solve
        if i == 1:
            total += 2.0 * rows * d_out * d_in  # A_1; its factor is kept between sweeps
            continue
        total += rows * d_in**2 + d_in**3 / 3.0
        s, large = min(d_out, d_in), max(d_out, d_in)
        # V_{i-1}: W W', its factor, z W', the solve, times W, and A.
        total += s**2 * large + s**3 / 3.0 + 4.0 * n * d_out * d_in + 2.0 * n * s**2
        total += 2.0 * n * (s**2 if d_out <= d_in else d_out * d_in)
    return total
