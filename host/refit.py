"""Refit a compressed network block by block to the original's activations; kept only where held-out answers improve."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from edgesolve.host.bcd_refit import Layer, block_error, descend
from edgesolve.host.capture import Progress
from edgesolve.host.compress import Compression
from edgesolve.host.errors import DataError
from edgesolve.host.fit import Fitted
from edgesolve.host.refit_block import Block, blocks, flow
from edgesolve.host.refit_problem import Problem, RefitOptions
from edgesolve.host.sensitivity import damped, divergence
from edgesolve.host.splice import Compressed, Factored
from edgesolve.host.walk import Walk

DEFAULTS = RefitOptions()


@dataclass(frozen=True, slots=True)
class RefitRow:
    """What became of one block. `objective`: before the first sweep and after each; `error`: ½ mean squared error of
    the block's output before, and after each sweep; `divergence` (nats), `agreement` (share) on the held-out frames
    before, and after each sweep. `sweep`: the one that is kept, 0 for the layers as they were."""

    block: str
    objective: tuple[float, ...]
    error: tuple[float, ...]
    divergence: tuple[float, ...]
    agreement: tuple[float, ...]
    sweep: int
    seconds: float

    @property
    def accepted(self) -> bool:
        return self.sweep > 0


def refit(
    walk: Walk,
    held: Walk,
    fitted: Mapping[str, Fitted],
    options: RefitOptions = DEFAULTS,
    *,
    gammas: Mapping[str, np.ndarray] | None = None,
    damping: float = 0.5,
    longest: int = 2,
    progress: Progress = lambda done, total: None,
) -> tuple[dict[str, Fitted], tuple[RefitRow, ...], dict[str, str]]:
    """(`fitted` with the layers of accepted blocks, a row per block, name -> why a layer is in no block).

    walk, held: the same network over calibration frames to fit on and over others to judge by, nothing replaced and
    of one process; both are used up. gammas: output metrics by call site, of which the diagonals weigh a block's
    outputs. Blocks go front to back, each behind those before it as they were accepted. No label is read.
    """
    if walk.shards.count > 1 or held.shards.count > 1:
        raise DataError("blocks are refitted by one process; start the build without torchrun.")
    runs, refused = blocks(walk.network, walk.found, fitted, longest)
    modules = {s.node: fitted[s.node].module(s) for s in walk.found if s.node in fitted}
    walk.layers.update(modules)
    held.layers.update(modules)
    expected = [teacher for teacher, _ in held.finish()]
    found, rows = dict(fitted), []
    for i, block in enumerate(runs):
        d = None if gammas is None else np.diag(damped(gammas[block.sites[-1].node], damping))
        layers, row = refit_block(walk, held, expected, found, block, options, d)
        rows.append(row)
        for site, (chain, bias) in zip(block.sites, layers, strict=True):
            found[site.node] = replace(found[site.node], chain=chain, bias=bias)
            walk.layers[site.node] = held.layers[site.node] = found[site.node].module(site)
        progress(i + 1, len(runs))
    return found, tuple(rows), refused


def refit_block(
    walk: Walk,
    held: Walk,
    expected: list[Tensor],
    fitted: Mapping[str, Fitted],
    block: Block,
    options: RefitOptions,
    weights: np.ndarray | None = None,
) -> tuple[list[Layer], RefitRow]:
    """The block's layers after the sweep of least held-out divergence that loses no agreement, or as they were.

    expected: the original's logits on `held` by batch.
    """
    began = time.perf_counter()
    layers = [(fitted[s.node].chain, fitted[s.node].bias) for s in block.sites]
    own = flow(walk, block, getattr(torch, options.dtype), options.rows)
    problem = Problem.of(block, own, options, weights)
    after, trace = descend(problem, layers)
    trials = [layers, *after]
    judged = answers(held, expected, block, trials)
    losses = [j[0] for j in judged]
    # A few frames carry most of a mean divergence, so no sweep counts that loses agreement; NaN is never the least,
    # and of equals the first is taken, the layers as they were.
    counted = [loss if agreed >= judged[0][1] else np.inf for loss, agreed in judged]
    best = int(np.argmin(np.nan_to_num(counted, nan=np.inf)))
    row = RefitRow(
        block=block.name,
        objective=tuple(trace),
        error=tuple(block_error(problem, t) for t in trials),
        divergence=tuple(losses),
        agreement=tuple(j[1] for j in judged),
        sweep=best,
        seconds=round(time.perf_counter() - began, 3),
    )
    return trials[best], row


def answers(
    held: Walk, expected: list[Tensor], block: Block, trials: list[list[Layer]]
) -> list[tuple[float, float]]:
    """(divergence, agreement) of the whole network on the frames of `held`, for each `trials` in the block's place."""
    network, first = held.network, block.sites[0].node
    sums = np.zeros((len(trials), 2))
    for k, state in held.before(first):
        for j, layers in enumerate(trials):
            own = {
                s.node: Factored(s, chain, bias)
                for s, (chain, bias) in zip(block.sites, layers, strict=True)
            }
            values = dict(state.student)
            places = {**held.original, **held.layers, **own}
            with torch.no_grad():
                network.advance(
                    values, state.at[1], len(network.nodes), norm=held.norm, layers=places
                )
            logits, n = network.result(values), len(expected[k])
            agreed = (logits.argmax(1) == expected[k].argmax(1)).sum()
            sums[j] += divergence(expected[k], logits) * n, float(agreed)
    return [tuple(row) for row in (sums / sum(map(len, expected))).tolist()]


def refitted(
    walk: Walk, held: Walk, compression: Compression, options: RefitOptions = DEFAULTS, **more
) -> tuple[Compression, tuple[RefitRow, ...]]:
    """`compression` after `refit`, whose arguments these are. Its steps' errors stay those of the fit before;
    the divergence is that on the frames of `walk`."""
    fitted, rows, _ = refit(walk, held, compression.fitted, options, **more)
    changed = {n for r in rows if r.accepted for n in r.block.split(" - ")}
    steps = tuple(
        replace(s, reason=f"{s.reason}; then refitted in its block") if s.layer in changed else s
        for s in compression.steps
    )
    total, n = 0.0, 0
    for teacher, student in walk.finish():
        total, n = total + len(teacher) * divergence(teacher, student), n + len(teacher)
    module = Compressed(walk.network, walk.found, walk.layers)
    return Compression(module, steps, fitted, total / n), rows
