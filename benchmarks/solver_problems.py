"""The programs that the solvers are compared on: P(U) = 1/(2n) ||sum_i D_i X U_i - Y||^2 + lam sum_g ||U_g||.

* digits: scikit-learn's 8 x 8 digits, n = 1400, d = 64, m = 90; target +1 for an even digit, -1 for an odd one.
* features: what enters ResNet-20's last block for CIFAR-10 training images, each channel averaged over the left
  and the right half, n = 4000, d = 128, m = 64; targets are the network's logits. The distillation job itself.
* fewshot: the same activation over 2 x 4 cells, 20 test images of each class, n = 200, d = 512, m = 128; targets
  are the one-hot labels. Correlated and not negative before standardising.

With c = 1 the first target. Features are standardised, constant ones zero and last (celer 0.7.4 stops early where
a group begins with one); targets are centred and there is no intercept. Gates are Gaussian from a fixed seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

SEED = 0
SIZES = {"digits": (1400, 90), "features": (4000, 64), "fewshot": (200, 128), "tiny": (120, 10)}


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One program. X (n, d) and Y (n, c) float64, G (d, m), D (n, m) bool = X G >= 0, all distinct and none empty.

    by_output : False, a group is a gate's U_i (d, c); True, a column of it (one-vs-all).
    """

    X: np.ndarray
    Y: np.ndarray
    G: np.ndarray
    D: np.ndarray
    lam: float
    by_output: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (m, d, c) of the weights."""
        return self.D.shape[1], self.X.shape[1], self.Y.shape[1]

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {name: getattr(self, name) for name in self.__slots__}
        np.savez(path, **fields)
        return path

    @classmethod
    def load(cls, path: Path) -> Problem:
        with np.load(path) as archive:
            found = {name: archive[name] for name in cls.__slots__}
        scalars = {"lam": float(found["lam"]), "by_output": bool(found["by_output"])}
        return cls(**{**found, **scalars})


def problem(
    name: str,
    ratio: float,
    cache: Path,
    *,
    outputs: int = 1,
    by_output: bool = False,
    shrink: int = 1,
) -> Problem:
    """`name` is a key of SIZES; lam = ratio x the smallest one at which U = 0 is optimal."""
    n, m = (size // shrink for size in SIZES[name])
    X, Y = {"digits": _digits, "tiny": _tiny}.get(name, lambda: _resnet(name, cache))()
    X, Y = standardised(X[:n]), np.asarray(Y[:n, :outputs], np.float64)
    Y = Y - Y.mean(axis=0)
    G, D = gates(X, m)
    lam = ratio * lam_max(X, Y, D, by_output)
    return Problem(X, Y, G, D, lam, by_output)


def standardised(X: np.ndarray) -> np.ndarray:
    """Mean 0, deviation 1; constant features become 0 and come last. Fortran order, as most peers ask for."""
    X = np.asarray(X, np.float64)
    X = X - X.mean(axis=0)
    scale = X.std(axis=0)
    constant = scale < 1e-12
    X = np.where(constant, 0.0, X / np.where(constant, 1.0, scale))
    return np.asfortranarray(X[:, np.argsort(constant, kind="stable")])


def gates(X: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """G (d, m) and D (n, m): the first m distinct patterns that open for some row."""
    G = np.random.default_rng(SEED).standard_normal((X.shape[1], 2 * m))
    D = X @ G >= 0
    _, first = np.unique(D, axis=1, return_index=True)
    keep = [i for i in sorted(first) if D[:, i].any()][:m]
    assert len(keep) == m
    return np.ascontiguousarray(G[:, keep]), np.asfortranarray(D[:, keep])


def lam_max(X: np.ndarray, Y: np.ndarray, D: np.ndarray, by_output: bool) -> float:
    V = np.stack([X.T @ (D * y[:, None]) for y in Y.T], axis=2) / len(X)  # (d, m, c)
    return float(np.linalg.norm(V, axis=0 if by_output else (0, 2)).max())


def _tiny():
    rng = np.random.default_rng(SEED)
    return rng.standard_normal((120, 6)), rng.standard_normal((120, 3))


def _digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.data, np.where(found.target % 2 == 0, 1.0, -1.0)[:, None]


def _resnet(name: str, cache: Path):
    with np.load(activations(cache)) as archive:
        return archive[f"{name}_x"], archive[f"{name}_y"]


def activations(cache: Path) -> Path:
    """`cache`, made if it isn't there."""
    if not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, **_activations())
    return cache


def _activations() -> dict[str, np.ndarray]:
    """Features and targets of `features` and `fewshot`; the only place that needs torch."""
    import real_data

    test = real_data.cifar_test()
    pick = np.concatenate([np.flatnonzero(test.y == k)[:20] for k in range(10)])
    z, logits = _last_block(real_data.cifar_train())
    few, _ = _last_block(test.x[pick])
    return {
        "features_x": _averaged(z, 1, 2),
        "features_y": logits,
        "fewshot_x": _averaged(few, 2, 4),
        "fewshot_y": np.eye(10)[test.y[pick]],
    }


def _averaged(z: np.ndarray, rows: int, columns: int) -> np.ndarray:
    n, c, h, w = z.shape
    cells = z.reshape(n, c, rows, h // rows, columns, w // columns)
    return cells.mean(axis=(3, 5)).reshape(n, -1)


def _last_block(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Input of ResNet-20's last block (n, 64, 8, 8), and the logits (n, 10)."""
    import real_data
    import torch
    from networks import cifar_resnet
    from safetensors.torch import load_file

    net = cifar_resnet(20).eval()
    net.load_state_dict(load_file(real_data.weights("cifar10_resnet20")))
    seen, logits = [], []
    net.layer3[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0].numpy()))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    with torch.no_grad():
        for part in np.array_split(images, -(-len(images) // 250)):
            x = ((part / 255.0 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
            logits.append(net(torch.from_numpy(np.ascontiguousarray(x))).numpy())
    return np.concatenate(seen).astype(np.float64), np.concatenate(logits).astype(np.float64)
