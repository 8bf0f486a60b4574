"""Do no harm: may this update replace the head in force? Judged without labels; one failure keeps the old head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Limits:
    """`relative_gap`: certificate. `anchor_loss`: agreement with the original network that may be lost on
    source anchors. `classes`, `confidence`: least share of the teacher's effective classes and confidence."""

    relative_gap: float = 1e-6
    anchor_loss: float = 0.10
    classes: float = 0.5
    confidence: float = 0.5


@dataclass(frozen=True, slots=True)
class Evidence:
    """Logits on the judging slice: `new`, `old` (n, c) of the two students, `target` of the teacher;
    `anchors_new`, `anchors_old`, `anchors` (k, c) on source anchors; the solve's `relative_gap`."""

    new: np.ndarray
    old: np.ndarray
    target: np.ndarray
    anchors_new: np.ndarray
    anchors_old: np.ndarray
    anchors: np.ndarray
    relative_gap: float


def judge(e: Evidence, limits: Limits = Limits()) -> tuple[str | None, dict[str, float]]:
    """(reason to refuse or None, the figures it was judged by)."""
    figures = {
        "heldout_error_old": _error(e.old, e.target),
        "heldout_error_new": _error(e.new, e.target),
        "heldout_agreement_old": _agreement(e.old, e.target),
        "heldout_agreement_new": _agreement(e.new, e.target),
        "anchor_agreement_old": _agreement(e.anchors_old, e.anchors),
        "anchor_agreement_new": _agreement(e.anchors_new, e.anchors),
        "classes_new": effective_classes(e.new),
        "classes_teacher": effective_classes(e.target),
        "confidence_new": float(softmax(e.new).max(1).mean()),
        "confidence_teacher": float(softmax(e.target).max(1).mean()),
        "relative_gap": e.relative_gap,
    }
    return _first_failure(e, figures, limits), figures


def _first_failure(e: Evidence, f: dict[str, float], limits: Limits) -> str | None:
    if not np.isfinite(e.new).all():
        return "not_finite"
    if not f["relative_gap"] <= limits.relative_gap:
        return "gap_too_large"
    if f["anchor_agreement_new"] < f["anchor_agreement_old"] - limits.anchor_loss:
        return "anchor_agreement"
    if f["heldout_error_new"] >= f["heldout_error_old"]:
        return "heldout_worse"
    if f["classes_new"] < limits.classes * f["classes_teacher"]:
        return "marginal_shift"
    if f["confidence_new"] < limits.confidence * f["confidence_teacher"]:
        return "confidence_collapse"
    return None


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def effective_classes(logits: np.ndarray) -> float:
    """exp of the entropy of the mean prediction: how many classes a window seems to hold."""
    mean = np.maximum(softmax(logits).mean(0), 1e-12)
    return float(np.exp(-(mean * np.log(mean)).sum()))


def _error(logits: np.ndarray, target: np.ndarray) -> float:
    return float(((logits - target) ** 2).sum(1).mean())


def _agreement(logits: np.ndarray, target: np.ndarray) -> float:
    return float((logits.argmax(1) == target.argmax(1)).mean())
