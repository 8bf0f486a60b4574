"""Which input channels a layer can do without, with what is left refitted exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgesolve.host.metric import Metric
from edgesolve.host.obs import Trace, inverse
from edgesolve.host.prune import refit


class Kept(NamedTuple):
    """A layer on fewer input channels.

    kept (k,) int, ascending: the channels it reads; weight (T, k, kh, kw), bias (T,) float64: the best ones on
    them; distortion: of the layer's output, as `Metric` defines it. Whatever makes the other channels can go.
    """

    kept: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    distortion: float


def eliminate_channels(metric: Metric, shape: Sequence[int]) -> Trace:
    """The order in which input channels leave, each the cheapest at its time, and what each costs.

    shape (T, c, kh, kw) of the layer. The trace has one row: order (1, c), loss (1, c), D = c.
    Block b leaves all outputs at once: loss tr(W_b [H⁻¹]_bb⁻¹ W_b'), W -= W_b [H⁻¹]_bb⁻¹ [H⁻¹]_b:, and the
    Schur complement of H⁻¹: exact for each step (block OBS; Frantar & Alistarh 2022, section 4).
    c D² kh kw / 3 multiply-adds, memory 3 D² floats.
    """
    _, c, kh, kw = _checked(metric, shape)
    K = kh * kw
    W, P, left = metric.least_squares(), inverse(metric), np.arange(c)
    order, loss = [], []
    while left.size:
        losses = _block_losses(W, P, K)
        b = int(np.argmin(losses))
        order.append(left[b])
        loss.append(losses[b])
        W, P = _without(W, P, np.arange(b * K, (b + 1) * K))
        left = np.delete(left, b)
    return Trace(np.array([order]), np.array([loss]), metric.distortion(metric.least_squares()), c)


def remove_channels(metric: Metric, shape: Sequence[int], keep: int | Sequence[int]) -> Kept:
    """The layer on `keep` channels: so many, chosen by elimination; or these."""
    T, c, kh, kw = _checked(metric, shape)
    if isinstance(keep, int | np.integer):
        if not 1 <= keep <= c:
            raise ValueError(f"keep must lie in 1..{c} channels, got {keep}.")
        mask = eliminate_channels(metric, shape).mask(c - int(keep))[0]
    else:
        mask = _named(keep, c)
    W = refit(metric, np.broadcast_to(np.repeat(mask, kh * kw), (T, metric.D)))
    weight = np.ascontiguousarray(W.reshape(T, c, kh, kw)[:, mask])
    return Kept(np.flatnonzero(mask), weight, metric.bias(W), metric.distortion(W))


def _block_losses(W: np.ndarray, P: np.ndarray, K: int) -> np.ndarray:
    """(n,): tr(W_b P_bb⁻¹ W_b') for each of the n blocks of K inputs."""
    n = len(P) // K
    blocks = P.reshape(n, K, n, K)[np.arange(n), :, np.arange(n), :]
    weights = W.T.reshape(n, K, len(W))
    return np.maximum(np.sum(weights * np.linalg.solve(blocks, weights), axis=(1, 2)), 0.0)


def _without(W: np.ndarray, P: np.ndarray, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W and P = H⁻¹ after these inputs have left."""
    left = np.delete(np.arange(len(P)), inputs)
    spread = np.linalg.solve(P[np.ix_(inputs, inputs)], P[np.ix_(inputs, left)])
    P_left = P[np.ix_(left, left)] - P[np.ix_(left, inputs)] @ spread
    return W[:, left] - W[:, inputs] @ spread, (P_left + P_left.T) / 2


def _checked(metric: Metric, shape: Sequence[int]) -> tuple[int, int, int, int]:
    T, c, kh, kw = shape
    if (T, c * kh * kw) != metric.C.shape:
        raise ValueError(
            f"the metric is of {metric.T} outputs and {metric.D} inputs, a weight of shape {tuple(shape)} has "
            f"{T} and {c * kh * kw}. A grouped layer has one metric per group."
        )
    return T, c, kh, kw


def _named(channels: Sequence[int], c: int) -> np.ndarray:
    channels = np.asarray(channels)
    if not channels.size or channels.min() < 0 or channels.max() >= c:
        raise ValueError(f"channels to keep must lie in 0..{c - 1}, got {channels.tolist()}.")
    mask = np.zeros(c, bool)
    mask[channels] = True
    return mask
