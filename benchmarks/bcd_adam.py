"""The gradient baseline: the same layers by Adam, cross-entropy or squares, a learning rate that falls to 0."""

from __future__ import annotations

import numpy as np
import torch
from bcd_data import Split
from torch import nn


class Layers(nn.Module):
    """A linear map of each patch (or of the row), ReLU, flattened; then linear layers with ReLU between."""

    def __init__(self, d: int, widths: tuple[int, ...], positions: int):
        super().__init__()
        self.positions = positions
        sizes = [d, *widths]
        sizes_in = [s * (positions if i == 1 else 1) for i, s in enumerate(sizes[:-1])]
        self.maps = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes_in, widths, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.maps[0](x).reshape(len(x) // self.positions, -1)
        for layer in self.maps[1:]:
            out = layer(out.relu())
        return out


def trained(
    split: Split,
    widths: tuple[int, ...],
    *,
    seed: int,
    epochs: int,
    net: Layers | None = None,
    masks: list[np.ndarray | None] | None = None,
    rate: float = 1e-3,
    squared: bool = False,
) -> Layers:
    """Adam, batches of 100. `net`: go on from it; `masks`: entries of each weight that may be other than 0.

    squared : half the squared distance to one-hot targets, the loss of block coordinate descent.
    """
    torch.manual_seed(seed)
    net = net or Layers(split.x.shape[1], widths, split.positions)
    x = torch.from_numpy(split.x).reshape(len(split.y), -1, split.x.shape[1])
    y = torch.from_numpy(split.y)
    optimiser = torch.optim.Adam(net.parameters(), rate)
    for epoch in range(epochs):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1.0 - epoch / epochs)
        for pick in torch.randperm(len(y)).split(100):
            optimiser.zero_grad()
            out = net(x[pick].flatten(0, 1))
            if squared:
                loss = (
                    0.5 * ((out - nn.functional.one_hot(y[pick], out.shape[1])) ** 2).sum(1).mean()
                )
            else:
                loss = nn.functional.cross_entropy(out, y[pick])
            loss.backward()
            optimiser.step()
            for layer, mask in zip(net.maps, masks or [], strict=False):
                if mask is not None:
                    layer.weight.data *= torch.from_numpy(mask)
    return net


def arrays(net: Layers) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Weights and biases."""
    return (
        [m.weight.detach().numpy().copy() for m in net.maps],
        [m.bias.detach().numpy().copy() for m in net.maps],
    )


def equal_width(d: int, n_hidden: int, c: int, n_params: int) -> int:
    """The width of `n_hidden` equal hidden layers whose weights number closest to n_params, not fewer."""
    width = 1
    while d * width + (n_hidden - 1) * width**2 + width * c < n_params:
        width += 1
    return width
