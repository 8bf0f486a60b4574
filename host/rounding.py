"""int8 weights as numbers on a grid: what a quantiser will make of them, chosen beforehand where it hurts least.

The quantisers of ONNX Runtime and of TFLite take the scale of an output channel from its largest weight. A
weight that lies on that grid, its largest entry kept, is therefore reproduced by either of them as it is.
"""

from __future__ import annotations

import numpy as np

from edgesolve.host.metric import Metric

LEVELS = 127
"""Largest integer of a symmetric int8 weight."""

PAIRWISE_LEVELS = 64
"""Largest integer for which two products with an uint8 fit into 16 bits: 2 * 255 * 64 < 2**15.

x86 without VNNI adds such pairs with saturation; there wider weights silently give wrong sums.
"""

_RIDGE = 1e-4  # of the mean variance: inputs that never vary have no say, and S may be singular


def grid(weight: np.ndarray, levels: int = LEVELS) -> np.ndarray:
    """Scales (T,) of `weight` (T, ...): the largest |entry| of an output channel is `levels` steps."""
    if levels not in range(1, LEVELS + 1):
        raise ValueError(f"levels must lie in 1..{LEVELS}, got {levels}.")
    largest = np.abs(_rows(weight)).max(axis=1, initial=0.0)
    return np.where(largest > 0.0, largest, levels) / levels


def round_nearest(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`weight` (T, ...) moved to the nearest point of the grid, float64, of its own shape."""
    W, bound, step = _checked(weight, scales)
    return (np.clip(np.rint(W / step), -bound, bound) * step).reshape(np.shape(weight))


def round_with_feedback(metric: Metric, weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`weight` (T, ...) on the grid, each rounding error made up for by the inputs not yet rounded.

    Minimises (Q - W) S (Q - W)' of `metric` greedily, input by input, the one of largest variance first;
    every output channel ends no worse than `round_nearest`, and its largest entry stays what it was.

    Optimal brain surgeon with a quantised target; the sequence by one Cholesky factor of S⁻¹ as in Frantar et
    al., GPTQ (2023), equation 3 and algorithm 1.
    """
    W, bound, step = _checked(weight, scales)
    if W.shape[1] != metric.D:
        raise ValueError(f"weight has {W.shape[1]} inputs, the metric {metric.D}.")
    order = np.argsort(-np.diag(metric.S), kind="stable")
    S = metric.S[np.ix_(order, order)]
    upper = _inverse_factor(S)
    left, Q = W[:, order].copy(), np.empty_like(W)
    largest = np.abs(left).argmax(axis=1)
    kept = left[np.arange(len(W)), largest]
    for p in range(metric.D):
        q = np.clip(np.rint(left[:, p] / step[:, 0]), -bound[:, 0], bound[:, 0]) * step[:, 0]
        q = np.where(largest == p, kept, q)
        Q[:, p] = q
        left[:, p + 1 :] -= np.outer((left[:, p] - q) / upper[p, p], upper[p, p + 1 :])
    back = np.empty_like(Q)
    back[:, order] = Q
    near = round_nearest(W, scales)
    worse = _excess(back - W, metric.S) > _excess(near - W, metric.S)
    return np.where(worse[:, None], near, back).reshape(np.shape(weight))


def corrected_bias(metric: Metric, rounded: np.ndarray) -> np.ndarray:
    """The bias (T,) with which the rounded layer keeps the target's mean: mu_t - Q mu_x."""
    return metric.bias(np.asarray(rounded, np.float64))


def predicted_error(
    metric: Metric, rounded: np.ndarray, step_x: float = 0.0, zero_share: np.ndarray | float = 0.0
) -> float:
    """E||t - Q round(x) - b||² for x rounded to steps of `step_x`, b the corrected bias.

    zero_share : (D,) share of exact zeros of each input (ReLU, padding), which rounding leaves alone.
    Exact for step_x = 0. Else each other value adds independent noise of variance step_x² / 12: within 5 % where
    a step is small against the spread of x and nothing saturates.
    """
    Q = np.asarray(rounded, np.float64).reshape(metric.T, metric.D)
    noisy = 1.0 - np.broadcast_to(np.asarray(zero_share, np.float64), (metric.D,))
    noise = step_x**2 / 12.0 * float(np.square(Q).sum(axis=0) @ noisy)
    return metric.distortion(Q) + noise


def _rows(weight: np.ndarray) -> np.ndarray:
    W = np.asarray(weight, np.float64)
    if W.ndim < 2 or not np.isfinite(W).all():
        raise ValueError(f"weight must be (T, ...) and finite, got shape {W.shape}.")
    return W.reshape(len(W), -1)


def _checked(weight, scales) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`weight` as (T, D), the largest integer of each channel (T, 1), the scales (T, 1)."""
    W, step = _rows(weight), np.asarray(scales, np.float64)
    if step.shape != (len(W),) or not (step > 0.0).all():
        raise ValueError(f"scales must be ({len(W)},) and positive, got shape {step.shape}.")
    step = step[:, None]
    return W, np.rint(np.abs(W).max(axis=1, keepdims=True, initial=0.0) / step), step


def _inverse_factor(S: np.ndarray) -> np.ndarray:
    """U (D, D) upper triangular with U'U = (S + ridge)⁻¹: row p holds what an error at p does to the rest."""
    D = len(S)
    ridge = _RIDGE * float(np.trace(S)) / D
    H = S + (ridge if ridge > 0.0 else 1.0) * np.eye(D)
    return np.linalg.cholesky(np.linalg.inv(H)).T


def _excess(gap: np.ndarray, S: np.ndarray) -> np.ndarray:
    return np.einsum("td,td->t", gap @ S, gap)
