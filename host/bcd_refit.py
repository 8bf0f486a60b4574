"""Refit a block of a compressed network to the original block's output: block coordinate descent, no labels.

For a block of layers 1..N with input V_0 and added skip s (on the last layer; 0 elsewhere), clamps σ_i and target Y:

    L = ½||Y - σ_N(U_N)||²_d + γ/2 Σ_{i<N} ||V_i - σ_i(U_i)||² + ρ/2 Σ_i ||U_i - s_i - W_i * V_{i-1} - b_i||²
        + τ/2 Σ_i ||W_i - G_i||²      (τ = None: W_i is G_i)

Norms are means over output positions. * is the layer's convolution, G_i the weight that its factors make, and V_N
is Y. d weighs the last layer's channels, in its term of ρ too. Each update is an exact minimiser of its block or
conjugate gradients that never ascend, so L never rises. (compression.md, sections 6 and 8; Zeng et al. 2019.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import Tensor

from edgesolve.host.bcd_refit_steps import layer_moments, updated_layer, updated_u, updated_v
from edgesolve.host.chain import Chain, pivoted
from edgesolve.host.metric import Metric
from edgesolve.host.refit_problem import Point, Problem, affine, matrix, put, square

Layer = tuple[Chain, np.ndarray]
"""A chain and its bias (T,)."""


def start(problem: Problem, layers: list[Layer]) -> Point:
    """Where every layer holds exactly: U_i and V_i are what the block of `layers` computes."""
    chains, bias = tuple(c for c, _ in layers), tuple(b for _, b in layers)
    W = tuple(matrix(c) for c in chains)
    V, U = [problem.flow.x], []
    for i, follow in enumerate(problem.block.follow):
        U.append(
            tuple(
                affine(problem, i, W[i], bias[i], v) + problem.skip(i, k)
                for k, v in enumerate(V[i])
            )
        )
        V.append(tuple(u.clamp(follow.low, follow.high) for u in U[i]))
    return Point(tuple(V[:-1]), tuple(U), W, bias, chains)


def forward(problem: Problem, layers: list[Layer]) -> tuple[Tensor, ...]:
    """What the block of `layers` gives, by batch."""
    values = problem.flow.x
    for i, ((chain, bias), follow) in enumerate(zip(layers, problem.block.follow, strict=True)):
        W = matrix(chain)
        values = tuple(
            (affine(problem, i, W, bias, v) + problem.skip(i, k)).clamp(follow.low, follow.high)
            for k, v in enumerate(values)
        )
    return values


def block_error(problem: Problem, layers: list[Layer]) -> float:
    """½ of the mean squared difference, in the objective's weights, between the block of `layers` and the target."""
    last = problem.n_layers - 1
    pairs = zip(forward(problem, layers), problem.flow.target, strict=True)
    total = sum(square(y - t, problem.scale(last)) for y, t in pairs)
    return 0.5 / problem.rows(last) * total


def descend(problem: Problem, layers: list[Layer]) -> tuple[list[list[Layer]], list[float]]:
    """(the factored layers after each sweep, L before the first sweep and after each)."""
    pivots = [any(f.pivots for f in chain.factors) for chain, _ in layers]
    p = start(problem, layers)
    trace, found = [objective(problem, p)], []
    for _ in range(problem.options.sweeps):
        p = sweep(problem, p)
        trace.append(objective(problem, p))
        found.append(shipped(problem, p, pivots))
    return found, trace


def shipped(problem: Problem, p: Point, pivots: list[bool]) -> list[Layer]:
    """The factors, with identity blocks where there were any, and biases that make up for W_i - G_i on average."""
    found = []
    for i, chain in enumerate(p.chains):
        bias = p.bias[i]
        if problem.options.tau is not None:
            moments = layer_moments(problem, p, i)
            bias = Metric.of(moments).bias(matrix(chain))
        found.append((pivoted(chain) if pivots[i] else chain, bias))
    return found


def objective(problem: Problem, p: Point) -> float:
    """L at p, from its definition, summed in float64."""
    o, last, total = problem.options, problem.n_layers - 1, 0.0
    for i, follow in enumerate(problem.block.follow):
        after = problem.flow.target if i == last else p.V[i + 1]
        d, share = problem.scale(i), 0.5 / problem.rows(i)
        outer = 1.0 if i == last else o.gamma
        for k, (u, a) in enumerate(zip(p.U[i], after, strict=True)):
            linear = affine(problem, i, p.W[i], p.bias[i], p.V[i][k]) + problem.skip(i, k)
            total += share * outer * square(a - u.clamp(follow.low, follow.high), d)
            total += share * o.rho * square(u - linear, d)
        if o.tau is not None:
            total += 0.5 * problem.tau * float(((p.W[i] - matrix(p.chains[i])) ** 2).sum())
    return total


def sweep(
    problem: Problem, p: Point, watch: Callable[[str, Point], None] = lambda block, p: None
) -> Point:
    """Every block once: U_N, W_N (with its bias and factors), then V_i, U_i, W_i back to the first layer."""
    for i in reversed(range(problem.n_layers)):
        if i < problem.n_layers - 1:
            p = replace(p, V=put(p.V, i + 1, updated_v(problem, p, i + 1)))
            watch(f"V{i + 1}", p)
        p = replace(p, U=put(p.U, i, updated_u(problem, p, i)))
        watch(f"U{i + 1}", p)
        p = updated_layer(problem, p, i)
        watch(f"W{i + 1}", p)
    return p
