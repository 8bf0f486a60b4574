"""Accuracy where labels are there; agreement with the original network where they aren't."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from edgesolve.device.errors import InputError
from edgesolve.device.runtime import Runtime, source_statistics
from edgesolve.device.teacher import open_teacher


def evaluate(
    runtime: Runtime,
    frames: np.ndarray,
    labels: np.ndarray | None,
    *,
    threads: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """`accuracy` (null without labels), `agreement` with the original network as it shipped, per class, `n`.

    The original runs too, from the teacher graph with factory statistics: `original_accuracy` is its own.
    """
    classes = len(runtime.bundle.classes)
    if labels is not None and ((labels < 0).any() or (labels >= classes).any()):
        raise InputError(
            f"labels lie in {labels.min()}..{labels.max()}, expected 0..{classes - 1}."
        )
    source = source_statistics(runtime.bundle)
    teacher = open_teacher(runtime.bundle, runtime.backend, threads)
    student, original = [], []
    began = said = time.monotonic()
    for start in range(0, len(frames), 8 * teacher.batch):
        part = np.asarray(frames[start : start + 8 * teacher.batch])
        student.append(runtime.logits(part).argmax(1))
        original.append(teacher.run(part, 0.0, source.mean, source.var).logits.argmax(1))
        if time.monotonic() - said > 2.0:
            said = time.monotonic()
            say(f"{start + len(part)}/{len(frames)} frames")
    mine, theirs = np.concatenate(student), np.concatenate(original)
    agree = mine == theirs
    result: dict[str, Any] = {
        "n": len(frames),
        "accuracy": None,
        "original_accuracy": None,
        "agreement": float(agree.mean()),
        "generation": runtime.generation,
        "backend": runtime.backend,
        "seconds": time.monotonic() - began,
        "per_class": [],
    }
    by = theirs if labels is None else labels
    if labels is not None:
        result["accuracy"] = float((mine == labels).mean())
        result["original_accuracy"] = float((theirs == labels).mean())
    for k, name in enumerate(runtime.bundle.classes):
        here = by == k
        if here.any():
            result["per_class"].append(
                {
                    "class": name,
                    "n": int(here.sum()),
                    "accuracy": None if labels is None else float((mine[here] == k).mean()),
                    "agreement": float(agree[here].mean()),
                }
            )
    return result
