"""Put factored layers into a network: the whole is a module again, to be traced, run and exported."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesolve.host.chain import Chain
from edgesolve.host.network import Network
from edgesolve.host.sites import Site, folded_run


class Factored(nn.Module):
    """x -> what the layer at `site` gives, through the factors of `chain`; the last one has the bias (T,)."""

    def __init__(
        self, site: Site, chain: Chain, bias: np.ndarray, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.site, self.chain = site, chain
        for i, factor in enumerate(chain.factors):
            weight = torch.from_numpy(site.laid_out(factor.weight))
            self.register_buffer(f"weight_{i}", weight.to(dtype))
        self.register_buffer("bias", torch.from_numpy(np.asarray(bias)).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.chain.factors) - 1
        for i in range(last + 1):
            x = self._factor(x, i, self.bias if i == last else None)
        return x

    def _factor(self, x: Tensor, i: int, bias: Tensor | None) -> Tensor:
        site, factor, weight = self.site, self.chain.factors[i], getattr(self, f"weight_{i}")
        if site.kind == "linear":
            return F.linear(x, weight, bias)
        stride, padding, dilation = site.along(factor.axes)
        if site.kind == "conv1d":
            return F.conv1d(x, weight, bias, stride[0], padding[0], dilation[0], factor.groups)
        return F.conv2d(x, weight, bias, stride, padding, dilation, factor.groups)


class Compressed(nn.Module):
    """The network behind `found`, normalisation folded, with `layers[node]` in the place of each layer.

    Every layer is a submodule under its own dotted name, so that tracing this module again keeps the names.
    """

    def __init__(self, network: Network, found: list[Site], layers: Mapping[str, nn.Module]):
        super().__init__()
        self.network = network
        _, self.norm = folded_run(network, found)
        self.places = {}
        for site in found:
            module = layers.get(site.node) or Dense(site)
            self.places[site.node] = module
            _mount(self, site.name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.network.run(x, norm=self.norm, layers=self.places)


class Dense(nn.Module):
    """The layer at `site` itself, normalisation folded in; weight and bias may be others of the same shape."""

    def __init__(
        self, site: Site, weight: np.ndarray | None = None, bias: np.ndarray | None = None
    ):
        super().__init__()
        self.site = site
        own_weight, own_bias = site.tensors()
        if weight is not None:
            own_weight = torch.from_numpy(weight).float().reshape(own_weight.shape)
        if bias is not None:
            own_bias = torch.from_numpy(bias).float()
        self.register_buffer("weight", own_weight)
        self.register_buffer("bias", own_bias)

    def forward(self, x: Tensor) -> Tensor:
        site = self.site
        if site.kind == "linear":
            return F.linear(x, self.weight, self.bias)
        if site.kind == "conv1d":
            options = (site.stride[0], site.padding[0], site.dilation[0], site.groups)
            return F.conv1d(x, self.weight, self.bias, *options)
        return F.conv2d(
            x, self.weight, self.bias, site.stride, site.padding, site.dilation, site.groups
        )


def _mount(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register `module` at the dotted `path`, with plain containers on the way; what is taken gets a longer name."""
    *folders, last = path.split(".")
    at = root
    for part in folders:
        while hasattr(at, part) and part not in at._modules:  # the replay's own, such as `network`
            part += "_"
        if part not in at._modules:
            at.add_module(part, nn.Module())
        at = at._modules[part]
    name, count = last, 1
    while hasattr(at, name):
        count += 1
        name = f"{last}_{count}"
    at.add_module(name, module)
