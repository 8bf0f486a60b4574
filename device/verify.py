"""`edgesolve verify`: do this machine's runtimes give the answers that were recorded when the bundle was built?"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgesolve.device.bundle import Bundle
from edgesolve.device.errors import BackendError, ParityError
from edgesolve.device.runtime import Runtime, adapted_graph, factory_head, open_runtime
from edgesolve.device.teacher import open_teacher

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest recorded value where that exceeds 1."""


def verify(
    bundle: Bundle, *, backends: list[str] | None = None, threads: int = 1
) -> dict[str, Any]:
    """Hashes of every file, then per backend: logits, re-normalised rows, the teacher and its statistics.

    A backend whose runtime is not installed is reported as skipped; none at all raises BackendError. A
    difference above TOLERANCE raises ParityError naming what differs.
    """
    files = bundle.check_all()
    known = bundle.parity()
    found: dict[str, Any] = {}
    for backend in backends or list(bundle.backends):
        try:
            runtime = open_runtime(bundle, backend=backend, threads=threads)
        except BackendError as error:
            found[backend] = {"skipped": str(error)}
            continue
        found[backend] = _check(bundle, runtime, backend, known, threads)
    if all("skipped" in entry for entry in found.values()):
        raise BackendError("; ".join(entry["skipped"] for entry in found.values()))
    return {"files": files, "backends": found, "sha256": bundle.sha256, "signature": "unsigned"}


def _check(bundle, runtime: Runtime, backend, known, threads) -> dict[str, Any]:
    logits = runtime.logits(known["frames"])
    entry: dict[str, Any] = {
        "runtime": runtime.graph.runtime,
        "logits": _difference(backend, "logits", logits, known["logits"]),
        "top1": float((logits.argmax(1) == known["logits"].argmax(1)).mean()),
    }
    statistics = {"mean": known["mean"], "var": known["var"]}
    if bundle.backends[backend]["patch"]:
        graph = adapted_graph(bundle, backend, statistics, threads)
        moved = Runtime(bundle, backend, graph, factory_head(bundle), 0, [])
        entry["adapted_rows"] = _difference(
            backend, "re-normalised rows", moved.rows(known["frames"]), known["adapted_rows"]
        )
    teacher = open_teacher(bundle, backend, threads)
    got = teacher.run(known["frames"], 0.0, known["mean"], known["var"])
    entry["teacher"] = _difference(backend, "teacher logits", got.logits, known["adapted_logits"])
    source = bundle.arrays("statistics.safetensors")
    window = teacher.run(known["frames"][:4], 0.5, source["mean"], source["var"])
    entry["window_mean"] = _difference(backend, "window means", window.mean, known["window_mean"])
    entry["window_var"] = _difference(backend, "window variances", window.var, known["window_var"])
    return entry


def _difference(backend: str, what: str, found: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference. Raises ParityError above the tolerance."""
    worst = float(np.abs(found - expected).max()) if found.shape == expected.shape else float("inf")
    limit = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not worst <= limit:
        raise ParityError(
            f"{backend}: {what} differ from torch by {worst:.2g}, {limit:.2g} is allowed. "
            "Use another version of the runtime, or the other backend."
        )
    return worst
