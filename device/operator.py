"""What an operator may decide about a state folder, whether or not a service runs on it."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from edgesolve.device.atomic import write_atomic
from edgesolve.device.bundle import Bundle
from edgesolve.device.errors import EdgeError, StateError
from edgesolve.device.store import Store

FROZEN = "FROZEN"


def approve(bundle: Bundle, store: Store, *, committed: bool = True) -> dict[str, Any]:
    """Put the candidate in force; `committed` False: on probation. Raises StateError where there is none."""
    number = store.approve(bundle.sha256, committed=committed)
    return _done(store, "accepted", "operator", number, f"In force: generation {number}.")


def reject(bundle: Bundle, store: Store) -> dict[str, Any]:
    """Throw the candidate away. Raises StateError where there is none."""
    if store.candidate(bundle.sha256) is None:
        raise StateError("there is no proposed head to reject.")
    store.reject()
    number = in_force(bundle, store)
    return _done(store, "kept", "operator", number, "The proposed head is gone.")


def rollback(bundle: Bundle, store: Store, reason: str = "operator") -> dict[str, Any]:
    """Go back to what the generation in force was solved from."""
    number = store.rollback(bundle.sha256)
    where = f"generation {number}" if number else "the factory head"
    return _done(store, "rollback", reason, number, f"In force: {where}.")


def factory_reset(bundle: Bundle, store: Store) -> dict[str, Any]:
    """Forget everything; works on a damaged or newer state."""
    store.factory_reset()
    return _done(store, "rollback", "operator", 0, "In force: the factory head.")


def freeze(bundle: Bundle, store: Store) -> dict[str, Any]:
    """Stop all learning: any process that finds STATE/FROZEN keeps the head."""
    store.path.mkdir(parents=True, exist_ok=True)
    write_atomic(store.path / FROZEN, b"frozen by the operator\n")
    return _done(store, "kept", "frozen", in_force(bundle, store), "Learning is off here.")


def unfreeze(bundle: Bundle, store: Store) -> dict[str, Any]:
    """Let it learn again."""
    try:
        (store.path / FROZEN).unlink(missing_ok=True)
    except OSError as error:
        raise StateError(f"{FROZEN} cannot be removed ({error.strerror}).") from error
    return _done(store, "kept", "operator", in_force(bundle, store), "Learning is on here.")


def frozen(store: Store) -> bool:
    return (store.path / FROZEN).exists()


def in_force(bundle: Bundle, store: Store) -> int:
    """Number of the generation in force, 0 = factory."""
    found = store.current(bundle.sha256)
    return found.number if found else 0


def _done(store: Store, decision: str, reason: str, number: int, sentence: str) -> dict[str, Any]:
    with contextlib.suppress(EdgeError):  # what was decided holds, written down or not
        store.journal(
            {"time": time.time(), "decision": decision, "reason": reason, "generation": number}
        )
    return {
        "ok": True,
        "decision": decision,
        "reason": reason,
        "generation": number,
        "sentence": sentence,
    }
