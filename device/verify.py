"""`edgesolve verify`: do this machine's runtimes give the answers that were recorded when the bundle was built?"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgesolve.device import signature
from edgesolve.device.bundle import Bundle
from edgesolve.device.errors import BackendError, ParityError
from edgesolve.device.runtime import Runtime, adapted_graph, open_runtime
from edgesolve.device.teacher import open_teacher

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest recorded value where that exceeds 1."""

INTEGER_TOLERANCE = 0.01
"""Root mean square difference allowed from what integer kernels gave at build, relative to the spread over the
frames. One value rounded the other way moves an output by several steps, so no limit of each is meaningful."""

SURE = 10 * INTEGER_TOLERANCE
"""A recorded answer that leads by this share of the logits' spread must be found again."""


def verify(
    bundle: Bundle,
    *,
    backends: list[str] | None = None,
    threads: int = 1,
    trusted: list[bytes] | None = None,
    signature_required: bool = False,
) -> dict[str, Any]:
    """The signature (`trusted` public keys, None: EDGESOLVE_KEYS), hashes of every file, then per backend: logits,
    re-normalised rows, the teacher and its statistics.

    A backend whose runtime is not installed is reported as skipped; none at all raises BackendError. A
    difference above TOLERANCE, of int8 rows above INTEGER_TOLERANCE, raises ParityError naming what differs; a
    wrong signature SignatureError.
    """
    keys = signature.trusted_keys() if trusted is None else trusted
    signed = signature.check(bundle, keys, signature_required)
    files = bundle.check_all()
    found: dict[str, Any] = {}
    for backend in backends or list(bundle.backends):
        try:
            runtime = open_runtime(bundle, backend=backend, threads=threads)
        except BackendError as error:
            found[backend] = {"skipped": str(error)}
            continue
        found[backend] = _check(bundle, runtime, backend, threads)
    if all("skipped" in entry for entry in found.values()):
        raise BackendError("; ".join(entry["skipped"] for entry in found.values()))
    return {"files": files, "backends": found, "sha256": bundle.sha256, "signature": signed}


def _check(bundle, runtime: Runtime, backend, threads) -> dict[str, Any]:
    known = bundle.parity(backend)
    rows = runtime.rows(known["frames"])
    logits = runtime.head(rows)
    integer = bundle.own_rows(backend)
    entry: dict[str, Any] = {
        "runtime": runtime.graph.runtime,
        "precision": bundle.backends[backend].get("precision", "float32"),
        "logits": float(np.abs(logits - known["logits"]).max())
        if integer
        else _difference(backend, "logits", logits, known["logits"]),
        "top1": float((logits.argmax(1) == known["logits"].argmax(1)).mean()),
    }
    if integer:
        entry["rows_rms"] = _relative(backend, "rows", rows, known["rows"])
        entry["logits_rms"] = _relative(backend, "logits", logits, known["logits"])
        _check_answers(backend, logits, known["logits"])
    statistics = {"mean": known["mean"], "var": known["var"]}
    if bundle.backends[backend]["patch"]:
        graph = adapted_graph(bundle, backend, statistics, threads)
        moved = Runtime(bundle, backend, graph, runtime.head, 0, [])
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


def _relative(backend: str, what: str, found: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square difference over the spread of `expected` (n, …). Raises ParityError above the tolerance."""
    share = float("inf")
    if found.shape == expected.shape:
        share = _rms(found - expected) / max(_rms(expected - expected.mean(0)), 1e-30)
    if not share <= INTEGER_TOLERANCE:
        raise ParityError(
            f"{backend}: {what} differ by {share:.2%} of their spread from those that this file gave at build, "
            f"{INTEGER_TOLERANCE:.0%} is allowed. Use another version of the runtime, or a float backend."
        )
    return share


def _check_answers(backend: str, found: np.ndarray, expected: np.ndarray) -> None:
    order = np.sort(expected, axis=1)
    sure = order[:, -1] - order[:, -2] > SURE * _rms(expected - expected.mean(0))
    wrong = sure & (found.argmax(1) != expected.argmax(1))
    if wrong.any():
        raise ParityError(
            f"{backend}: frame {np.flatnonzero(wrong)[0]} of the parity set is answered by "
            f"{found[wrong][0].argmax()}, the build recorded {expected[wrong][0].argmax()} by a wide margin. "
            "Use another version of the runtime, or a float backend."
        )


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))


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
