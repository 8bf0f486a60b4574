"""What each layer could become, at what cost and harm, and the choice under one budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgesolve.host.allocate import Allocation, Curve, allocate, pareto
from edgesolve.host.cp import cp
from edgesolve.host.lowrank import lowrank_curve
from edgesolve.host.metric import Metric
from edgesolve.host.sites import Site
from edgesolve.host.tucker import tucker2_curves

FORMATS = ("tucker2", "cp")
STEPS = 16
"""Ranks tried along each channel mode, evenly spaced: as many or, of a number it doesn't divide, a few more."""
ENERGY = 0.05
"""Weight of the relative distortion beside the measured divergence, in nats: breaks ties where KL is flat."""
CP_SHARES = (0.75, 0.5, 0.32, 0.17, 0.06)
"""Of a layer's weights: where CP is fitted."""
CP_SWEEPS = 4
CP_RANKS = 24


@dataclass(frozen=True, slots=True)
class Candidate:
    """One form of a layer: `format` and `ranks` as in Chain; stored weights, multiply-adds of one frame, and
    `distortion`, the share of the output's variance that it loses."""

    format: str
    ranks: tuple[int, ...]
    params: int
    macs: int
    distortion: float


@dataclass(frozen=True, slots=True)
class Harm:
    """What the network's answers lose (nats) at measured distortions of one layer, ascending from (0, 0)."""

    distortion: tuple[float, ...]
    divergence: tuple[float, ...]

    def __call__(self, distortion: np.ndarray) -> np.ndarray:
        """Between the probes in proportion, never falling; inf beyond the last, where nothing was measured."""
        rising = np.maximum.accumulate(self.divergence)
        found = np.interp(distortion, self.distortion, rising)
        return np.where(distortion > self.distortion[-1] * (1 + 1e-9), np.inf, found)


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of one layer before the pass: its candidates, dense first, and their harm.

    `reason` is why it stays dense, or ''.
    """

    site: Site
    candidates: tuple[Candidate, ...]
    harm: Harm
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """candidate by call site, with the allocation that chose them; cost in units of `kind`."""

    chosen: dict[str, Candidate]
    kind: str
    budget: float
    allocation: Allocation


def dense_candidate(site: Site) -> Candidate:
    return Candidate("dense", (), site.weight.size, site.macs, 0.0)


def tucker2_candidates(
    site: Site, metrics: list[Metric], pivots: bool, align: int
) -> list[Candidate]:
    """Tucker-2 on a grid of rank pairs; with one of them full it narrows one side only."""
    T, c, _, _ = site.shape
    table = sum(tucker2_curves(m, site.shape) for m in metrics) / sum(m.v for m in metrics)
    return [
        _tucker2(site, r_out, r_in, table[r_in - 1, r_out - 1], pivots)
        for r_in in grid(c, align)
        for r_out in grid(T, align)
        if (r_in, r_out) != (c, T)
    ]


def cp_candidates(site: Site, metrics: list[Metric], align: int) -> list[Candidate]:
    """CP-3 at CP_RANKS ranks: a CP has no curve in closed form, so it is fitted at CP_SHARES of the weights, and
    between them the logarithm of the distortion is taken to be linear in the rank."""
    T, c, kh, kw = site.shape
    scale, each = sum(m.v for m in metrics), T + c + kh * kw
    full = kh * kw * min(c, T)
    ranks = sorted({int(share * T * c * kh * kw / each) for share in CP_SHARES})
    ranks = sorted({max(r // align, 1) * align for r in ranks})
    ranks = [r for r in ranks if 2 <= r <= full]  # of rank 1 it is Tucker-2
    if not ranks:
        return []
    lost = [sum(m.distortion(_cp(m, site, r)) for m in metrics) / scale for r in ranks]
    spread = np.linspace(ranks[0], ranks[-1], CP_RANKS) / align
    every = np.unique(spread.round().astype(int)) * align
    between = np.exp(np.interp(every, ranks, np.log(np.maximum(lost, 1e-30))))
    return [
        _sized(site, "cp", (int(r),), ((r * c, "before"), (r * (kh * kw + T), "")), d)
        for r, d in zip(every, between, strict=True)
    ]


def _cp(metric: Metric, site: Site, rank: int) -> np.ndarray:
    return cp(metric, site.shape, rank, separable=False, sweeps=CP_SWEEPS, seeds=0).full()


def constant(metrics: list[Metric]) -> bool:
    """The targets vary by no more than rounding."""
    return sum(m.v for m in metrics) <= 1e-12 * sum(float(m.mu_t @ m.mu_t) for m in metrics)


def candidates(
    site: Site,
    metrics: list[Metric],
    formats: tuple[str, ...] = FORMATS,
    pivots: bool = True,
    align: int = 1,
) -> list[Candidate]:
    """Dense and every form of `formats` that stores fewer weights and that no other betters; metrics one per group.

    A 1×1 layer is low rank, whatever the format. `pivots`: outer factors have an identity block, which is not
    stored (`chain.pivoted`). Ranks are multiples of `align`, or full.
    """
    T, c, kh, kw = site.shape
    if constant(metrics):
        return [dense_candidate(site)]
    scale = sum(m.v for m in metrics)
    if kh * kw == 1:
        curve = sum(lowrank_curve(m) for m in metrics)
        found = [_lowrank(site, r, curve[r] / scale, pivots) for r in grid(min(T, c), align)]
    else:
        found = tucker2_candidates(site, metrics, pivots, align) if "tucker2" in formats else []
        found += cp_candidates(site, metrics, align) if "cp" in formats else []
    smaller = [f for f in found if f.params < site.weight.size]
    if not smaller:
        return [dense_candidate(site)]
    both = {
        i
        for cost in ("params", "macs")
        for i in pareto(
            np.array([getattr(f, cost) for f in smaller], float),
            np.array([f.distortion for f in smaller]),
        )
    }
    return [dense_candidate(site), *(smaller[i] for i in sorted(both))]


def grid(full: int, align: int = 1) -> list[int]:
    """Ranks in 1..full with full among them, about full / STEPS apart; the others are multiples of `align`."""
    if align > 1:
        step = -(-full // (STEPS * align)) * align
        return sorted({full, *range(step, full, step)})
    return sorted({*range(full, 0, -max(1, full // STEPS)), 1})


def _lowrank(site: Site, r: int, distortion: float, pivots: bool) -> Candidate:
    T, c, _, _ = site.shape
    params = r * c + r * T - (r * r if pivots and site.groups == 1 else 0)
    return _sized(site, "lowrank", (r,), ((r * c, "hw"), (params - r * c, "")), distortion)


def _tucker2(site: Site, r_out: int, r_in: int, distortion: float, pivots: bool) -> Candidate:
    T, c, kh, kw = site.shape
    block = pivots and site.groups == 1
    first = 0 if r_in == c else c * r_in - block * r_in * r_in
    last = 0 if r_out == T else r_out * T - block * r_out * r_out
    parts = ((first, "before"), (kh * kw * r_in * r_out, "hw"), (last, ""))
    return _sized(site, "tucker2", (r_out, r_in), parts, distortion)


def _sized(site, form, ranks, parts, distortion) -> Candidate:
    before, after = (h * w for h, w in site.at)
    params = int(site.groups * sum(p for p, _ in parts))
    macs = site.groups * sum(p * (before if where == "before" else after) for p, where in parts)
    return Candidate(form, ranks, params, int(macs), float(max(distortion, 0.0)))


def choose(
    surveys: list[Survey],
    kind: str,
    budget: float,
    cost: Callable[[Site, Candidate], float] | None = None,
) -> Plan:
    """The candidates of least total harm whose `kind` (params or macs) sums to at most `budget`.

    `cost` replaces params or macs by another additive cost, such as measured seconds. Raises ValueError naming
    the closest reachable budget.
    """
    cost = cost or (lambda site, candidate: float(getattr(candidate, kind)))
    curves, options = [], []
    for s in surveys:
        distortion = np.array([c.distortion for c in s.candidates])
        loss = s.harm(distortion) + ENERGY * distortion
        usable = [i for i in range(len(loss)) if np.isfinite(loss[i])]
        options.append([s.candidates[i] for i in usable])
        costs = np.array([cost(s.site, c) for c in options[-1]])
        curves.append(Curve(s.site.name, costs, loss[usable]))
    allocation = allocate(curves, budget)
    chosen = {s.site.node: options[i][allocation.choice[i]] for i, s in enumerate(surveys)}
    return Plan(chosen, kind, float(budget), allocation)
