"""The learning half of the service: collect, look, solve in a child, propose or try out, commit or go back.

A state machine that is turned by the service's loop and never waits: `tick` reads clocks and results, starts
or ends a child, and says what happened. What it may do is `policy.py`'s and `resources.py`'s to say.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgesolve.device import atomic, ledger, operator, pointer, resources
from edgesolve.device.adapt import Options
from edgesolve.device.bundle import Bundle
from edgesolve.device.child import Child
from edgesolve.device.errors import EdgeError
from edgesolve.device.policy import Facts, Policy, after_restart, may_look, may_solve
from edgesolve.device.probation import Health, Probation, judge
from edgesolve.device.store import Store
from edgesolve.device.window import Window

Event = Callable[[dict[str, Any]], None]
READ_EVERY_S = 5.0
LOOK_SECONDS = 120.0
HISTORY = 20


@dataclass(frozen=True, slots=True)
class LearnOptions:
    """`solve`: of a child that adapts; `probation_s`, `probation_n`: how long a new head is watched."""

    policy: Policy
    limits: resources.Limits
    solve: Options
    backend: str
    threads: int
    probation_s: float = 900.0
    probation_n: int = 500


class Learner:
    """What the service learns, in the state folder of `store`. Not thread-safe: the loop owns it."""

    def __init__(self, bundle: Bundle, store: Store, options: LearnOptions, say: Event):
        self.bundle, self.store, self.options, self._say = bundle, store, options, say
        contract = bundle.contract
        self.window = Window(options.solve.max_frames, contract.shape, contract.dtype)
        self.ledger, _ = ledger.read(store.path / ledger.NAME)
        wall = time.time()
        self._since_update = _ago(after_restart(self.ledger.last_update, wall))
        self._since_rollback = _ago(after_restart(self.ledger.last_rollback, wall))
        self._since_look: float | None = None
        self._booked = atomic.written()
        self.child: Child | None = None
        self.alarms = self.calm = 0
        self.drift: dict[str, Any] | None = None
        self.probation: Probation | None = None
        self.skipped: Counter[str] = Counter()
        self.history = store.history()[-HISTORY:]
        self.readings = resources.readings(state=store.path)
        self._read_at = time.monotonic()
        self.reload = False
        self._sequence = self._seen_sequence()

    # -- what the loop calls -------------------------------------------------------------------

    def see(self, frame: np.ndarray) -> None:
        """Collect one frame, in memory; an unusable one is counted and left out."""
        if self.options.policy.mode != "off":
            self.window.add(frame, time.monotonic())

    def tick(self, health: Health, generation: int, miss_share: float | None) -> None:
        """Go on with whatever is going on. `health` and `generation` of the head in force."""
        now = time.monotonic()
        if now - self._read_at >= READ_EVERY_S:
            self._read_at = now
            self.readings = resources.readings(state=self.store.path, miss_share=miss_share)
            self._watch_pointer()
        if self.child is not None:
            self.child.pause(resources.pause(self.options.limits, self.readings, self.child.paused))
            result = self.child.poll()
            if result is not None:
                child, self.child = self.child, None
                self._finished(child, result, generation)
        elif self.probation is not None:
            self._judge(health, generation, now)
        else:
            self._consider()

    def swapped(self, before: Health, uncommitted: bool) -> None:
        """Another head is in force; `uncommitted`: it is on probation, judged against `before`."""
        self.window.clear()
        self.alarms = self.calm = 0
        self.probation = None
        if uncommitted:
            o = self.options
            self.probation = Probation(time.monotonic(), before, o.probation_s, o.probation_n)

    def close(self) -> None:
        if self.child is not None:
            self.child.close()
            self.child = None
        self.book()

    # -- deciding ------------------------------------------------------------------------------

    def order(self) -> str | None:
        """The operator's `recalibrate`: None, or why not."""
        reason = may_solve(self.options.policy, replace(self._facts(), operator=True))
        reason = reason or resources.refusal(self.options.limits, self.readings)
        if reason is None:
            self._start("trial", replace(self.options.solve, look_only=False))
        return reason

    def _consider(self) -> None:
        facts = self._facts()
        if may_look(self.options.policy, facts) is not None:
            return
        self._since_look = time.monotonic()
        reason = resources.refusal(self.options.limits, self.readings)
        if reason is not None:
            self._skip(reason)
            return
        self._start("show", replace(self.options.solve, look_only=True, seconds=None))

    def _looked(self, report: dict[str, Any]) -> None:
        """A drift test has ended: enough of the same in a row, and something may be solved."""
        self.drift = report.get("drift")
        alarm, returned = report["reason"] == "drifted", report["reason"] == "returned"
        if alarm and self.alarms == 0:
            self._event("drift", report)
        self.alarms = self.alarms + 1 if alarm else 0
        self.calm = self.calm + 1 if returned else 0
        streak = self.calm if returned else self.alarms
        if not (alarm or returned):
            self.window.clear()
            return
        reason = may_solve(self.options.policy, replace(self._facts(), alarms=streak))
        reason = reason or resources.refusal(self.options.limits, self.readings)
        if reason is None and self.store.candidate(self.bundle.sha256) is not None:
            reason = "awaiting_approval"
        if reason is not None:
            if reason != "unconfirmed":
                self._skip(reason)
            self.window.clear()
            return
        action = "trial" if self.options.policy.mode == "auto" else "propose"
        self._start(action, replace(self.options.solve, look_only=False))

    def _start(self, action: str, solve: Options) -> None:
        o = self.options
        self.child = Child(
            self.bundle.path,
            self.window,
            state=self.store.path,
            backend=o.backend,
            threads=o.threads,
            action=action,
            options=solve,
            seconds=solve.seconds or LOOK_SECONDS,
        )
        if not solve.look_only:
            self._say({"event": "adapting", "n": len(self.window)})

    def _finished(self, child: Child, result: dict[str, Any], generation: int) -> None:
        report = result.get("report")
        if not child.look_only:  # also one that crashed: it must not be tried again every minute
            self._since_update = time.monotonic()
        if report is None:
            failed = {"decision": "kept", "generation": generation, "sentence": result["error"]}
            self._decided({**failed, "reason": result["reason"]})
            return
        if child.look_only:
            self._looked(report)
            return
        self.drift = report.get("drift") or self.drift
        accepted = report["decision"] == "accepted"
        written = report.get("written", 0)
        self.ledger = ledger.noted(self.ledger, time.time(), written=written, update=accepted)
        self.book()
        self.alarms = self.calm = 0
        self.window.clear()
        self.reload = self.reload or accepted
        self._decided(report)

    def _judge(self, health: Health, generation: int, now: float) -> None:
        verdict = judge(self.probation, health, now)
        if verdict is None:
            return
        if verdict != "commit":
            self.roll_back(verdict)
            self.probation = None  # only now: where nothing could be written, it goes on
            return
        self.store.confirm(generation)
        self.probation = None
        self._sequence = self._seen_sequence()
        self._say({"event": "committed", "generation": generation})

    def roll_back(self, reason: str) -> dict[str, Any]:
        """Back to the head before; raises EdgeError where that can't be written down."""
        found = operator.rollback(self.bundle, self.store, reason)
        self.reload = True
        self.rolled_back(found)
        return found

    def approved(self, found: dict[str, Any]) -> None:
        """A person put the candidate in force."""
        self.ledger = ledger.noted(self.ledger, time.time(), update=True)
        self.book()
        self.reload = True
        self.alarms = self.calm = 0  # of looks at the head before
        self._decided({**found, "reason": "approved"})

    def rolled_back(self, found: dict[str, Any]) -> None:
        """A head was taken back, here or while it was loaded."""
        self._since_rollback = time.monotonic()
        self.ledger = ledger.noted(self.ledger, time.time(), rollback=True)
        self.book()
        self._decided(found)

    # -- keeping account -----------------------------------------------------------------------

    def book(self) -> None:
        """Write down what was written to the card, if it was anything."""
        total = atomic.written()
        self.ledger = ledger.noted(self.ledger, time.time(), written=total - self._booked)
        self._booked = total
        with contextlib.suppress(EdgeError):
            ledger.write(self.store.path / ledger.NAME, self.ledger)

    def _facts(self) -> Facts:
        now = time.monotonic()
        self.ledger = ledger.noted(self.ledger, time.time())
        return Facts(
            n=len(self.window),
            alarms=self.alarms,
            since_look_s=_since(self._since_look, now),
            since_update_s=_since(self._since_update, now),
            since_rollback_s=_since(self._since_rollback, now),
            updates_today=self.ledger.updates_today,
            written_today=self.ledger.written_today,
            needs=self._needs(),
            frozen=operator.frozen(self.store),
            busy=self.child is not None or self.probation is not None,
        )

    def _needs(self) -> int:
        """Bytes that another generation would write: packed moments, twice the head, and change."""
        rows, classes = self.bundle.manifest["rows"]["length"], len(self.bundle.classes)
        return 2 * rows * (rows + 1) + 16 * rows * classes + 65536

    def _skip(self, reason: str) -> None:
        self.skipped[reason] += 1
        self._say({"event": "skipped", "reason": reason})

    def _decided(self, report: dict[str, Any]) -> None:
        keys = ("decision", "reason", "generation", "n", "relative_gap", "seconds", "sentence")
        entry = {"time": time.time(), **{k: report.get(k) for k in keys}}
        self.history = [*self.history, entry][-HISTORY:]
        self._event(report["decision"], report)

    def _event(self, event: str, report: dict[str, Any]) -> None:
        keys = ("reason", "generation", "sentence", "n", "relative_gap", "seconds", "drift")
        found = {k: report[k] for k in keys if report.get(k) is not None}
        self._say({"event": event, **found})

    def _watch_pointer(self) -> None:
        """Somebody else (`edgesolve rollback`, `approve`, …) may have put another head in force."""
        sequence = self._seen_sequence()
        if sequence != self._sequence:
            self._sequence, self.reload = sequence, True

    def loaded(self) -> None:
        """The loop has opened what the pointer says."""
        self.reload = False
        self._sequence = self._seen_sequence()

    def _seen_sequence(self) -> int | None:
        return max((p.sequence for p in pointer.readable(self.store.path)), default=None)


def _ago(seconds: float | None) -> float | None:
    """Monotonic time `seconds` ago."""
    return None if seconds is None else time.monotonic() - seconds


def _since(then: float | None, now: float) -> float | None:
    return None if then is None else now - then
