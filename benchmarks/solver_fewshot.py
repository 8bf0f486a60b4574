"""CIFAR-10 behind a frozen ResNet-20, few labelled samples: what the accuracy section and the ablations share.

z is what enters the last block (64 positions, 64 channels). The backbone saw the training images with their labels,
so samples come from the first 5,000 test images and the judges are the other 5,000. z is standardised by the
5,000 unlabelled images of the pool. Draws are nested: the 10 samples of a class are among its 25.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import real_data

from edgesolve.kernels.designs import Explicit
from edgesolve.kernels.gated import gated_pool
from edgesolve.kernels.gates import pattern, seeded_gates

POOL, PER_CLASS, GATES, CLASSES = 5000, 100, 64, 10
LOO_GRID = 10.0 ** np.arange(-2.0, 1.1, 0.5)


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """z (n, p, d) float32, standardised; y (n,); filters (64, d, 3, 3), bias (64,) of the removed block on raw z."""

    z: np.ndarray
    y: np.ndarray
    filters: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def load(cls, out: Path, quick: bool) -> Features:
        cache = out / "solver_accuracy_z.npz"
        if not cache.is_file():
            out.mkdir(parents=True, exist_ok=True)
            np.savez(cache, **_activations())
        with np.load(cache) as archive:
            found = {name: archive[name] for name in archive.files}
        n = POOL + (1000 if quick else POOL)
        z = found["z"][:n].astype(np.float32)
        mean, scale = z[:POOL].mean(axis=(0, 1)), z[:POOL].std(axis=(0, 1)) + 1e-6
        z -= mean
        z /= scale
        return cls(z, found["y"][:n], found["filters"], found["bias"], mean, scale)

    def spread(self, G: np.ndarray) -> np.ndarray:
        """Deviation of g'z over the unlabelled pool, per gate."""
        return (self.z[:POOL:20].reshape(-1, G.shape[1]) @ G.T).std(axis=0)

    def draw(self, seed: int) -> Draw:
        rng = np.random.default_rng(seed)
        each = [rng.permutation(np.flatnonzero(self.y[:POOL] == c))[:PER_CLASS] for c in range(10)]
        return Draw(self, seed, np.stack(each, axis=1).ravel())


@dataclass(frozen=True, eq=False)
class Draw:
    """One seed: `order` interleaves the classes, so that its first 10 k images are k of each."""

    features: Features
    seed: int
    order: np.ndarray

    @cached_property
    def z(self) -> np.ndarray:
        """The 1,000 samples and then the judges."""
        return np.concatenate([self.features.z[self.order], self.features.z[POOL:]])

    @cached_property
    def y(self) -> np.ndarray:
        return np.concatenate([self.features.y[self.order], self.features.y[POOL:]])

    @cached_property
    def gates(self) -> tuple[np.ndarray, np.ndarray]:
        """Seeded, with a spread bias as `host/gates.py` gives them; a larger bank begins with this one."""
        return bank(self.z.shape[2], GATES, self.seed)

    @cached_property
    def gated(self) -> np.ndarray:
        """Rows of one ramp for each gate, a deviation wide, as `host/rows.py` has them."""
        return gated_rows(self.z, ramps(self.z, *self.gates, self.features.spread(self.gates[0])))

    @cached_property
    def hard(self) -> np.ndarray:
        """Rows of gates that are open or closed, as the papers have them."""
        return gated_rows(self.z, patterns(self.z, *self.gates))

    @cached_property
    def filters(self) -> np.ndarray:
        """Gates (n, p, 64) of the removed block: where its first convolution, normalised, would be open."""
        import torch

        f, side, out = self.features, int(self.z.shape[1] ** 0.5), []
        filters, bias = torch.from_numpy(f.filters), torch.from_numpy(f.bias)
        for z in np.array_split(self.z, len(self.z) // 250):
            raw = (z * f.scale + f.mean).transpose(0, 2, 1).reshape(len(z), -1, side, side)
            raw = torch.from_numpy(np.ascontiguousarray(raw))
            s = torch.nn.functional.conv2d(raw, filters, bias, padding=1)
            out.append((s >= 0).flatten(2).transpose(1, 2).numpy())
        return np.concatenate(out)

    @cached_property
    def filtered(self) -> np.ndarray:
        """Rows of the block's first 16 filters: with their 577 numbers each, half the size of `gated`'s head."""
        return gated_rows(self.z, self.filters[:, :, :16])

    @cached_property
    def linear(self) -> np.ndarray:
        return self.z.mean(axis=1)

    @cached_property
    def random_features(self) -> np.ndarray:
        """relu(g'z + b), pooled: as many as the gated head has rows' entries."""
        G, b = bank(self.z.shape[2], self.gated.shape[1], self.seed)
        parts = np.array_split(self.z, len(self.z) // 50)
        return np.concatenate([np.maximum(z @ G.T + b, 0.0).mean(axis=1) for z in parts])

    def labels(self, k: int) -> np.ndarray:
        return np.eye(CLASSES)[self.y[: CLASSES * k]]

    def accuracy(self, rows: np.ndarray, weights: np.ndarray, intercept: np.ndarray) -> float:
        """Percent of the judges; `rows` are all of this draw."""
        logits = rows[CLASSES * PER_CLASS :] @ weights.astype(rows.dtype) + intercept
        return self.judged(logits)

    def judged(self, logits: np.ndarray) -> float:
        return 100.0 * float((logits.argmax(axis=1) == self.y[CLASSES * PER_CLASS :]).mean())


def bank(d: int, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    spread = np.random.default_rng(seed).normal(size=m)
    return seeded_gates(d, m, seed), (0.3 * d**0.5 * spread).astype(np.float32)


def patterns(z: np.ndarray, G: np.ndarray, b: np.ndarray) -> np.ndarray:
    return z @ G.T + b >= 0


def ramps(z: np.ndarray, G: np.ndarray, b: np.ndarray, spread: np.ndarray) -> np.ndarray:
    return pattern(z, G / spread[:, None], b / spread, tau=1.0)


def gated_rows(z: np.ndarray, D: np.ndarray) -> np.ndarray:
    """Gate every position, then pool; the last group is the always-open gate."""
    return gated_pool(z, np.concatenate([D, np.ones((*D.shape[:2], 1), D.dtype)], axis=2))


def grouped(rows: np.ndarray, d: int = 64) -> Explicit:
    return Explicit(rows, np.arange(0, rows.shape[1] + 1, d))


def ridge_by_loo(A: np.ndarray, Y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(weights, intercept, absolute ridge) of the ridge with the least leave-one-out squared error.

    The grid is relative to the mean eigenvalue of the centred n x n kernel; one decomposition serves it all.
    Same residuals as `sample_space.leave_one_out`.
    """
    A = A.astype(np.float64)
    mean, n = A.mean(axis=0), len(A)
    A -= mean
    values, vectors = np.linalg.eigh(A @ A.T)
    values = np.maximum(values, 0.0)
    along, found = vectors.T @ (Y - Y.mean(axis=0)), []
    for share in LOO_GRID:
        shift = share * values.mean()
        alpha = vectors @ (along / (values + shift)[:, None])
        # Diagonal of the inverse on the ones' complement: centring put a zero eigenvalue there.
        inverse = np.square(vectors) @ (1.0 / (values + shift)) - 1.0 / (n * shift)
        found.append((float(np.square(alpha / inverse[:, None]).sum()), shift / n, alpha))
    _, ridge, alpha = min(found, key=lambda one: one[0])
    U = A.T @ alpha
    return U, Y.mean(axis=0) - mean @ U, ridge


def _activations() -> dict[str, np.ndarray]:
    import torch
    from networks import cifar_resnet
    from safetensors.torch import load_file

    net = cifar_resnet(20).eval()
    net.load_state_dict(load_file(real_data.weights("cifar10_resnet20")))
    block, seen, test = net.layer3[-1], [], real_data.cifar_test()
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0].half().numpy()))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    with torch.no_grad():
        for part in np.array_split(test.x, 40):
            x = ((part / 255.0 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
            net(torch.from_numpy(np.ascontiguousarray(x)))
    z = np.concatenate(seen)
    norm = block.bn1
    gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return {
        "z": np.ascontiguousarray(z.reshape(*z.shape[:2], -1).transpose(0, 2, 1)),
        "y": test.y,
        "filters": (block.conv1.weight * gain[:, None, None, None]).detach().numpy(),
        "bias": (norm.bias - norm.running_mean * gain).detach().numpy(),
    }
