"""Runs of layers of a compressed network that can be refitted together, and what flows into and out of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgesolve.host.errors import DataError
from edgesolve.host.network import Network
from edgesolve.host.patches import Follow, following
from edgesolve.host.sites import Site
from edgesolve.host.walk import Walk


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Layers one behind the other; nothing else reads what is between them.

    follow[i]: the range that a clamp behind layer i lets through, (-inf, inf) without one; only the last layer may
    have something added to it (`skip`), which no layer of the block goes into.
    """

    sites: tuple[Site, ...]
    follow: tuple[Follow, ...]

    @property
    def name(self) -> str:
        return " - ".join(s.name for s in self.sites)


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """A block's input x (n, c, h, w) and added skip (n, T, h', w') or None in the compressed network; target: the
    original's block output. One entry per batch."""

    x: tuple[Tensor, ...]
    skip: tuple[Tensor, ...] | None
    target: tuple[Tensor, ...]


def blocks(
    network: Network, found: list[Site], fitted: Collection[str], longest: int = 2
) -> tuple[list[Block], dict[str, str]]:
    """The layers at the call sites `fitted` in runs of at most `longest`; for others: name -> why there is none.

    A run goes on where a layer's output, clamped or not, is read by the next layer and by nothing else, and
    nothing is added to it. Every layer is in one run, which may be itself alone.
    """
    if longest < 1:
        raise ValueError(f"longest must be 1 or more, got {longest}.")
    runs, refused = [], {}
    layers = {s.node for s in found}
    open_at: dict[str, Block] = {}  # by the only reader of what the block gives
    for site in found:
        if site.node not in fitted:
            refused[site.name] = "the compression left it as it was"
            continue
        if site.groups > 1:
            refused[site.name] = f"a convolution of {site.groups} groups; left as fitted"
            continue
        follow = following(network, site)
        before = open_at.pop(site.node, None)
        if before is None:
            block = Block((site,), (follow,))
        else:
            runs.remove(before)
            block = Block((*before.sites, site), (*before.follow, follow))
        runs.append(block)
        reader = _reader(network, site, follow, layers)
        if reader and follow.skip is None and len(block.sites) < longest:
            open_at[reader] = block
    # By where they begin, so that a walk over them never steps back.
    return sorted(runs, key=lambda b: network.index(b.sites[0].node)), refused


def _reader(network: Network, site: Site, follow: Follow, layers: set[str]) -> str | None:
    """The layer that alone reads what `site` gives, through its normalisation and the clamp of `follow`."""
    clamps = int(np.isfinite(follow.low) or np.isfinite(follow.high))
    node = network.nodes[network.index(site.node)]
    while True:
        users = [u for u in node.users if "_guards" not in str(u.target)]
        if len(users) != 1:
            return None
        node = users[0]
        if node.name in layers:
            return node.name
        if not (node.name == site.norm or "getitem" in str(node.target)):
            clamps -= 1  # what isn't part of the normalisation must be the clamp
            if clamps < 0:
                return None


def flow(
    walk: Walk, block: Block, dtype: torch.dtype = torch.float32, rows: float = np.inf
) -> Flow:
    """Of the first frames of `walk`, in whole batches, that make `rows` output positions in the block's widest layer;
    through what `walk` has in its layers. Raises DataError naming the block.
    """
    network, first, last = walk.network, block.sites[0], block.sites[-1]
    source = network.nodes[network.index(first.node)].args[0].name
    end, skip = network.index(last.node), block.follow[-1].skip
    low, high = block.follow[-1].low, block.follow[-1].high
    student_layers = {**walk.original, **walk.layers}
    x, skips, targets = [], [], []
    positions = max(s.at.after[0] * s.at.after[1] for s in block.sites)
    for k, state in walk.before(first.node):
        if positions * sum(map(len, x)) >= rows:
            break
        x.append(spread(state.student[source], first).to(dtype))
        teacher, student = dict(state.teacher), dict(state.student)
        with torch.no_grad():
            network.advance(teacher, state.at[0], end + 1, norm=walk.norm, layers=walk.original)
            network.advance(student, state.at[1], end, norm=walk.norm, layers=student_layers)
        target = teacher[last.node]
        if skip is not None:
            target = target + teacher[skip]
            skips.append(spread(student[skip], last).to(dtype))
        targets.append(spread(target, last).to(dtype).clamp(low, high))
        if not (x[-1].isfinite().all() and targets[-1].isfinite().all()):
            raise DataError(
                f"{block.name}: NaN or inf in its activations on calibration batch {k}; check those items, "
                "--scale, --mean and --std."
            )
    return Flow(tuple(x), None if skip is None else tuple(skips), tuple(targets))


def spread(y: Tensor, site: Site) -> Tensor:
    """An activation beside `site` as (n, channels, h, w), which a Conv1d and a Linear lack."""
    if site.kind == "linear":
        return y.movedim(-1, 1).flatten(2)[..., None] if y.ndim > 2 else y[:, :, None, None]
    return y[..., None] if site.kind == "conv1d" else y
