"""One layer in the compressed network: fitted to the original's outputs, refined through what follows it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from edgesolve.host.chain import Chain, Factor, dense, grouped, pivoted
from edgesolve.host.errors import DataError
from edgesolve.host.metric import Metric
from edgesolve.host.patches import (
    Rows,
    following,
    moments_of,
    n_positions,
    outputs,
    positions,
    rows,
)
from edgesolve.host.plan import Candidate
from edgesolve.host.sensitivity import damped, roots
from edgesolve.host.sites import Site
from edgesolve.host.splice import Factored
from edgesolve.host.survey import factorise
from edgesolve.host.walk import Walk
from edgesolve.kernels.moments import Moments

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
FOLDS = 4
ROW_BYTES = 1 << 28
"""Rows up to this size are kept while a layer is fitted, more of them gathered anew for every use."""
EXACT = 1e-9
"""Share of the targets' variance that single precision may lose."""
CHECKED = 64
"""Images on which every fitted layer is run to compare with what its moments predict."""


@dataclass(frozen=True, slots=True)
class FitOptions:
    """`damping`: share of the identity in the output metric; `pivots`: give outer factors an identity block;
    `seed`: of the sampled positions."""

    sweeps: int = 3
    clamp_steps: int = 4
    damping: float = 0.5
    pivots: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A layer's chain and bias (T,), with relative errors √(E||t - y||² / tr Cov t).

    `predicted` from moments, `measured` by running the chain on the same rows in float64, `held_out` of an
    unrefined twin on every fourth image, which it hasn't seen.
    """

    chain: Chain
    bias: np.ndarray
    ridge: float
    rows: float
    predicted: float
    measured: float
    held_out: float

    def module(self, site: Site) -> nn.Module:
        return Factored(site, self.chain, self.bias)


def fit(
    walk: Walk,
    site: Site,
    candidate: Candidate,
    gamma: np.ndarray | None,
    options: FitOptions,
) -> Fitted:
    """`candidate` fitted at `site`, everything before it being what `walk` has in its layers.

    gamma (T, T): output metric, or None. The target is the original layer's output; where a clamp follows, only
    what the clamp lets through counts (`clamped`).
    """
    source, shards = gathered(walk, site, options.seed), walk.shards
    halves = _halves(source, site, shards)
    moments = [a + b for a, b in zip(*halves, strict=True)]
    weights = np.split(site.weight.reshape(len(site.weight), -1), site.groups)
    ridge = _ridge(halves, weights)
    metrics = [Metric.of(m) for m in moments]
    make = _maker(site, candidate, weights, ridge, gamma, options)
    chain, bias = make(metrics)
    twin = _maker(site, candidate, weights, ridge, None, options, sweeps=0)
    held_out = _error(halves[1], *twin([Metric.of(m) for m in halves[0]]), site)
    if options.clamp_steps:
        chain, bias = _through_clamp(
            walk, site, source, moments, make, chain, bias, options, shards
        )
    chain = pivoted(chain) if options.pivots else chain
    return Fitted(
        chain,
        bias,
        ridge,
        sum(m.n for m in moments) / site.groups,
        *_checked(walk, site, next(iter(source)), chain, bias, options.seed),
        held_out,
    )


@dataclass(frozen=True, slots=True)
class _Again:
    """Rows that are gathered anew whenever they are asked for."""

    walk: Walk
    site: Site
    seed: int

    def __iter__(self):
        return rows(self.walk, self.site, self.seed)


def gathered(walk: Walk, site: Site, seed: int):
    """The rows of `site`, to be iterated over more than once: kept if they fit into ROW_BYTES."""
    n = n_positions(site, len(walk.x)) * len(walk.x) // walk.shards.count
    size = 4 * n * (site.weight[0].size * site.groups + 2 * len(site.weight))
    return list(rows(walk, site, seed)) if size <= ROW_BYTES else _Again(walk, site, seed)


def _checked(walk, site, batch: Rows, chain, bias, seed) -> tuple[float, float]:
    """(predicted, measured) relative error on the rows of at most CHECKED images: from their moments, and by
    running the chain on the images themselves. They differ where patches, padding or stride do."""
    images = int(batch.image[-1] - batch.image[0]) + 1
    n, per_image = min(CHECKED, images), len(batch.t) // images
    x, t = batch.x[: n * per_image], batch.t[: n * per_image]
    moments = moments_of(x, t)
    module = Factored(site, chain, bias, torch.float64)
    node = walk.network.nodes[walk.network.index(site.node)]
    k, state = next(walk.before(site.node))
    y = module(state.student[node.args[0].name][:n].double())
    y = outputs(y, site, positions(site, len(walk.x), seed, k))
    scale = sum(m.centred()[2] for m in moments)
    error = float(((t.double() - y) ** 2).sum(1).mean())
    return _error(moments, chain, bias, site), float(np.sqrt(error / max(scale, 1e-300)))


def _halves(source, site: Site, shards) -> tuple[list[Moments], list[Moments]]:
    """Moments per group: of three images in four, and of the fourth."""
    step = len(site.weight) // site.groups
    sums = [[Moments.zeros(site.weight[0].size, step)] * site.groups for _ in range(2)]
    for batch in source:
        last = batch.image % FOLDS == FOLDS - 1
        for side, mask in enumerate((~last, last)):
            if mask.any():
                found = moments_of(batch.x[mask], batch.t[mask])
                sums[side] = [a + b for a, b in zip(sums[side], found, strict=True)]
    merged = tuple([shards.moments(m) for m in side] for side in sums)
    if not all(side[0].n for side in merged):
        raise DataError(
            f"{site.name}: it takes at least {FOLDS} calibration frames to fit on {FOLDS - 1} of {FOLDS} and "
            "check on the rest. Give more frames."
        )
    return merged


def _ridge(halves, weights) -> float:
    """Of RIDGES, the one whose least-squares weights err least on the images apart; the least of equals.

    Behind an unchanged input all of them give the original weight: errors that are rounding count as equal.
    """
    errors = []
    rounding = EXACT * sum(Metric.of(apart).v for apart in halves[1])
    for ridge in RIDGES:
        total = 0.0
        for fit_on, apart, weight in zip(*halves, weights, strict=True):
            W = Metric.of(fit_on).ridged(weight, ridge).least_squares()
            total += Metric.of(apart).distortion(W)
        errors.append(max(total, rounding))
    return RIDGES[int(np.argmin(errors))]


def _maker(site, candidate, weights, ridge, gamma, options, sweeps=None):
    """metrics, one per group -> (chain, bias): the candidate's best fit in the output metric.

    Every call begins where the last one ended.
    """
    last: dict[int, Chain] = {}
    sweeps = options.sweeps if sweeps is None else sweeps
    step = len(site.weight) // site.groups
    pairs = [
        None
        if gamma is None
        else roots(
            damped(gamma[g * step : (g + 1) * step, g * step : (g + 1) * step], options.damping)
        )
        for g in range(site.groups)
    ]

    def make(metrics: list[Metric]) -> tuple[Chain, np.ndarray]:
        chains, bias = [], []
        for g, (metric, weight, pair) in enumerate(zip(metrics, weights, pairs, strict=True)):
            ridged = metric.ridged(weight, ridge)
            made = _group(ridged, site.shape, candidate, pair, sweeps, last.get(g))
            last[g] = made
            chains.append(made)
            bias.append(metric.bias(made.full()))
        return grouped(chains), np.concatenate(bias)

    return make


def _group(metric, shape, candidate, pair, sweeps, start) -> Chain:
    if candidate.format == "dense":
        return dense(metric.least_squares().reshape(shape))
    if pair is None:
        return factorise(metric, shape, candidate, sweeps, start)
    root, inverse = pair
    chain = factorise(metric.weighted(root), shape, candidate, sweeps, start)
    last = chain.factors[-1]
    weight = np.einsum("ij,jkhw->ikhw", inverse, last.weight)
    return Chain(
        chain.format, chain.ranks, (*chain.factors[:-1], Factor(weight, last.axes, last.groups))
    )


def _through_clamp(walk, site, source, moments, make, chain, bias, options, shards):
    """Refit to targets that the following clamp tells apart; the best by the one-sided error is kept."""
    follow = following(walk.network, site)
    if np.isinf(follow.low) and np.isinf(follow.high):
        return chain, bias
    best, kept = np.inf, (chain, bias)
    for step in range(options.clamp_steps + 1):
        error, cross = _clamped_moments(source, site, chain, bias, follow, shards)
        if error >= best:
            break
        best, kept = error, (chain, bias)
        if step == options.clamp_steps:
            break
        metrics = [
            Metric.of(Moments(m.n, m.sx, m.sxx, stx, st, stt))
            for m, (stx, st, stt) in zip(moments, cross, strict=True)
        ]
        chain, bias = make(metrics)
    return kept


def _clamped_moments(source, site, chain, bias, follow, shards):
    """(E||z - y||², [(stx, st, stt)] per group) for the targets z of `clamped`."""
    full = torch.from_numpy(_per_group(chain, site)).float()
    shift = torch.from_numpy(bias).float()
    step = len(site.weight) // site.groups
    error, n, sums = 0.0, 0, None
    for batch in source:
        y = torch.einsum("ngd,gtd->ngt", batch.x, full).flatten(1) + shift
        z = clamped(batch, y, follow)
        error += float(((z - y).double() ** 2).sum())
        n += len(y)
        x, z = batch.x.numpy(), z.numpy()
        found = []
        for g in range(site.groups):
            zg = z[:, g * step : (g + 1) * step]
            # Products in float32: these targets are a refinement's, nothing that is reported hangs on them.
            found.append([(zg.T @ x[:, g]).astype(np.float64), zg.sum(0, np.float64), _square(zg)])
        sums = (
            found
            if sums is None
            else [
                [a + b for a, b in zip(p, q, strict=True)] for p, q in zip(sums, found, strict=True)
            ]
        )
    error, n = shards.numbers(error, n)
    return error / n, [tuple(shards.arrays(*part)) for part in sums]


def _square(z: np.ndarray) -> float:
    return float(np.einsum("nt,nt->", z, z, dtype=np.float64))


def clamped(batch: Rows, y: torch.Tensor, follow) -> torch.Tensor:
    """Targets (n, T) for outputs y: t inside the clamp's range; beyond it, y itself where y is beyond it too.

    They make E||z - y||² the convex loss that punishes y only for what passes the clamp, and the step is
    majorise-minimise: the loss never rises in an unrestricted refit. With a skip the clamp acts on the sum.
    """
    skip = 0.0 if batch.skip is None else batch.skip
    total, here = batch.t + skip, y + skip
    z = batch.t
    if np.isfinite(follow.low):
        z = torch.where(total > follow.low, z, here.clamp(max=follow.low) - skip)
    if np.isfinite(follow.high):
        z = torch.where(total < follow.high, z, here.clamp(min=follow.high) - skip)
    return z


def _per_group(chain: Chain, site: Site) -> np.ndarray:
    """The chain's weight as (groups, T / groups, D)."""
    full = chain.full()
    if site.groups == 1:
        return full.reshape(1, len(full), -1)
    step, c = len(full) // site.groups, site.weight.shape[1]
    return np.stack(
        [
            full[g * step : (g + 1) * step, g * c : (g + 1) * c].reshape(step, -1)
            for g in range(site.groups)
        ]
    )


def _error(moments: list[Moments], chain: Chain, bias: np.ndarray, site: Site) -> float:
    """√(E||t - W x - b||² / tr Cov t), exact on the rows of `moments`."""
    parts = zip(moments, _per_group(chain, site), np.split(bias, site.groups), strict=True)
    error = sum(m.mean_squared_error(W.T, b) for m, W, b in parts)
    scale = sum(m.centred()[2] for m in moments)
    return float(np.sqrt(error / max(scale, 1e-300)))
