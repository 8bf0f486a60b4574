"""What may happen to a camera: three shifts of uint8 images, seeded, re-quantised to uint8."""

from __future__ import annotations

import sys

import numpy as np


def noise(x: np.ndarray, sigma: float = 0.08, seed: int = 0) -> np.ndarray:
    """Gaussian noise on [0, 1] images x (n, h, w, c)."""
    generator = np.random.default_rng(seed)
    return x + np.float32(sigma) * generator.standard_normal(x.shape, dtype=np.float32)


def blur(x: np.ndarray) -> np.ndarray:
    """The mean over 3 x 3 pixels; edges repeat."""
    h, w = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    return sum(padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)) / 9


def contrast(x: np.ndarray, factor: float = 0.3) -> np.ndarray:
    """Toward each image's own mean grey."""
    grey = x.mean((1, 2, 3), keepdims=True)
    return grey + factor * (x - grey)


SHIFTS = {"none": None, "noise": noise, "blur": blur, "contrast": contrast}


def shifted(name: str, x: np.ndarray) -> np.ndarray:
    """uint8 images x (n, h, w, c) under the shift `name`, as uint8."""
    if SHIFTS[name] is None:
        return x
    moved = SHIFTS[name](x.astype(np.float32) / 255)
    return np.round(np.clip(moved, 0, 1) * 255).astype(np.uint8)


def main() -> None:
    """python benchmarks/shifts.py noise IN.npz OUT.npz: the same items, x shifted, y kept."""
    _, name, source, target = sys.argv
    with np.load(source, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    np.savez(target, **{**arrays, "x": shifted(name, arrays["x"])})


if __name__ == "__main__":
    main()
