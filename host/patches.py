"""What a layer sees at sampled output positions, and what the original network makes of it, as rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from edgesolve.host.errors import DataError
from edgesolve.host.network import Network, aten
from edgesolve.host.sites import Site
from edgesolve.host.walk import Walk
from edgesolve.kernels.moments import Moments

ROWS = 1 << 16
ROWS_PER_INPUT = 64
_CLAMPS = {
    aten.relu.default: lambda: (0.0, None),
    aten.relu_.default: lambda: (0.0, None),
    aten.relu6.default: lambda: (0.0, 6.0),
    aten.hardtanh.default: lambda low=-1.0, high=1.0: (low, high),
    aten.clamp.default: lambda low=None, high=None: (low, high),
    aten.clamp_min.default: lambda low: (low, None),
    aten.clamp_max.default: lambda high: (None, high),
}


@dataclass(frozen=True, slots=True)
class Follow:
    """What reads a layer's output: `skip`, the call site added to it, and the range that a clamp keeps."""

    skip: str | None
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Rows:
    """x (n, groups, D) in the compressed network, t (n, T) in the original one, skip (n, T) or None.

    `t` is corrected by what the shortcut lacks: t + skip_original - skip_compressed, and `skip` is the
    compressed network's. `image` (n,): the frame of each row.
    """

    x: Tensor
    t: Tensor
    skip: Tensor | None
    image: Tensor


def moments_of(x: Tensor, t: Tensor) -> list[Moments]:
    """One record per group, of inputs x (n, groups, D) and targets t (n, T)."""
    parts = np.split(t.numpy(), x.shape[1], axis=1)
    return [Moments.of(x[:, g].numpy(), part) for g, part in enumerate(parts)]


def n_positions(site: Site, n_images: int) -> int:
    """Output positions to sample in each image: at least ROWS_PER_INPUT rows per input, and ROWS rows."""
    _, c, kh, kw = site.shape
    wanted = max(ROWS, ROWS_PER_INPUT * c * kh * kw)
    return min(site.at.after[0] * site.at.after[1], -(-wanted // n_images))


def n_rows(site: Site, n_images: int) -> int:
    return n_images * n_positions(site, n_images)


def rows(walk: Walk, site: Site, seed: int) -> Iterator[Rows]:
    """Of every batch in turn; the same rows on every call. Raises DataError naming the layer and the batch."""
    node = walk.network.nodes[walk.network.index(site.node)]
    follow = following(walk.network, site)
    for k, state in walk.before(site.node):
        first = k * walk.size
        x, t = state.student[node.args[0].name], state.teacher[site.node]
        pick = positions(site, len(walk.x), seed, k)
        found = patches(x, site, pick)
        target = outputs(t, site, pick)
        skip = None
        if follow.skip is not None:
            skip = outputs(state.student[follow.skip], site, pick)
            target = target + outputs(state.teacher[follow.skip], site, pick) - skip
        if not (torch.isfinite(found).all() and torch.isfinite(target).all()):
            raise DataError(
                f"{site.name}: NaN or inf in its activations on calibration batch {k} "
                f"(items {first}..{first + len(x) - 1}); check those items, --scale, --mean and --std."
            )
        image = torch.arange(first, first + len(x)).repeat_interleave(len(pick))
        yield Rows(found, target, skip, image)


def patches(x: Tensor, site: Site, pick: Tensor) -> Tensor:
    """The layer's inputs at the output positions `pick` (p,): (n p, groups, D), ordered (channel, kh, kw)."""
    if site.kind == "linear":
        flat = x.reshape(len(x), -1, x.shape[-1])[:, pick]
        return flat.reshape(-1, 1, x.shape[-1])
    x = x[..., None] if site.kind == "conv1d" else x
    (ph, pw), (kh, kw) = site.padding, site.weight.shape[2:]
    x = F.pad(x, (pw, pw, ph, ph))
    width = x.shape[3]
    out_w = site.at.after[1]
    row = (pick // out_w)[:, None, None] * site.stride[0]
    column = (pick % out_w)[:, None, None] * site.stride[1]
    row = row + torch.arange(kh)[None, :, None] * site.dilation[0]
    column = column + torch.arange(kw)[None, None, :] * site.dilation[1]
    index = (row * width + column).flatten()
    n, c = x.shape[:2]
    found = x.flatten(2)[:, :, index].view(n, c, len(pick), kh * kw)
    return found.permute(0, 2, 1, 3).reshape(n * len(pick), site.groups, -1)


def outputs(y: Tensor, site: Site, pick: Tensor) -> Tensor:
    """y at the output positions `pick` (p,): (n p, T)."""
    if site.kind == "linear":
        return y.reshape(len(y), -1, y.shape[-1])[:, pick].reshape(-1, y.shape[-1])
    return y.flatten(2)[:, :, pick].transpose(1, 2).reshape(-1, y.shape[1])


def following(network: Network, site: Site) -> Follow:
    """What reads the output of `site`, folded normalisations passed over.

    Nothing where something is added that comes later or is broadcast: it isn't known yet how much of the sum
    passes the clamp.
    """
    free = Follow(None, -np.inf, np.inf)
    node = _past_norm(network.nodes[network.index(site.node)], site.norm)
    user = _only_user(node)
    skip = None
    if user is not None and user.target in (aten.add.Tensor, aten.add_.Tensor):
        others = [a for a in user.args[:2] if isinstance(a, Node) and a is not node]
        if len(others) != 1 or user.kwargs or not _beside(network, others[0], node, site):
            return free
        skip, user = others[0].name, _only_user(user)
    low, high = _range(user)
    return Follow(skip, low, high)


def _beside(network: Network, other: Node, node: Node, site: Site) -> bool:
    """`other` is computed before the layer at `site` and has the shape of `node`."""
    shapes = [tuple(n.meta["val"].shape[1:]) if "val" in n.meta else None for n in (other, node)]
    before = network.index(other.name) < network.index(site.node)
    return before and shapes[0] is not None and shapes[0] == shapes[1]


def _past_norm(node: Node, norm: str | None) -> Node:
    while norm is not None:
        user = _only_user(node)
        if user is None or not (user.name == norm or "getitem" in str(user.target)):
            break
        node = user
    return node


def _only_user(node: Node) -> Node | None:
    users = [u for u in node.users if "_guards" not in str(u.target)]
    return users[0] if len(users) == 1 else None


def _range(user: Node | None) -> tuple[float, float]:
    if user is None or user.target not in _CLAMPS or user.kwargs:
        return -np.inf, np.inf
    low, high = _CLAMPS[user.target](*user.args[1:])
    return (-np.inf if low is None else float(low)), (np.inf if high is None else float(high))


def positions(site: Site, n_images: int, seed: int, batch: int) -> Tensor:
    """The output positions (p,) that are sampled from every image of a batch, ascending."""
    total = site.at.after[0] * site.at.after[1]
    per_image = n_positions(site, n_images)
    if per_image >= total:
        return torch.arange(total)
    generator = np.random.default_rng([seed, batch])
    return torch.from_numpy(np.sort(generator.choice(total, per_image, replace=False)))
