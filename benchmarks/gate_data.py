"""What enters the removed blocks of two CIFAR-10 networks, with their logits: computed once, kept on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import real_data
import torch
from environment import say
from networks import cifar_resnet
from safetensors.torch import load_file
from torch import Tensor

from edgesolve.host.adaptable import Preprocess
from edgesolve.host.capture import activations
from edgesolve.host.network import Cut, Network, cuts, trace

IMAGENET = Preprocess(1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SPLITS = {"resnet20": (20, "layer3.2"), "resnet56": (56, "layer3.6")}
"""Depth, and the first block that the head replaces: the last one, and the last three."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """z (n, 64, 8, 8) float16 on disk, logits (n, 10) float32, and labels (n,) of test images."""

    z: np.ndarray
    logits: np.ndarray
    y: np.ndarray | None

    def __len__(self) -> int:
        return len(self.logits)

    def batches(self, size: int = 250):
        """(z, logits) as float32 tensors, `size` items at a time."""
        for start in range(0, len(self), size):
            pick = slice(start, start + size)
            z = torch.from_numpy(self.z[pick].astype(np.float32))
            yield z, torch.from_numpy(self.logits[pick])

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """`n` items evenly spread."""
        pick = np.linspace(0, len(self) - 1, min(n, len(self))).astype(int)
        return torch.from_numpy(self.z[pick].astype(np.float32)), torch.from_numpy(
            self.logits[pick]
        )


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a head goes, the calibration images (no labels), and the test images."""

    name: str
    network: Network
    cut: Cut
    train: Part
    test: Part


def place(name: str, folder: Path, n_train: int, n_test: int) -> Place:
    """A key of SPLITS with its activations from `folder`, where missing ones are written."""
    depth, split = SPLITS[name]
    model = cifar_resnet(depth).eval()
    model.load_state_dict(load_file(real_data.weights(f"cifar10_{name}")))
    network = trace(model, (3, 32, 32))
    cut = next(c for c in cuts(network) if c.name.startswith(split + "."))
    test = real_data.cifar_test()
    folder.mkdir(parents=True, exist_ok=True)
    seen = _part(
        network, cut, real_data.cifar_train()[:n_train], folder / f"{name}-train-{n_train}"
    )
    judged = _part(network, cut, test.x[:n_test], folder / f"{name}-test-{n_test}")
    return Place(name, network, cut, Part(*seen, None), Part(*judged, test.y[: len(judged[1])]))


def _part(network, cut, x, path: Path) -> tuple[np.ndarray, np.ndarray]:
    z_file, logits_file = (path.with_name(f"{path.name}-{k}.npy") for k in ("z", "logits"))
    if not logits_file.is_file():
        say(f"activations: {path.name}")
        z = np.lib.format.open_memmap(z_file, "w+", np.float16, (len(x), *cut.shape))
        logits = []
        for start in range(0, len(x), 500):
            found, out = activations(network, cut.node, IMAGENET, x[start : start + 500])
            z[start : start + len(found)] = found.numpy()
            logits.append(out.numpy())
        z.flush()
        np.save(logits_file, np.concatenate(logits))
    return np.load(z_file, mmap_mode="r"), np.load(logits_file)
