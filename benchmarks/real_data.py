"""The real data sets of the benchmarks: CIFAR-10 images and keyword MFCCs, never copied into the project.

EDGESOLVE_DATA names the folder; without it ../shared/data beside the checkout is tried.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Labelled:
    """x (n, h, w, c) uint8 or float32, y (n,) int64."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def take(self, pick) -> Labelled:
        return Labelled(self.x[pick], self.y[pick])


def folder() -> Path:
    """The data folder. Raises SystemExit with one sentence where there is none."""
    found = Path(os.environ.get("EDGESOLVE_DATA") or ROOT.parent / "shared" / "data")
    if not (found / "cifar10" / "x_test.npy").is_file():
        raise SystemExit(f"{found}: no cifar10/x_test.npy there. Set EDGESOLVE_DATA.")
    return found


def weights(name: str) -> Path:
    return folder() / "weights" / f"{name}.safetensors"


def cifar_train() -> np.ndarray:
    """12,000 training images (n, 32, 32, 3) uint8. Labels are not read: calibration needs none."""
    return np.load(folder() / "cifar10" / "x_train.npy")


def cifar_test() -> Labelled:
    """The 10,000 test images."""
    x, y = (np.load(folder() / "cifar10" / f"{k}_test.npy") for k in "xy")
    return Labelled(x, y.astype(np.int64).ravel())


def keywords() -> tuple[np.ndarray, Labelled]:
    """600 unlabelled items to calibrate on, and the 400 others: MFCC (n, 49, 10, 1) float32.

    The published set has 1,000 items and no training part; a fixed permutation divides them.
    """
    with np.load(folder() / "kws" / "mfcc.npz") as archive:
        mfcc, y = archive["mfcc_i8"], archive["y"].astype(np.int64).ravel()
    x = ((mfcc.astype(np.float32) - 83.0) * np.float32(0.5847029))[..., None]
    order = np.random.default_rng(0).permutation(len(x))
    return x[order[:600]], Labelled(x, y).take(order[600:])
