"""What a service says about itself: the status of operations.md, section 3, as plain JSON values."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

from edgesolve.device import operator, pointer
from edgesolve.device.board import rss_mib
from edgesolve.device.bundle import Bundle
from edgesolve.device.generation import Generation
from edgesolve.device.inference import Inference
from edgesolve.device.learner import Learner
from edgesolve.device.store import Store

_MIB = 1 << 20
PROPOSAL = ("time", "n", "seconds", "relative_gap", "target", "flipped", "gate", "would_be")


def snapshot(
    bundle: Bundle,
    inference: Inference,
    learner: Learner,
    kept: Mapping[str, Any],
    fixed: Mapping[str, Any],
) -> dict[str, Any]:
    """`kept`: `stored(…)`, which reads the state folder and is asked for when that changes; `fixed`: what never
    changes while the service runs."""
    runtime, policy, ledger = inference.runtime, learner.options.policy, learner.ledger
    now = time.monotonic()
    in_force = kept["in_force"] or {}
    return {
        "schema": 1,
        "bundle": bundle.manifest["name"],
        "bundle_sha256": bundle.sha256,
        **fixed,
        "mode": policy.mode,
        "frozen": operator.frozen(learner.store),
        "backend": runtime.graph.runtime,
        "generation": runtime.generation,
        "previous": in_force.get("parent", 0),
        "committed": kept["committed"],
        "head_age_s": _age(in_force.get("time")),
        "target": in_force.get("target"),
        "inferences_total": inference.total,
        "errors_total": inference.errors,
        "deadline_misses_total": inference.latency.misses,
        "latency_ms": inference.latency.snapshot(),
        "window": {
            "n": len(learner.window),
            "capacity": learner.window.capacity,
            "seen": learner.window.n_seen,
            "unusable": learner.window.n_bad,
            "stores_frames": False,
        },
        "drift": learner.drift and {**learner.drift, "threshold": 1.0},
        "candidate": kept["candidate"],
        "adapting": learner.child
        and {
            "step": learner.child.step,
            "seconds": learner.child.seconds,
            "paused": learner.child.paused,
        },
        "probation": learner.probation
        and {
            "seconds_left": learner.probation.seconds_left(now),
            "inferences_left": learner.probation.inferences_left(inference.health(None)),
            "tries_left": kept["tries_left"],
        },
        "last": learner.history[-1] if learner.history else None,
        "history": learner.history,
        "updates_today": ledger.updates_today,
        "rollbacks_total": ledger.rollbacks_total,
        "skipped": dict(learner.skipped),
        "soc_temp_c": learner.readings.temperature_c,
        "throttled": None
        if learner.readings.throttled is None
        else list(learner.readings.throttled),
        "power_w": learner.readings.watts,
        "rss_mib": rss_mib(),
        "written_today_mib": ledger.written_today / _MIB,
        "written_total_mib": ledger.written_total / _MIB,
        "write_budget_mib": policy.write_budget_mib,
        "card_years_projected": None,
        "generations": kept["generations"],
    }


def stored(bundle: Bundle, store: Store, generation: int) -> dict[str, Any]:
    """Candidate, generations, and what the pointer says: read from the state folder."""
    found = store.candidate(bundle.sha256)
    at = pointer.naming(store.path, generation)
    committed = at is None or at.committed
    rows = generations(store, generation, committed)
    return {
        "candidate": found and proposal(found),
        "generations": rows,
        "in_force": next((r for r in rows if r["in_force"]), None),
        "committed": committed,
        "tries_left": at.tries_left if at else 0,
    }


def proposal(found: Generation) -> dict[str, Any]:
    """What a candidate would change."""
    known = found.provenance
    return {**{k: known.get(k) for k in PROPOSAL}, "classes": known.get("answers", [])}


def generations(store: Store, in_force: int, committed: bool) -> list[dict[str, Any]]:
    """Newest first, from provenance alone: for people to read, nothing is loaded by it."""
    rows = []
    for path in sorted((store.path / "generations").glob("[0-9]*"), reverse=True):
        with contextlib.suppress(OSError, ValueError, TypeError):
            number = int(path.name)
            known = json.loads((path / "provenance.json").read_bytes())
            here = number == in_force
            keys = ("parent", "time", "n", "relative_gap", "target", "reason")
            rows.append(
                {
                    "generation": number,
                    **{k: known.get(k) for k in keys},
                    "in_force": here,
                    "committed": committed if here else True,
                }
            )
    return rows


def _age(then: float | None) -> float | None:
    return None if then is None else max(0.0, time.time() - then)
