"""The layers of a traced network that can be replaced, with normalisation folded in; and why others can't."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from edgesolve.host.adaptable import fold_layer
from edgesolve.host.chain import Positions
from edgesolve.host.network import (
    Network,
    Norm,
    aten,
    layer_parameters,
    module_of,
)

_LAYERS = {
    aten.conv2d.default: "conv2d",
    aten.conv1d.default: "conv1d",
    aten.linear.default: "linear",
}
_UNDEFINED = {
    aten.conv_transpose2d.input: "a transposed convolution",
    aten.conv3d.default: "a 3-D convolution",
    aten.convolution.default: "a convolution of another kind",
    aten.conv2d.padding: "padded by a rule, 'same' or 'valid'",
    aten.conv1d.padding: "padded by a rule, 'same' or 'valid'",
}
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One call of a convolution or linear layer.

    weight (T, c / groups, kh, kw), bias (T,): float64, normalisation folded in. A Conv1d works along h; a Linear
    is a 1×1. `norm`: the call site of the folded normalisation. `at`: input and output extent.
    """

    node: str
    name: str
    kind: str
    weight: np.ndarray
    bias: np.ndarray
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    at: Positions
    norm: str | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one group: (T / groups, c / groups, kh, kw)."""
        T, c, kh, kw = self.weight.shape
        return T // self.groups, c, kh, kw

    @property
    def macs(self) -> int:
        return self.weight.size * self.at.after[0] * self.at.after[1]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as the call site takes them, float32."""
        weight = {
            "conv2d": self.weight,
            "conv1d": self.weight[..., 0],
            "linear": self.weight[:, :, 0, 0],
        }[self.kind]
        return torch.from_numpy(weight).float(), torch.from_numpy(self.bias).float()


def sites(network: Network) -> tuple[list[Site], dict[str, str]]:
    """Every layer in order, and for those that no decomposition is defined for: name -> the reason."""
    extents = _extents(network)
    folded = {n.layer: n for n in network.norms if n.layer is not None and not n.virtual}
    readers = Counter(
        str(n.args[1].target)
        for n in network.nodes
        if n.target in _LAYERS and isinstance(n.args[1], Node)
    )
    found, refused = [], {}
    for node in network.nodes:
        name = module_of(node) or node.name
        if node.target in _UNDEFINED:
            refused[name] = f"{_UNDEFINED[node.target]}; left dense"
        if node.target not in _LAYERS or node.args[1].op != "get_attr":
            continue
        site = _site(network, node, name, extents, folded.get(node.name))
        found.append(site)
        if readers[str(node.args[1].target)] > 1:
            refused[name] = "its weight is used at several call sites; left dense"
        elif site.groups > 1 and site.shape[1] == 1:
            refused[name] = "one input channel per group, no rank to remove; left dense"
    return found, refused


def folded_run(network: Network, found: list[Site]):
    """(layers, norm) for Network.run: the original network with normalisation folded into `found`."""
    layers = {s.node: s.tensors() for s in found}
    inside = {s.norm for s in found if s.norm is not None}

    def norm(site: Norm, y: Tensor) -> Tensor:
        if site.node in inside or site.virtual:
            return y
        scale = site.scale()
        shape = [1, -1] + [1] * (y.ndim - 2)
        return y * scale.view(shape) + (site.beta - site.mean * scale).view(shape)

    return layers, norm


def _site(network, node, name, extents, norm) -> Site:
    kind = _LAYERS[node.target]
    weight, bias = layer_parameters(network, node)
    if norm is not None:
        weight, bias = fold_layer(network, norm)
    weight = weight.double().numpy()
    weight = weight.reshape(*weight.shape, *[1] * (4 - weight.ndim))
    shift = np.zeros(len(weight)) if bias is None else bias.double().numpy()
    given = [*node.args[3:], *[None] * 4] if kind != "linear" else [None] * 4
    stride, padding, dilation = (_pair(v, d) for v, d in zip(given[:3], (1, 0, 1), strict=True))
    return Site(
        node.name,
        name,
        kind,
        weight,
        shift,
        stride,
        padding,
        dilation,
        int(given[3] or 1),
        Positions(*extents[node.name]),
        None if norm is None else norm.node,
    )


def _pair(value, default: int) -> Pair:
    """(along h, along w) of a stride, padding or dilation as the graph states it."""
    if value is None:
        value = [default]
    value = [value] if isinstance(value, int) else list(value)
    if len(value) == 1:
        return int(value[0]), default  # a Conv1d has no second axis
    return int(value[0]), int(value[1])


def _extents(network: Network) -> dict[str, tuple[Pair, Pair]]:
    """(h, w) of input and output of every layer, 1 where there is no such axis."""
    found: dict[str, tuple[Pair, Pair]] = {}

    def watch(node: Node, value: Tensor, args: tuple) -> None:
        if node.target in _LAYERS:
            linear = _LAYERS[node.target] == "linear"
            found[node.name] = (_extent(args[0], linear), _extent(value, linear))

    with torch.no_grad():
        network.run(network.example, watch=watch)
    return found


def _extent(value: Tensor, linear: bool) -> Pair:
    spatial = value.shape[1:-1] if linear else value.shape[2:]
    if len(spatial) == 2:
        return int(spatial[0]), int(spatial[1])
    return int(np.prod(spatial)), 1
