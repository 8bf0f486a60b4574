"""Ridge-distilled heads of many sizes behind one ordered bank, from one pass over the images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gate_data import Part, Place

from edgesolve.host.rows import Rows
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.ridge import ridge

GRID = (3e-4, 1e-3, 3e-3)
RAMPS = 2


@dataclass(frozen=True, slots=True)
class Judged:
    """Percent of the test images: right, and answered as the original network does."""

    accuracy: float
    agreement: float


@dataclass(frozen=True, slots=True)
class _Head:
    columns: np.ndarray
    weights: np.ndarray
    intercept: np.ndarray


def judge(place: Place, rows: Rows, sizes) -> dict[tuple[int, int], Judged]:
    """{(m, r): Judged} for the heads with the first m filters and the first r directions of `rows`.

    Solved on all training images against the original's logits; every sixth picks the ridge beforehand.
    """
    folds = _moments(place.train, rows)
    heads = {size: _solve(folds, _columns(rows, *size)) for size in sizes}
    right, same, n = dict.fromkeys(heads, 0), dict.fromkeys(heads, 0), 0
    with torch.no_grad():
        for z, logits in place.test.batches():
            a, original = rows(z).numpy(), logits.numpy().argmax(1)
            y = place.test.y[n : n + len(a)]
            n += len(a)
            for size, head in heads.items():
                answer = (a[:, head.columns] @ head.weights + head.intercept).argmax(1)
                right[size] += int((answer == y).sum())
                same[size] += int((answer == original).sum())
    return {size: Judged(100 * right[size] / n, 100 * same[size] / n) for size in heads}


def _columns(rows: Rows, m: int, r: int) -> np.ndarray:
    """Where the rows of the smaller head stand in a row of the largest."""
    filters, values = rows.gate_weight.shape[0], rows.value_weight.shape[0]
    blocks = np.arange(RAMPS * filters * values).reshape(RAMPS, filters, values)
    directions = [*range(r), values - 1]  # the last value is the constant 1
    gated = blocks[:, :m][:, :, directions].ravel()
    return np.concatenate([gated, np.arange(blocks.size, rows.starts[-1])])


def _moments(train: Part, rows: Rows) -> tuple[Moments, Moments]:
    """Of five sixths of the images, and of the last sixth."""
    sums = [Moments.zeros(rows.starts[-1], train.logits.shape[1]) for _ in range(2)]
    n = 0
    with torch.no_grad():
        for z, logits in train.batches(1000):
            a, t = rows(z).numpy(), logits.numpy()
            held = np.arange(n, n + len(a)) % 6 == 0
            n += len(a)
            sums = [
                sums[0] + Moments.of(a[~held], t[~held]),
                sums[1] + Moments.of(a[held], t[held]),
            ]
    return sums[0], sums[1]


def _solve(folds: tuple[Moments, Moments], columns: np.ndarray) -> _Head:
    fit, held = (_restricted(m, columns) for m in folds)

    def error(relative: float) -> float:
        found = ridge(fit, relative)
        return held.mean_squared_error(found.weights, found.intercept)

    found = ridge(fit + held, min(GRID, key=error))
    return _Head(columns, *(a.astype(np.float32) for a in (found.weights, found.intercept)))


def _restricted(moments: Moments, k: np.ndarray) -> Moments:
    sxx = moments.sxx[np.ix_(k, k)]
    return Moments(moments.n, moments.sx[k], sxx, moments.stx[:, k], moments.st, moments.stt)
