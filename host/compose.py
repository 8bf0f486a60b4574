"""Which block the head replaces and how far the rest is decomposed, so that together they meet the target."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from edgesolve.host.decompose import Decomposed, Surveyed, decompose, planned, with_seconds
from edgesolve.host.distill import Distilled, HeadOptions
from edgesolve.host.errors import ModelError
from edgesolve.host.network import Cut, costs
from edgesolve.host.place import Trial, named_cut, places
from edgesolve.host.plan import Plan
from edgesolve.host.ruler import Head, Ruler, file_bytes, milliseconds
from edgesolve.host.sensitivity import divergence

LATENCIES = ("latency", "latency-ms")
HEADS = 4
"""Places for the head that are tried, evenly spaced among those that save anything."""
TRIES = 5
"""Budgets tried to meet a drop, a latency or a size in bytes."""
TIGHTER = 0.98
"""Of the budget that would meet a measured target if costs were exact: without it tries creep up to the target."""
FRONTIER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


@dataclass(frozen=True, eq=False)
class Composed:
    """`decomposed` before `head`; `frontier`: (params, KL predicted) that other budgets would have given."""

    head: Head
    plan: Plan
    decomposed: Decomposed
    frontier: tuple[tuple[int, float], ...]
    tried: tuple[dict, ...]


def compose(trial: Trial, surveyed: Surveyed, options) -> Composed:
    """The head's place and the decomposition before it that together meet the target.

    options: recipe.BuildOptions. Raises ModelError naming the closest that can be reached.
    """
    (kind, value), log, int8 = options.target, trial.log, options.int8 is not None
    if kind in LATENCIES or not surveyed.options.slower:
        surveyed = with_seconds(surveyed, log, int8)
    log.step("try places for the head")
    network, split = trial.network, options.split
    found = [named_cut(network, split)] if split else places(network, options.head)
    heads, tried = try_heads(trial, found, options.head), []
    if kind in ("params", "macs"):
        head, plan = to_size(surveyed, heads, kind, value)
        got = decompose(surveyed, head.cut, plan, log)
    elif kind == "drop":
        head, plan, got, tried = to_drop(surveyed, heads, value, trial, options.head)
    else:
        ruler = (milliseconds if kind in LATENCIES else file_bytes)(surveyed, trial.x, int8)
        wanted = value if kind == "latency-ms" else value * ruler.reference
        head, plan, got, tried = to_measured(surveyed, heads, options.target, wanted, ruler, log)
    return Composed(head, plan, got, frontier(surveyed, heads), tuple(tried))


def head_of(cut: Cut, made: Distilled) -> Head:
    logits = made.capture.logits, made.held_out_logits
    lost = divergence(*(torch.from_numpy(a) for a in logits))
    solved = made.solution.weights.size + made.solution.intercept.size
    params, macs = made.rows.n_params() + solved, made.rows.macs(cut.shape)
    macs += made.solution.weights.size
    return Head(cut, made.rows, params, macs, solved, lost)


def try_heads(trial: Trial, cuts: list[Cut], options: HeadOptions) -> list[Head]:
    """Heads behind at most HEADS of `cuts`, made of the original network's features."""
    at = np.unique(np.linspace(0, len(cuts) - 1, min(HEADS, len(cuts))).round().astype(int))
    found = []
    for i in at:
        trial.log.say(f"trying a head behind {cuts[i].name}", transient=True)
        found.append(head_of(cuts[i], trial(trial.network, cuts[i], options)))
    return found


def to_size(surveyed: Surveyed, heads: list[Head], kind: str, share: float) -> tuple[Head, Plan]:
    """The head and plan of least predicted harm whose `kind`, params or macs, is `share` of the network's."""
    table = costs(surveyed.network)
    total = sum(v[0 if kind == "params" else 1] for v in table.values())
    plans, nearest = [], np.inf
    for head in heads:
        before = surveyed.layers_before(head.cut.node)
        fixed = getattr(head, kind) + (
            sum(len(s.site.bias) for s in before) if kind == "params" else 0
        )
        try:
            plan = planned(surveyed, head.cut.node, kind, share * total - fixed)
            plans.append((plan.allocation.loss + head.divergence, head, plan))
        except ValueError:
            least = sum(min(getattr(c, kind) for c in s.candidates) for s in before)
            nearest = min(nearest, (least + fixed) / total)
    if not plans:
        raise ModelError(
            f"--target {kind}={share:g}: the closest that can be reached here is {nearest:.3f}."
            + ("" if surveyed.options.slower else " --slower also takes layers that win no time.")
        )
    _, head, plan = min(plans, key=lambda p: p[0])
    return head, plan


def to_drop(
    surveyed: Surveyed, heads: list[Head], drop: float, trial: Trial, options: HeadOptions
) -> tuple[Head, Plan, Decomposed, list[dict]]:
    """The smallest network whose held-out agreement falls by at most `drop` points: bisection over parameters."""
    low, high, best, tried = 0.1, 1.0, None, []
    for _ in range(TRIES):
        share = 0.5 * (low + high)
        try:
            head, plan = to_size(surveyed, heads, "params", share)
        except ModelError:
            low = share
            continue
        got = decompose(surveyed, head.cut, plan, trial.log)
        made = trial(got.network, got.cut, options)
        lost = 100.0 * (1.0 - made.agreement)
        tried.append(
            {"params": round(share, 3), "split": head.cut.name, "agreement_loss": round(lost, 3)}
        )
        if lost <= drop:
            best, high = (head, plan, got), share
        else:
            low = share
    if best is None:
        least = min((t["agreement_loss"] for t in tried), default=float("nan"))
        raise ModelError(
            f"--target drop={drop:g}: of the sizes tried, the closest loses {least:.2f} points of held-out "
            "agreement. Give more calibration frames, a larger drop, or a head further back with --split."
        )
    return *best, tried


def to_measured(
    surveyed: Surveyed,
    heads: list[Head],
    target: tuple[str, float],
    wanted: float,
    ruler: Ruler,
    log,
) -> tuple[Head, Plan, Decomposed, list[dict]]:
    """The least harmful network that costs at most `wanted` by `ruler`.

    Layers are allocated on their own costs; where the whole then comes out dearer, the budget is tightened.
    """
    budget, tried = wanted, []
    for _ in range(TRIES):
        plans, nearest = [], np.inf
        for head in heads:
            own = ruler.of_head(head)
            try:
                plan = planned(surveyed, head.cut.node, ruler.unit, budget - own, ruler)
                plans.append((plan.allocation.loss + head.divergence, head, plan))
            except ValueError:
                before = surveyed.layers_before(head.cut.node)
                least = sum(min(ruler(s.site, c) for c in s.candidates) for s in before)
                nearest = min(nearest, least + own)
        if not plans:
            break
        _, head, plan = min(plans, key=lambda p: p[0])
        got = decompose(surveyed, head.cut, plan, log)
        cost = ruler.measure(got) + ruler.of_head(head)
        tried.append(
            {"unit": ruler.unit, "budget": round(budget, 3), "split": head.cut.name, "cost": cost}
        )
        if cost <= wanted:
            return head, plan, got, tried
        budget *= TIGHTER * wanted / cost
    best = min([t["cost"] for t in tried] or [nearest])
    kind, value = target
    raise ModelError(
        f"--target {kind}={value:g}, {wanted:.6g} {ruler.unit}: the original takes {ruler.reference:.6g} {ruler.unit} "
        f"here, the closest that can be reached takes {best:.6g}."
    )


def frontier(surveyed: Surveyed, heads: list[Head]) -> tuple[tuple[int, float], ...]:
    """(parameters, predicted KL) at the budgets of FRONTIER that can be met."""
    total = sum(v[0] for v in costs(surveyed.network).values())
    found = []
    for share in FRONTIER:
        try:
            head, plan = to_size(surveyed, heads, "params", share)
        except ModelError:
            continue
        found.append((int(share * total), plan.allocation.loss + head.divergence))
    return tuple(found)
