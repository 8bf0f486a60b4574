"""`edgesolve recalibrate`: one recalibration as a transaction on the state folder."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgesolve.device import adapt
from edgesolve.device.board import peak_rss_mib
from edgesolve.device.bundle import open_bundle
from edgesolve.device.errors import InputError
from edgesolve.device.in_force import newest
from edgesolve.device.operator import frozen
from edgesolve.device.reasons import SENTENCES
from edgesolve.device.runtime import choose_backend, open_runtime
from edgesolve.device.store import KEEP_NEWEST, Store
from edgesolve.device.teacher import open_teacher
from edgesolve.kernels.moments import Moments


def run(
    path: str | Path,
    frames: np.ndarray,
    labels: np.ndarray | None,
    *,
    state: str | Path,
    backend: str = "auto",
    threads: int = 1,
    action: str = "commit",
    options: adapt.Options | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Decide, and do with what was accepted as `action` says; returns the report (contract: product.md).

    action : "commit" puts it in force, "trial" does so on probation, "propose" keeps it as a candidate, "show"
        writes nothing.

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
    silent = action == "show" or options.look_only
    with contextlib.nullcontext() if silent else store.lock():
        current = open_runtime(bundle, backend=backend, state=state, threads=threads)
        if frozen(store) and not options.look_only:
            outcome = adapt.Outcome("kept", "frozen", report={"n": 0})
        else:
            teacher = open_teacher(bundle, backend, threads)
            earlier = partial(_earlier, store, bundle, options.decay)
            outcome = adapt.recalibrate(
                bundle, current, teacher, frames, labels, options, time.perf_counter, say, earlier
            )
        report = _report(outcome, bundle, current, backend, began)
        if outcome.head is not None:
            window_sha256 = hashlib.sha256(frames.tobytes()).hexdigest()
            _act(action, store, bundle, outcome, report, window_sha256, options)
        if not silent:
            store.journal({"time": time.time(), **_short(report)})
    report["seconds"] = time.perf_counter() - began
    report["peak_rss_mib"] = peak_rss_mib()
    report["sentence"] = SENTENCES.get(report["reason"], "")
    return report


def _act(action: str, store: Store, bundle, outcome, report, window_sha256: str, options) -> None:
    """Store what was accepted; `report` then says what became of it."""
    provenance = {
        **{k: v for k, v in report.items() if k != "generation"},
        "time": time.time(),
        "edgesolve": version("edgesolve"),
        "bundle_sha256": bundle.sha256,
        "parent": report["generation"],
        "window_sha256": window_sha256,
        "options": asdict(options),
    }
    window = dict(outcome.condition or {})
    if outcome.window is not None:
        window.update(outcome.window.to_arrays())
    head = outcome.head.to_arrays()
    if action == "commit" or action == "trial":
        report["generation"] = store.commit(
            head, outcome.statistics, provenance, window=window, committed=action == "commit"
        )
        return
    report.update(decision="proposed", would_be=outcome.reason)
    if action == "propose":
        store.propose(head, outcome.statistics, provenance, window=window)
    report["reason"] = "awaiting_approval" if action == "propose" else "dry_run"


def _earlier(store: Store, bundle, decay: float, features: str) -> list[adapt.Earlier]:
    """The windows that the head in force was solved on, where their rows are the same features, counting less."""
    used = store.current(bundle.sha256)
    if used is None or used.provenance.get("features_sha256") != features:
        return []
    found = []
    for part in used.provenance["parts"][: KEEP_NEWEST - 1]:  # older ones are deleted by the next
        number = part["generation"] or used.number
        kept = used
        if number != used.number:
            kept = newest(store.path, bundle.sha256, [], below=number + 1)
        if kept is not None and kept.number == number and "s" in (kept.window or {}):
            window = Moments.from_arrays(kept.window)
            found.append(adapt.Earlier(number, decay * part["weight"], window))
    return found


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
