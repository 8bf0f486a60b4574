"""The first pass: moments of every layer in the original network, its candidates, and the harm of five of them."""

from __future__ import annotations

import numpy as np
import torch

from edgesolve.host.capture import Progress
from edgesolve.host.chain import Chain
from edgesolve.host.cp import cp
from edgesolve.host.lowrank import lowrank
from edgesolve.host.metric import Metric
from edgesolve.host.patches import moments_of, n_rows, rows
from edgesolve.host.plan import (
    FORMATS,
    Candidate,
    Harm,
    Survey,
    candidates,
    constant,
    dense_candidate,
)
from edgesolve.host.sensitivity import probe
from edgesolve.host.sites import Site
from edgesolve.host.tucker import tucker2
from edgesolve.host.walk import Walk
from edgesolve.kernels.moments import Moments

PROBES = (0.75, 0.5, 0.3, 0.15, 0.05)
"""Shares of a layer's weights at which the network's divergence is measured."""
MOMENT_BYTES = 1 << 32
"""Most memory for one layer's moments."""
ADVISED = 10
"""Rows per input that moments should have; with less than one, a layer is left as it is."""


def moment_bytes(site: Site) -> int:
    """Memory for the moments of a layer's input and target, all groups."""
    return 24 * site.groups * site.weight[0].size ** 2


def obstacle(site: Site, n_images: int) -> str:
    """Why a layer can't be fitted to its moments over `n_images` frames, or ''."""
    D, n = site.weight[0].size, n_rows(site, n_images)
    need = moment_bytes(site)
    if need > MOMENT_BYTES:
        bound = MOMENT_BYTES / 2**30
        return f"its moments need {need / 2**30:.0f} GiB, the bound is {bound:g} GiB; left dense"
    if n < D:
        return (
            f"{n} rows for {D} inputs, {ADVISED * D} advised; give {-(-ADVISED * D // n)} times the images; "
            "left dense"
        )
    return ""


def layer_moments(walk: Walk, site: Site, seed: int) -> list[Moments]:
    """Of x and t at `site`, one record per group, over all processes."""
    sums: list[Moments] | None = None
    for batch in rows(walk, site, seed):
        found = moments_of(batch.x, batch.t)
        sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
    return [walk.shards.moments(m) for m in sums]


def survey(
    walk: Walk,
    refused: dict[str, str],
    *,
    formats: tuple[str, ...] = FORMATS,
    pivots: bool = True,
    align: int = 1,
    n_probe: int = 256,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> list[Survey]:
    """Of every layer, in order. `walk` must have nothing replaced.

    refused: name -> why a layer stays dense; n_probe: frames that the divergence is measured on.
    """
    logits = _logits(walk, n_probe)
    found = []
    for i, site in enumerate(walk.found):
        reason = refused.get(site.name, "")
        found.append(_survey(walk, site, reason, (formats, pivots, align), seed, logits))
        progress(i + 1, len(walk.found))
    return found


def _survey(walk, site, reason, allowed, seed, logits) -> Survey:
    still = Harm((0.0,), (0.0,))
    reason = reason or obstacle(site, len(walk.x))
    if reason:
        return Survey(site, (dense_candidate(site),), still, reason)
    metrics = [Metric.of(m) for m in layer_moments(walk, site, seed)]
    options = candidates(site, metrics, *allowed)
    if len(options) == 1:
        reason = "its output never changes" if constant(metrics) else "no rank stores fewer weights"
        return Survey(site, tuple(options), still, f"{reason}; left dense")
    return Survey(site, tuple(options), _harm(walk, site, metrics, _spread(site, options), logits))


def _harm(walk, site, metrics, probed, logits) -> Harm:
    """Measured with the layer as each of `probed`, at the distortion that it really has: a CP is fitted less
    closely here than its candidate will be."""
    weights = [approximate(site, metrics, c) for c in probed]
    scale = sum(m.v for m in metrics)
    lost = []
    for candidate, (weight, _) in zip(probed, weights, strict=True):
        parts = zip(metrics, np.split(weight, site.groups), strict=True)
        own = sum(m.distortion(part) for m, part in parts) / scale
        lost.append(max(own, candidate.distortion))
    measured = probe(walk, logits, site, weights)
    order = np.argsort(lost, kind="stable")
    return Harm(
        (0.0, *(lost[i] for i in order)),
        (0.0, *(max(measured[i], 0.0) for i in order)),
    )


def _spread(site: Site, options: list[Candidate]) -> list[Candidate]:
    """The best candidate at each share of PROBES, and the worst of all."""
    found = []
    for share in PROBES:
        fits = [c for c in options if c.params <= share * site.weight.size]
        if fits:
            found.append(min(fits, key=lambda c: c.distortion))
    found.append(max(options[1:], key=lambda c: c.distortion))  # the first is dense
    return list(dict.fromkeys(found))


def approximate(
    site: Site, metrics: list[Metric], candidate: Candidate
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (T, c / groups, kh, kw) and bias (T,) of `candidate`, without refinement."""
    parts = [factorise(m, site.shape, candidate, sweeps=0).full() for m in metrics]
    bias = [m.bias(p) for m, p in zip(metrics, parts, strict=True)]
    return np.concatenate(parts), np.concatenate(bias)


def factorise(
    metric: Metric, shape, candidate: Candidate, sweeps: int, start: Chain | None = None
) -> Chain:
    """One group's chain in the format and ranks of `candidate`; `start`: one to begin from."""
    if candidate.format == "lowrank":
        return lowrank(metric, shape, candidate.ranks[0])
    if candidate.format == "cp":
        r = candidate.ranks[0]
        return cp(metric, shape, r, separable=False, sweeps=sweeps, seeds=0, start=start)
    return tucker2(metric, shape, candidate.ranks, sweeps=sweeps, start=start)


def _logits(walk: Walk, n_probe: int) -> dict[int, torch.Tensor]:
    """The original network's answers to the first `n_probe` frames, by batch."""
    pairs = zip(walk.mine, walk.finish(), strict=True)
    return {k: teacher for k, (teacher, _) in pairs if k * walk.size < n_probe}
