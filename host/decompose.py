"""Decompose the part of a network that stays in front of the head, to a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from edgesolve.host.adaptable import Preprocess, nodes_until
from edgesolve.host.checkpoint import Checkpoint, digest
from edgesolve.host.compress import Compression, compress
from edgesolve.host.errors import ModelError
from edgesolve.host.fit import FitOptions
from edgesolve.host.latency import survey_seconds
from edgesolve.host.network import Cut, Network, cuts, trace
from edgesolve.host.plan import FORMATS, Candidate, Plan, Survey, choose, dense_candidate
from edgesolve.host.refine import RefineOptions, check, refine
from edgesolve.host.sensitivity import fisher
from edgesolve.host.shards import ALONE, Shards
from edgesolve.host.sites import Site, sites
from edgesolve.host.survey import survey
from edgesolve.host.walk import Walk


@dataclass(frozen=True, slots=True)
class DecomposeOptions:
    """`frames` are walked, the divergence is measured on `probe_frames` of them and the output metric on
    `fisher_frames`. `slower`: also keep layers that are smaller but were not faster when measured. `align`: ranks
    are multiples of it, since runtimes compute channels in blocks.
    """

    frames: int = 1024
    probe_frames: int = 256
    fisher_frames: int = 512
    formats: tuple[str, ...] = FORMATS
    slower: bool = False
    align: int = 1
    # Exporters store a 1×1 factor whole, so identity blocks would be counted but not won.
    fit: FitOptions = field(default_factory=lambda: FitOptions(pivots=False))
    refine: RefineOptions = field(default_factory=RefineOptions)


@dataclass(frozen=True, eq=False)
class Surveyed:
    """A network with everything that a plan needs: per layer its candidates, harm and, by call site, seconds.

    x: the frames that are walked; held: others, by which what follows the fit is judged.
    """

    network: Network
    preprocess: Preprocess
    x: np.ndarray
    held: np.ndarray
    found: list[Site]
    surveys: list[Survey]
    gammas: Mapping[str, np.ndarray]
    seconds: Mapping[str, Mapping[Candidate, float]]
    options: DecomposeOptions
    shards: Shards
    store: Checkpoint | None

    def walk(self) -> Walk:
        return Walk(self.network, self.preprocess, self.x, self.found, shards=self.shards)

    def layers_before(self, cut: str) -> list[Survey]:
        inside = nodes_until(self.network, cut)
        return [s for s in self.surveys if s.site.node in inside]


@dataclass(frozen=True, eq=False)
class Decomposed:
    """The compressed network, traced, the cut in it, and how it came about; `refined`: what followed the fit."""

    network: Network
    cut: Cut
    compression: Compression
    refined: tuple[dict, ...] = ()


def survey_network(
    network: Network,
    preprocess: Preprocess,
    x: np.ndarray,
    held: np.ndarray,
    options: DecomposeOptions,
    log,
    shards: Shards = ALONE,
    store: Checkpoint | None = None,
) -> Surveyed:
    """Measure every layer of `network` on frames x (n, h, w, c); held (m, h, w, c) are other ones. `log` as
    recipe.Log."""
    check(options.refine, shards)
    found, refused = sites(network)
    if not found:
        raise ModelError("the network has no convolution or linear layer that could be decomposed.")
    with threadpool_limits(1, "blas"):
        log.step("measure the divergence that each layer's forms cause")
        surveys = store.surveys(found) if store else None
        if surveys is None:
            surveys = survey(
                Walk(network, preprocess, x, found, shards=shards),
                refused,
                formats=options.formats,
                pivots=options.fit.pivots,
                align=options.align,
                n_probe=options.probe_frames,
                seed=options.fit.seed,
                progress=log.progress,
            )
            if store:
                store.save_surveys(surveys)
        log.step("measure what each layer's outputs matter")
        walk = Walk(network, preprocess, x, found, shards=shards)
        gammas = fisher(walk, options.fisher_frames, options.fit.seed, log.progress)
    return Surveyed(
        network, preprocess, x, held, found, surveys, gammas, {}, options, shards, store
    )


def with_seconds(surveyed: Surveyed, log, int8: bool = False) -> Surveyed:
    """With the seconds of every form measured on this machine, in float or int8; forms that win no time are dropped
    unless the options keep them."""
    log.step("time each layer's forms")
    name = "seconds-int8" if int8 else "seconds"
    stored = surveyed.store.arrays(name) if surveyed.store else None
    if stored is None:
        took = survey_seconds(surveyed.surveys, int8, log.progress)
        took = [surveyed.shards.first(t).tolist() for t in took]
        if surveyed.store:
            surveyed.store.save_arrays(name, {str(i): np.array(t) for i, t in enumerate(took)})
    else:
        took = [stored[str(i)].tolist() for i in range(len(surveyed.surveys))]
    table = {
        s.site.node: dict(zip(s.candidates, t, strict=True))
        for s, t in zip(surveyed.surveys, took, strict=True)
    }
    surveys = surveyed.surveys
    if not surveyed.options.slower:
        surveys = [only_faster(s, table[s.site.node]) for s in surveys]
    return replace(surveyed, surveys=surveys, seconds=table)


def only_faster(s: Survey, took: Mapping[Candidate, float]) -> Survey:
    """Without the forms that took no less time than the layer as it is; `took` in seconds."""
    dense = took[dense_candidate(s.site)]
    kept = tuple(c for c in s.candidates if c.format == "dense" or took[c] < dense)
    reason = s.reason
    if len(kept) == 1 and len(s.candidates) > 1:
        reason = "no smaller form was faster on the machine that built this; left dense"
    return replace(s, candidates=kept, reason=reason)


def planned(
    surveyed: Surveyed,
    cut: str,
    kind: str,
    budget: float,
    cost: Callable[[Site, Candidate], float] | None = None,
) -> Plan:
    """The plan for the layers up to `cut`; kind: params or macs, or another with its `cost`.

    Raises ValueError naming the closest reachable budget.
    """
    before = surveyed.layers_before(cut)
    if not before:
        raise ModelError(f"{cut}: no layer before it could be decomposed.")
    return choose(before, kind, budget, cost)


def decompose(surveyed: Surveyed, cut: Cut, plan: Plan, log) -> Decomposed:
    """Carry out `plan` before `cut`; what is behind it stays as it is, for the head to be made of."""
    log.step(f"fit {sum(c.format != 'dense' for c in plan.chosen.values())} smaller layers")
    reasons = {s.site.name: s.reason for s in surveyed.surveys}
    with threadpool_limits(1, "blas"):
        found = compress(
            surveyed.walk(),
            plan,
            reasons,
            surveyed.gammas,
            surveyed.options.fit,
            log.progress,
            _Stored(surveyed.store, plan) if surveyed.store else None,
        )
        found, rows = refine(
            found,
            surveyed.walk(),
            surveyed.held,
            surveyed.preprocess,
            surveyed.options.refine,
            log,
        )
    shape = tuple(surveyed.network.example.shape[1:])
    small = trace(found.module, shape)
    return Decomposed(small, same_cut(small, found, cut), found, tuple(rows))


class _Stored:
    """The fitted layers of one plan in a checkpoint."""

    def __init__(self, store: Checkpoint, plan: Plan):
        self.store = store
        self.name = digest({node: asdict(c) for node, c in plan.chosen.items()})[:12]

    def load(self, i: int):
        return self.store.layer(f"{self.name}-{i}")

    def save(self, i: int, fitted) -> None:
        self.store.save_layer(f"{self.name}-{i}", fitted)


def same_cut(small: Network, found: Compression, cut: Cut) -> Cut:
    """The cut of the traced compressed network that carries what `cut` carries in the replay it was traced from."""
    expected: list[torch.Tensor] = []

    def watch(node, value, args):
        if node.name == cut.node:
            expected.append(value)

    module = found.module
    with torch.no_grad():
        module.network.run(small.example, norm=module.norm, layers=module.places, watch=watch)
        for candidate in cuts(small):
            if candidate.shape == cut.shape:
                z = small.run(small.example, until=candidate.node)
                if torch.allclose(z, expected[0], rtol=1e-4, atol=1e-5):
                    return candidate
    raise ModelError(f"{cut.name}: the compressed network has no such place any more.")
