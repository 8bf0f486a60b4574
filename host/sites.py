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
    aten.conv2d.padding: "conv2d",
    aten.conv1d.default: "conv1d",
    aten.conv1d.padding: "conv1d",
    aten.linear.default: "linear",
}
_UNDEFINED = {
    aten.conv_transpose2d.input: "a transposed convolution",
    aten.conv3d.default: "a 3-D convolution",
    aten.convolution.default: "a convolution of another kind",
}
_BY_RULE = (aten.conv2d.padding, aten.conv1d.padding)
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

    def along(self, axes: str) -> tuple[list[int], list[int], list[int]]:
        """(stride, padding, dilation) of a factor that works along `axes`, each [along h, along w]."""
        stride, padding, dilation = (
            [v if axis in axes else other for axis, v in zip("hw", pair, strict=True)]
            for pair, other in ((self.stride, 1), (self.padding, 0), (self.dilation, 1))
        )
        return stride, padding, dilation

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Weight and bias as the call site takes them, float32."""
        weight = torch.from_numpy(self.laid_out(self.weight))
        return weight.float(), torch.from_numpy(self.bias).float()

    def laid_out(self, weight: np.ndarray) -> np.ndarray:
        """A weight or factor (o, i, kh, kw) with the axes that a call of this kind takes."""
        unused = {"conv2d": (), "conv1d": (3,), "linear": (2, 3)}[self.kind]
        return np.ascontiguousarray(np.squeeze(weight, unused))


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
        if node.target not in _LAYERS:
            continue
        reason = _uncarried(node, network)
        if reason:
            refused[name] = f"{reason}; left dense"
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


def _uncarried(node: Node, network: Network) -> str:
    """Why the layer at `node` can't be stated as a Site, or ''."""
    if node.args[1].op != "get_attr":
        return "its weight is computed by the network"
    kernel = network.constants[str(node.args[1].target)].shape[2:]
    if node.target in _BY_RULE and None in _ruled(_options(node), kernel):
        return "padded by 'same' with more behind than before"
    return ""


def _options(node: Node) -> list:
    """[stride, padding, dilation, groups] as the graph states them, None where it doesn't."""
    if _LAYERS[node.target] == "linear":
        return [None] * 4
    return [*node.args[3:], *[None] * 4][:4]


def _ruled(options: list, kernel) -> list[int | None]:
    """Padding of 'same' or 'valid' along each axis of `kernel`; None where the two sides differ."""
    if options[1] != "same":
        return [0] * len(kernel)
    dilation = options[2] or [1] * len(kernel)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return [t // 2 if t % 2 == 0 else None for t in total]


def _site(network, node, name, extents, norm) -> Site:
    weight, bias = layer_parameters(network, node)
    given = _options(node)
    if node.target in _BY_RULE:
        given[1] = _ruled(given, weight.shape[2:])
    if norm is not None:
        weight, bias = fold_layer(network, norm)
    weight = weight.double().numpy()
    weight = weight.reshape(*weight.shape, *[1] * (4 - weight.ndim))
    shift = np.zeros(len(weight)) if bias is None else bias.double().numpy()
    stride, padding, dilation = (_pair(v, d) for v, d in zip(given[:3], (1, 0, 1), strict=True))
    return Site(
        node.name,
        name,
        _LAYERS[node.target],
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
