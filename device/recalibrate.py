"""`edgesolve recalibrate`: one recalibration as a transaction on the state folder."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgesolve.device import adapt
from edgesolve.device.board import peak_rss_mib
from edgesolve.device.bundle import open_bundle
from edgesolve.device.errors import InputError
from edgesolve.device.runtime import choose_backend, open_runtime
from edgesolve.device.store import Store
from edgesolve.device.teacher import open_teacher


def run(
    path: str | Path,
    frames: np.ndarray,
    labels: np.ndarray | None,
    *,
    state: str | Path,
    backend: str = "auto",
    threads: int = 1,
    dry_run: bool = False,
    options: adapt.Options | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Decide, and put in force what was accepted; returns the report (contract: product.md).

    The generation in force changes by one atomic pointer swap at the very end, so a kill at any moment leaves
    the old head or the new one. Raises BusyError while another process recalibrates the same state folder.
    """
    began = time.perf_counter()
    options = options or adapt.Options()
    bundle = open_bundle(path)
    backend = choose_backend(bundle, backend)
    frames = bundle.contract.check(frames)
    if labels is not None:
        labels = _check_labels(labels, len(frames), len(bundle.classes))
    store = Store(state)
    with contextlib.nullcontext() if dry_run else store.lock():
        current = open_runtime(bundle, backend=backend, state=state, threads=threads)
        if (Path(state) / "FROZEN").exists():
            outcome = adapt.Outcome("kept", "frozen", report={"n": 0})
        else:
            teacher = open_teacher(bundle, backend, threads)
            outcome = adapt.recalibrate(
                bundle, current, teacher, frames, labels, options, time.perf_counter, say
            )
        report = _report(outcome, bundle, current, backend, began)
        if dry_run:
            if outcome.decision == "accepted":
                report.update(decision="proposed", reason="dry_run", would_be=outcome.reason)
        else:
            if outcome.head is not None:
                provenance = {
                    **{k: v for k, v in report.items() if k != "generation"},
                    "bundle_sha256": bundle.sha256,
                    "parent": current.generation,
                    "window_sha256": hashlib.sha256(frames.tobytes()).hexdigest(),
                    "options": _plain(options),
                }
                report["generation"] = store.commit(
                    outcome.head.to_arrays(), outcome.statistics, provenance
                )
            store.journal({"time": time.time(), **_short(report)})
    report["seconds"] = time.perf_counter() - began
    report["peak_rss_mib"] = peak_rss_mib()
    report["sentence"] = adapt.SENTENCES.get(report["reason"], "")
    return report


def _report(outcome, bundle, current, backend, began) -> dict[str, Any]:
    base = {
        "decision": outcome.decision,
        "reason": outcome.reason,
        "status": "not_solved",
        "relative_gap": None,
        "n": 0,
        "bundle": bundle.manifest["name"],
        "backend": backend,
        "runtime": current.graph.runtime,
        "generation": current.generation,
        "previous": current.generation,
        "notes": current.notes,
        "seconds": time.perf_counter() - began,
    }
    return {**base, **outcome.report}


def _short(report: dict[str, Any]) -> dict[str, Any]:
    keys = ("decision", "reason", "generation", "n", "relative_gap", "seconds", "bundle")
    return {key: report.get(key) for key in keys}


def _plain(options: adapt.Options) -> dict[str, Any]:
    return {name: getattr(options, name) for name in adapt.Options.__slots__}


def _check_labels(labels: np.ndarray, n: int, classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise InputError(
            f"--labels: found {labels.dtype} of shape {labels.shape}, expected {n} integers, "
            "-1 where an item has no label."
        )
    if (labels >= classes).any() or (labels < -1).any():
        raise InputError(f"--labels: a label lies outside -1..{classes - 1}.")
    return labels.astype(np.int64)
