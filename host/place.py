"""Where the head may stand: what it would replace, and what that costs in agreement."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edgesolve.host.adaptable import Preprocess
from edgesolve.host.distill import Distilled, HeadOptions, distill
from edgesolve.host.errors import ModelError
from edgesolve.host.gates import affordable
from edgesolve.host.network import Cut, Network, costs, cuts

SEARCH_FRAMES = 3072


@dataclass(frozen=True, eq=False)
class Trial:
    """Heads of `network` made from a part of the frames x (n, h, w, c), to compare places and sizes.

    held_out (n,) bool; `log` as recipe.Log.
    """

    network: Network
    preprocess: Preprocess
    x: np.ndarray
    held_out: np.ndarray
    log: object

    def __call__(self, network: Network, cut: Cut, options: HeadOptions) -> Distilled:
        """A head for `cut` of `network`, the trial's own or a compressed form of it."""
        pick = np.linspace(0, len(self.x) - 1, min(len(self.x), SEARCH_FRAMES)).astype(int)
        held = self.held_out[pick]
        held = held if held.sum() >= 32 else np.arange(len(pick)) % 6 == 0
        teacher = None if network is self.network else self.network
        quick = replace(options, flip=False)
        frames, progress = self.x[pick], self.log.progress
        return distill(network, cut, self.preprocess, frames, held, quick, progress, teacher)


def named_cut(network: Network, name: str) -> Cut:
    """The place for the head that --split names."""
    found = cuts(network)
    for cut in found:
        if cut.name == name or cut.name.startswith(name + "."):
            return cut
    names = ", ".join(c.name for c in found)
    raise ModelError(f"--split {name}: no such place. The network splits at: {names}.")


def places(network: Network, options: HeadOptions) -> list[Cut]:
    """Those behind which a head saves parameters and multiply-adds, shallow first."""
    macs = sum(m for _, m in costs(network).values())
    classes = network.run(network.example).shape[1]
    found = [
        c
        for c in cuts(network)
        if c.macs_after < 0.9 * macs
        and affordable(network, c, classes, options.gates, options.ramps)
    ]
    if not found:
        raise ModelError(
            "no split saves parameters and multiply-adds with a convex head; name one with --split."
        )
    return found


def choose_cut(trial: Trial, options) -> tuple[Cut, list[dict]]:
    """The named split, or the cheapest whose held-out agreement (or size) meets the target; and what was tried.

    options: recipe.BuildOptions.
    """
    network = trial.network
    if options.split is not None:
        return named_cut(network, options.split), []
    total = costs(network)
    macs, params = sum(m for _, m in total.values()), sum(p for p, _ in total.values())
    kind, value = options.target
    candidates = places(network, options.head)
    if kind == "drop":
        return _search_drop(trial, candidates, value, options.head)
    left = [
        1 - c.params_after / params if kind == "params" else 1 - c.macs_after / macs
        for c in candidates
    ]
    fits = [c for c, ratio in zip(candidates, left, strict=True) if ratio <= value]
    if not fits:
        raise ModelError(
            f"--target {kind}={value}: the smallest backbone here keeps {min(left):.2f} of the {kind}."
        )
    return fits[-1], []


def _search_drop(trial: Trial, candidates: list[Cut], drop: float, options: HeadOptions):
    """Bisect over the candidates, cheapest first; each is measured on held-out rows."""
    measured: dict[int, float] = {}

    def loss(index: int) -> float:
        if index not in measured:
            trial.log.say(f"trying {candidates[index].name}", transient=True)
            got = trial(trial.network, candidates[index], options)
            measured[index] = 100.0 * (1.0 - got.agreement)
        return measured[index]

    low, high = 0, len(candidates) - 1  # high: dearest, hence the surest
    best = None
    while low <= high:
        middle = (low + high) // 2
        if loss(middle) <= drop:
            best, high = middle, middle - 1
        else:
            low = middle + 1
    table = [
        {
            "split": candidates[i].name,
            "params_replaced": candidates[i].params_after,
            "agreement_loss": round(v, 3),
        }
        for i, v in sorted(measured.items())
    ]
    if best is None:
        nearest = min(measured, key=measured.get)
        raise ModelError(
            f"--target drop={drop:g}: of the splits tried that save anything, the closest loses "
            f"{measured[nearest]:.2f} points of held-out agreement, --split {candidates[nearest].name}. "
            "Give more calibration frames, or a larger drop."
        )
    return candidates[best], table
