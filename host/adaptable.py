"""The two networks that ship: the frozen backbone, folded, and the adaptable teacher, statistics open.

Both replay the traced network inside a module, so that one exporter call gives each a plain graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesolve.host.network import Network, Norm, layer_parameters, source_layer
from edgesolve.host.rows import Rows


@dataclass(frozen=True, slots=True)
class Preprocess:
    """frames (n, h, w, c) -> (x * scale - mean) / std as (n, c, h, w) float32; mean, std (c,)."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, frames: Tensor) -> Tensor:
        # A depthwise 1×1 convolution, because exporters fold a plain scale into the next layer's weights,
        # which then couldn't be found and re-normalised on the device.
        factor = torch.tensor([self.scale / s for s in self.std])
        shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)])
        # Contiguous, as the network was traced: a view of channels-last memory would be refused.
        x = frames.to(torch.float32).permute(0, 3, 1, 2).contiguous()
        return F.conv2d(x, factor[:, None, None, None], shift, groups=len(factor))


def nodes_until(network: Network, node: str) -> set[str]:
    """Names of the call sites up to and with `node`."""
    names: set[str] = set()
    for n in network.nodes:
        names.add(n.name)
        if n.name == node:
            break
    return names


def fold_layer(network: Network, norm: Norm) -> tuple[Tensor, Tensor]:
    """Weight and bias of `norm`'s layer with the normalisation folded in (compression.md, section 2)."""
    weight, bias = layer_parameters(network, source_layer(network, norm.layer))
    scale = norm.scale()
    shift = torch.zeros_like(norm.beta) if bias is None else bias
    folded = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return folded, norm.beta + (shift - norm.mean) * scale


class Backbone(nn.Module):
    """frames (n, h, w, c) -> rows (n, D): the network up to `cut`, normalisations folded, then gating.

    `sites`: for each normalisation before the cut the names of its weight and bias buffers.
    """

    def __init__(self, network: Network, cut: str, rows: Rows, preprocess: Preprocess):
        super().__init__()
        self.network, self.cut, self.rows, self.preprocess = network, cut, rows, preprocess
        inside = nodes_until(network, cut)
        self.sites: list[tuple[Norm, str, str]] = []
        for i, norm in enumerate(n for n in network.norms if n.node in inside):
            if norm.layer is not None:
                weight, bias = fold_layer(network, norm)
            else:
                weight, bias = norm.scale(), norm.beta - norm.mean * norm.scale()
            self.register_buffer(f"weight_{i}", weight.contiguous().clone())
            self.register_buffer(f"bias_{i}", bias.contiguous().clone())
            self.sites.append((norm, f"weight_{i}", f"bias_{i}"))

    def forward(self, frames: Tensor) -> Tensor:
        return self.rows(self.features(frames))

    def features(self, frames: Tensor) -> Tensor:
        """z (n, d, h, w) at the cut."""
        layers = {
            norm.layer: (getattr(self, w), getattr(self, b))
            for norm, w, b in self.sites
            if norm.layer is not None
        }
        affine = {norm.node: (w, b) for norm, w, b in self.sites if norm.layer is None}

        def norm(site: Norm, y: Tensor) -> Tensor:
            if site.node not in affine:
                return y  # folded into its layer
            weight, bias = (getattr(self, name) for name in affine[site.node])
            return y * _along(weight, y) + _along(bias, y)

        x = self.preprocess(frames)
        return self.network.run(x, until=self.cut, norm=norm, layers=layers)


class Upto(nn.Module):
    """frames (n, h, w, c) -> the output of call site `until` of `network`, or its logits, as it stands."""

    def __init__(self, network: Network, preprocess: Preprocess, until: str | None = None):
        super().__init__()
        self.network, self.preprocess, self.until = network, preprocess, until

    def forward(self, frames: Tensor) -> Tensor:
        return self.network.run(self.preprocess(frames), until=self.until)


class Teacher(nn.Module):
    """The original network with every normalisation's statistics open, and the backbone's rows at the cut.

    frames (B, h, w, c), weight (B,) summing to 1, mix (1,), mean and var (S,) ->
    logits (B, c), rows (B, D), window_mean (S,), window_var (S,).

    Each normalisation uses m = (1 - mix) mean + mix window, and the moment-matched variance
    (1 - mix) var + mix window_var + mix (1 - mix) (window - mean)². `mix` 0 uses what is given, exactly.
    Frames of weight 0 are padding. (adaptation.md, "The pipeline that follows", 3.)

    `student`: the network whose cut gives the rows, if it is another one than `network`, with no normalisation
    behind the cut; its statistics come first. `slices`: where those of each of its normalisations are.
    """

    def __init__(
        self,
        network: Network,
        cut: str,
        rows: Rows,
        preprocess: Preprocess,
        student: Network | None = None,
    ):
        super().__init__()
        self.network, self.cut, self.rows, self.preprocess = network, cut, rows, preprocess
        self.student = student
        self.networks = (network,) if student is None else (student, network)
        self.slices = slices(self.networks[0])

    def forward(self, frames, weight, mix, mean, var):
        x, rows = self.preprocess(frames), None
        means: list[Tensor] = []
        variances: list[Tensor] = []
        start = 0
        for network in self.networks:
            stop = start + n_channels(network)
            logits, z = self._open(
                network, x, weight, mix, mean[start:stop], var[start:stop], means, variances
            )
            rows = self.rows(z) if z is not None else rows
            start = stop
        return logits, rows, torch.cat(means), torch.cat(variances)

    def _open(self, network, x, weight, mix, mean, var, means, variances):
        """Output of `network` with its statistics open, and z at the cut if it is the one that has it."""
        here_of = slices(network)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        at_cut: list[Tensor] = []
        has_cut = network is self.networks[0]

        def norm(site: Norm, y: Tensor) -> Tensor:
            here = here_of[site.node]
            m, v = window_statistics(y, weight)
            found[site.node] = m, v
            gap = m - mean[here]
            used_mean = mean[here] + mix * gap
            used_var = (1.0 - mix) * var[here] + mix * v + mix * (1.0 - mix) * gap * gap
            scale = site.gamma / torch.sqrt(used_var + site.eps)
            return y * _along(scale, y) + _along(site.beta - used_mean * scale, y)

        def watch(node, value, args):
            if has_cut and node.name == self.cut:
                at_cut.append(value)

        only_cut = has_cut and self.student is not None
        output = network.run(x, until=self.cut if only_cut else None, norm=norm, watch=watch)
        for site in network.norms:
            means.append(found[site.node][0])
            variances.append(found[site.node][1])
        return output, at_cut[0] if has_cut else None


def n_channels(network: Network) -> int:
    return sum(norm.channels for norm in network.norms)


def slices(network: Network) -> dict[str, slice]:
    """Where each normalisation's channels are among those of the network, by call site."""
    found, start = {}, 0
    for norm in network.norms:
        found[norm.node] = slice(start, start + norm.channels)
        start += norm.channels
    return found


def window_statistics(y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel of y (B, C, …) over items weighted by `weight` (B,) and all positions."""
    spatial = list(range(2, y.ndim))
    per_item = y.mean(spatial) if spatial else y
    mean = torch.matmul(weight[None, :], per_item)[0]
    centred = y - _along(mean, y)
    square = centred * centred
    per_item = square.mean(spatial) if spatial else square
    return mean, torch.matmul(weight[None, :], per_item)[0]


def _along(v: Tensor, like: Tensor) -> Tensor:
    return v.reshape(1, -1, *[1] * (like.ndim - 2))


def with_virtual_norms(network: Network, batches: list[Tensor]) -> Network:
    """`network` with an identity normalisation after each layer that no normalisation follows, the last excepted,
    and those that only another layer reads: what they lack, it makes up for.

    Their statistics are measured on `batches` (preprocessed inputs (n, …)), so that a network whose
    normalisation was folded away can be adapted all the same.
    """
    from edgesolve.host import network as net

    followed = {n.layer for n in network.norms} | {
        next((a.name for a in source_layer(network, n.node).all_input_nodes), "")
        for n in network.norms
    }
    layers = [
        n
        for n in network.nodes
        if n.target in net._FOLDABLE
        and n.name not in followed
        and not all(u.target in net._FOLDABLE for u in n.users)
    ]
    if layers and layers[-1].target is net.aten.linear.default:
        layers = layers[:-1]
    sums: dict[str, list[Tensor]] = {}

    def watch(node, value, args):
        if node.name in chosen:
            flat = value.double().transpose(0, 1).flatten(1)
            n = torch.tensor(float(flat.shape[1]), dtype=torch.float64)
            add = [n, flat.sum(1), (flat * flat).sum(1)]
            old = sums.get(node.name)
            sums[node.name] = add if old is None else [a + b for a, b in zip(old, add, strict=True)]

    chosen = {n.name for n in layers}
    if not chosen:
        return network
    with torch.no_grad():
        for x in batches:
            network.run(x, watch=watch)
    made = []
    for node in layers:
        n, total, square = sums[node.name]
        mean = total / n
        var = (square / n - mean * mean).clamp(min=0.0)
        eps = 1e-5
        made.append(
            Norm(
                f"{net.module_of(node) or node.name} (virtual)",
                node.name,
                len(mean),
                torch.sqrt(var + eps).float(),
                mean.float(),
                mean.float(),
                var.float(),
                eps,
                node.name,
                virtual=True,
            )
        )
    order = {n.name: i for i, n in enumerate(network.nodes)}
    norms = sorted([*network.norms, *made], key=lambda norm: order[norm.node])
    return replace(network, norms=tuple(norms))
