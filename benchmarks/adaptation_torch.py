"""References in torch on the whole original network: statistics re-estimated, Tent, and what published methods do
with its own last embedding.

    python benchmarks/adaptation_torch.py Tent FRAMES.npy     seconds and peak memory of one, as JSON
"""

from __future__ import annotations

import json
import sys
import time
from copy import deepcopy
from functools import cached_property

import numpy as np
import real_data
import torch
from compression_cases import IMAGENET
from networks import cifar_resnet
from safetensors.torch import load_file
from torch import nn

from edgesolve.device.board import peak_rss_mib
from edgesolve.device.runtime import Head

CHUNK = 100


class Original:
    """The published ResNet-20 on uint8 frames (n, 32, 32, 3)."""

    @cached_property
    def model(self) -> nn.Module:
        model = cifar_resnet(20)
        model.load_state_dict(load_file(str(real_data.weights("cifar10_resnet20"))))
        return model.eval()

    @cached_property
    def head(self) -> Head:
        """The last linear layer, whose input `embedding` gives."""
        layer = self.model.linear
        return Head(layer.weight.detach().numpy().T.copy(), layer.bias.detach().numpy().copy())

    def embedding(self, frames: np.ndarray) -> np.ndarray:
        """(n, 64) float32."""
        model = deepcopy(self.model)
        model.linear = nn.Identity()
        return logits(model, frames)

    def reestimated(self, frames: np.ndarray) -> nn.Module:
        """Every normalisation with the mean and variance of `frames`, taken as one batch."""
        return _with_statistics_of(deepcopy(self.model), frames)

    def tent(self, frames: np.ndarray, batch: int = 64, rate: float = 1e-3) -> nn.Module:
        """Tent (Wang et al. 2021): one pass over `frames`, in which Adam lowers the entropy of the answers by the
        normalisations' weights and biases, each batch normalised by its own statistics; then those of all frames."""
        model = deepcopy(self.model)
        norms = _norms(model)
        model.requires_grad_(False)
        for norm in norms:
            norm.requires_grad_(True).train()
        adam = torch.optim.Adam([p for norm in norms for p in norm.parameters()], lr=rate)
        for part in _batches(frames, batch):
            log_p = model(part).log_softmax(1)
            loss = -(log_p.exp() * log_p).sum(1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        return _with_statistics_of(model.requires_grad_(False), frames)


def logits(model: nn.Module, frames: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([model(part).numpy() for part in _batches(frames, CHUNK)])


def _with_statistics_of(model: nn.Module, frames: np.ndarray) -> nn.Module:
    for norm in _norms(model):
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        model(next(_batches(frames, len(frames))))
    return model.eval()


def _norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def _batches(frames: np.ndarray, size: int):
    for start in range(0, len(frames), size):
        yield IMAGENET(torch.from_numpy(np.ascontiguousarray(frames[start : start + size])))


METHODS = {"BN re-estimated": Original.reestimated, "Tent": Original.tent}


def main() -> None:
    """METHOD FRAMES.npy"""
    _, name, frames = sys.argv
    torch.set_num_threads(1)
    original, began = Original(), time.perf_counter()
    METHODS[name](original, np.load(frames))
    print(json.dumps({"seconds": time.perf_counter() - began, "peak_mib": peak_rss_mib()}))


if __name__ == "__main__":
    main()
