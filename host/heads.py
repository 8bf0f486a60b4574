"""What a bundle keeps of a head, as arrays."""

from __future__ import annotations

import numpy as np

from edgesolve.host.distill import Distilled

ANCHORS = 128
HALF_ERROR = 2e-3
"""How far half precision may move a logit, as a share of the logits' spread (ResNet-56: 6e-4; int8 rows move them
by a hundredth)."""


def head_arrays(found: Distilled) -> dict[str, np.ndarray]:
    """What device/runtime.py's Head and the group penalty read."""
    return {
        "weights": np.ascontiguousarray(found.solution.weights, np.float32),
        "intercept": np.ascontiguousarray(found.solution.intercept, np.float32),
        "starts": np.asarray(found.rows.starts, np.int64),
    }


def halved(arrays: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """`arrays` with weights (D, c) in float16, unless that moves a logit of rows (n, D) beyond `HALF_ERROR`."""
    logits = rows @ arrays["weights"]
    with np.errstate(over="ignore", invalid="ignore"):
        weights = arrays["weights"].astype(np.float16)
        moved = np.abs(rows @ weights.astype(np.float32) - logits).max()
    return {**arrays, "weights": weights} if moved <= HALF_ERROR * logits.std() else arrays


def source_arrays(found: Distilled) -> dict[str, np.ndarray]:
    """Of the calibration frames: moments, anchors and each class's typical logits."""
    kept = found.capture
    pick = np.linspace(0, len(kept.rows) - 1, min(ANCHORS, len(kept.rows))).astype(int)
    predicted, mean = kept.logits.argmax(1), kept.logits.mean(0)
    prototypes = []
    for k in range(kept.logits.shape[1]):
        mine = kept.logits[predicted == k]
        guess = mean.copy()
        guess[k] = kept.logits.max(1).mean()
        prototypes.append(mine.mean(0) if len(mine) else guess)
    arrays = {f"moments.{k}": np.atleast_1d(v) for k, v in found.moments.to_arrays().items()}
    return {
        **arrays,
        "anchor_rows": kept.rows[pick].astype(np.float16),
        "anchor_logits": kept.logits[pick].astype(np.float32),
        "prototypes": np.stack(prototypes).astype(np.float32),
    }
