"""Replace a network's layers one after the other, each fitted behind those that were replaced before it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from edgesolve.host.capture import Progress
from edgesolve.host.fit import FitOptions, Fitted, fit
from edgesolve.host.plan import Candidate, Plan
from edgesolve.host.sensitivity import divergence
from edgesolve.host.sites import Site
from edgesolve.host.splice import Compressed
from edgesolve.host.survey import obstacle
from edgesolve.host.walk import Walk

DEFAULTS = FitOptions()


class Store(Protocol):
    """Fitted layers by number, kept over an interruption."""

    def load(self, i: int) -> Fitted | None: ...

    def save(self, i: int, fitted: Fitted) -> None: ...


@dataclass(frozen=True, slots=True)
class StepReport:
    """What became of one layer. `params` counts weights and biases as stored, `macs` one frame, `bytes` float32.

    `error`: relative errors (`fit.Fitted`); None where the layer was left as it was.
    """

    step: str
    layer: str
    ranks: tuple[int, ...]
    params: dict[str, int]
    macs: dict[str, int]
    bytes: dict[str, int]
    ridge: float | None
    rows: float
    error: dict[str, float] | None
    decision: str
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Compression:
    """The compressed network as a module, a report per layer, and KL(original || compressed) on the frames walked."""

    module: Compressed
    steps: tuple[StepReport, ...]
    fitted: Mapping[str, Fitted]
    divergence: float


def compress(
    walk: Walk,
    plan: Plan,
    reasons: Mapping[str, str],
    gammas: Mapping[str, np.ndarray] | None = None,
    options: FitOptions = DEFAULTS,
    progress: Progress = lambda done, total: None,
    store: Store | None = None,
) -> Compression:
    """Carry out `plan` in topological order; `walk` must have nothing replaced and is used up.

    Layers that stay dense are refitted too once something before them has changed: C S⁻¹ costs no parameter and
    repairs what the input lost; those that the plan doesn't name are left alone. reasons: why a layer stays dense,
    by name. gammas: output metrics by call site. store: layers fitted before an interruption.
    """
    fitted: dict[str, Fitted] = {}
    steps = []
    for i, site in enumerate(walk.found):
        began = time.perf_counter()
        candidate = plan.chosen.get(site.node)
        if candidate is None:
            continue
        reason = reasons.get(site.name, "")
        if refittable(site, len(walk.x)) and (fitted or candidate.format != "dense"):
            gamma = None if gammas is None else gammas[site.node]
            done = store.load(i) if store else None
            fitted[site.node] = done or fit(walk, site, candidate, gamma, options)
            if store and done is None and walk.shards.rank == 0:
                store.save(i, fitted[site.node])
            walk.layers[site.node] = fitted[site.node].module(site)
        steps.append(_report(site, candidate, fitted.get(site.node), reason, began))
        progress(i + 1, len(walk.found))
    total, n = 0.0, 0
    for teacher, student in walk.finish():
        total, n = total + len(teacher) * divergence(teacher, student), n + len(teacher)
    total, n = walk.shards.numbers(total, n)
    module = Compressed(walk.network, walk.found, walk.layers)
    return Compression(module, tuple(steps), fitted, total / n)


def refittable(site: Site, n_images: int) -> bool:
    """Depthwise layers are left alone: their few weights per channel gain nothing that the next layer doesn't."""
    return not (site.groups > 1 and site.shape[1] == 1) and not obstacle(site, n_images)


def _report(
    site: Site, candidate: Candidate, found: Fitted | None, reason: str, began: float
) -> StepReport:
    bias = len(site.bias)
    weights = site.weight.size if found is None else found.chain.n_params
    before, after = site.weight.size + bias, weights + bias
    dense = candidate.format == "dense"
    if not reason:
        reason = "smaller" if not dense else ("refitted" if found else "nothing changed before it")
    return StepReport(
        step=candidate.format,
        layer=site.name,
        ranks=candidate.ranks,
        params={"before": before, "after": after},
        macs={"before": site.macs, "after": site.macs if dense else found.chain.macs(site.at)},
        bytes={"before": 4 * before, "after": 4 * after},
        ridge=None if found is None else found.ridge,
        rows=0 if found is None else found.rows,
        error=None
        if found is None
        else {k: getattr(found, k) for k in ("predicted", "measured", "held_out")},
        decision="kept" if dense else "replaced",
        reason=reason,
        seconds=round(time.perf_counter() - began, 3),
    )


def as_rows(steps: tuple[StepReport, ...]) -> list[dict]:
    return [asdict(s) for s in steps]
