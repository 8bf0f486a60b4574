"""What block coordinate descent is benchmarked on: MNIST as patches or pixels, human activity as features."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from real_data import folder

TRAIN_SUBJECTS = 9
"""Subjects 1 to 9 train, 10 to 14 test: nobody is in both."""


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Rows x (n positions, d) float32 and labels y (n,) of both sides."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    positions: int
    n_classes: int

    @property
    def one_hot(self) -> np.ndarray:
        return np.eye(self.n_classes, dtype=np.float32)[self.y]


def patches(images: np.ndarray, size: int = 3, stride: int = 2) -> np.ndarray:
    """(n, h, w) -> (n positions, size²), positions row by row."""
    view = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))
    return np.ascontiguousarray(view[:, ::stride, ::stride]).reshape(-1, size * size)


def digits(seed: int, n: int, n_test: int, *, flat: bool = False) -> Split:
    """A random subset of MNIST's training part; n_test of its test images in a fixed order, pixels 0..1."""
    with np.load(folder() / "mnist" / "mnist.npz") as archive:
        x, y, x_test, y_test = (archive[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    pick = np.random.default_rng(seed).permutation(len(x))[:n]
    far = np.random.default_rng(0).permutation(len(x_test))[:n_test]
    sides = [(v / np.float32(255.0)).astype(np.float32) for v in (x[pick], x_test[far])]
    rows = [v.reshape(len(v), -1) if flat else patches(v) for v in sides]
    labels = y[pick].astype(np.int64), y_test[far].astype(np.int64)
    return Split(rows[0], labels[0], rows[1], labels[1], 1 if flat else 169, 10)


def activity(window: int = 100, hop: int = 50) -> Split:
    """USC-HAD by subject: 561 features of each 4 s window, standardised by the training side and cut at ±5.

    As many as UCI-HAR has, of the same kind, so that the published shapes and ranks apply: 51 of each of
    11 signals (6 axes, the two magnitudes, the two jerks' magnitudes, acceleration along the window's
    mean): mean, deviation, 7 quantiles, mean absolute deviation and difference, log spectrum of 40 bins.
    """
    with np.load(folder() / "usc_had" / "usc_had_25hz.npz") as archive:
        x, offsets, subject, label = (archive[k] for k in ("x", "offsets", "subject", "activity"))
    parts, y, who = [], [], []
    for k, (a, b) in enumerate(pairwise(offsets)):
        starts = range(a, b - window + 1, hop)
        parts += [x[s : s + window] for s in starts]
        y += [label[k]] * len(starts)
        who += [subject[k]] * len(starts)
    rows, y, near = _features(np.stack(parts)), np.array(y, np.int64), np.array(who)
    y, near = y - y.min(), near <= TRAIN_SUBJECTS
    mean, size = rows[near].mean(axis=0), rows[near].std(axis=0) + 1e-6
    rows = np.clip((rows - mean) / size, -5.0, 5.0).astype(np.float32)
    return Split(rows[near], y[near], rows[~near], y[~near], 1, int(y.max()) + 1)


def _features(x):
    x = x.astype(np.float64)
    jerk = np.diff(x, axis=1, prepend=x[:, :1])
    sizes = [np.linalg.norm(v[..., s], axis=2) for v in (x, jerk) for s in (slice(3), slice(3, 6))]
    mean = x[..., :3].mean(axis=1, keepdims=True)
    along = np.sum(x[..., :3] * mean, axis=2) / (np.linalg.norm(mean, axis=2) + 1e-9)
    made = []
    for s in [*np.moveaxis(x, 2, 0), *sizes, along]:
        centre = s.mean(axis=1, keepdims=True)
        spectrum = np.log1p(np.abs(np.fft.rfft(s - centre, axis=1))[:, 1:41])
        quantiles = np.quantile(s, [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], axis=1).T
        spread = np.abs(s - centre).mean(axis=1), np.abs(np.diff(s, axis=1)).mean(axis=1)
        made += [centre, s.std(axis=1)[:, None], quantiles, np.stack(spread, axis=1), spectrum]
    return np.hstack(made)
