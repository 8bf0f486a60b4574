"""`edgesolve serve`: one loop that answers frames; everything slow happens beside it.

Sources and HTTP, MQTT threads hand frames and commands in, a child process adapts, a thread opens new heads. The loop
owns every object: between two frames it takes one step of whatever else is going on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgesolve.device.adapt import Options
from edgesolve.device.bundle import Bundle
from edgesolve.device.control import COMMANDS, Requests
from edgesolve.device.errors import BusyError, EdgeError, UsageError
from edgesolve.device.inference import Inference
from edgesolve.device.learner import Learner, LearnOptions
from edgesolve.device.metrics import Metrics, Silent, open_metrics
from edgesolve.device.notify import open_notifier
from edgesolve.device.orders import Orders
from edgesolve.device.policy import Policy
from edgesolve.device.resources import Limits
from edgesolve.device.runtime import Runtime, choose_backend
from edgesolve.device.snapshot import snapshot, stored
from edgesolve.device.sources import SourceEnded, open_source
from edgesolve.device.store import Store
from edgesolve.device.swap import Swap, opened

LIMITS = Limits()
WAIT_S = 0.05
STEP_S = 0.2
SNAPSHOT_S = 1.0
ALIVE_S = 30.0
BOOK_S = 3600.0


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the command line says; nothing listens unless `http` or `mqtt` name an address."""

    source: str
    state: Path
    device: str
    policy: Policy
    adapt: Options
    existing: bool = True
    backend: str = "auto"
    threads: int = 1
    limits: Limits = LIMITS
    probation_s: float = 900.0
    probation_n: int = 500
    deadline_ms: float | None = None
    http: str | None = None
    token: str | None = None
    mqtt: str | None = None
    discovery: bool = False
    signature: str = "unsigned"


class Service:
    """Implements `control.Control`. `say` gets every event, `answers` every answer, as JSON values."""

    def __init__(
        self,
        bundle: Bundle,
        options: ServeOptions,
        say: Callable[[dict[str, Any]], None],
        answers: Callable[[dict[str, Any]], None] = lambda answer: None,
    ):
        self.bundle, self.options = bundle, options
        self._say, self._answers = say, answers
        self.metrics: Metrics | Silent = open_metrics()
        self.store = Store(options.state)
        self._backend = choose_backend(bundle, options.backend)
        runtime, uncommitted = opened(bundle, self._backend, self.store, options.threads)
        self.inference = Inference(runtime, self.metrics, options.deadline_ms)
        learn = LearnOptions(
            options.policy,
            options.limits,
            options.adapt,
            self._backend,
            options.threads,
            options.probation_s,
            options.probation_n,
        )
        self.learner = Learner(bundle, self.store, learn, self._event)
        self.learner.swapped(self.inference.health(None), uncommitted)
        self._began = self._turned = time.monotonic()
        self._swap: Swap | None = None
        self._requests = Requests()
        self._orders = Orders(bundle, self.inference, self.learner, self._event)
        self._stopping = False
        self._link = None
        self._source_state = "starting"
        self._fixed = {"device": options.device, "signature": options.signature}
        self._kept: dict[str, Any] = {}
        self._status: dict[str, Any] = {}
        self._stepped = self._shown = -1e9
        self._booked = time.monotonic()
        self._notes(runtime)
        self._restock()

    # -- Control: called from other threads ------------------------------------------------------

    def status(self) -> dict[str, Any]:
        return self._status

    def alive(self) -> bool:
        return time.monotonic() - self._turned < ALIVE_S

    def ready(self) -> tuple[bool, str]:
        if not self.alive():
            return False, "the loop has not turned for 30 s."
        if self._source_state != "delivering":
            return False, f"the source is {self._source_state}."
        return True, f"generation {self.inference.runtime.generation} answers."

    def command(self, name: str, source: str) -> dict[str, Any]:
        if name not in COMMANDS:
            raise UsageError(f"{name}: no such command; there are {', '.join(COMMANDS)}.")
        return self._requests.ask("command", name, source)

    def predict(self, frame: np.ndarray) -> dict[str, Any]:
        return self._requests.ask("predict", frame)

    # -- the loop --------------------------------------------------------------------------------

    def run(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Until `stop()`, or until the source has ended and nobody else can ask. Raises EdgeError."""
        o = self.options
        notifier = open_notifier(unset=True)
        with contextlib.ExitStack() as stack:
            source = open_source(o.source, self.bundle.contract, existing=o.existing)
            stack.callback(source.close)
            stack.callback(self._close)
            self._listen(stack)
            self._source_state = "waiting for a first frame"
            notifier.ready()
            self._event({"event": "serving", "sentence": self._sentence()})
            ended = False
            while not (stop() or self._stopping):
                self._turn(None if ended else source)
                notifier.watchdog()
                if self._source_state.startswith("ended") and not ended:
                    ended = True
                    if not (o.http or o.mqtt):
                        break
            notifier.stopping()
        self._event({"event": "stopped", "sentence": f"{self.inference.total} frames answered."})

    def stop(self) -> None:
        self._stopping = True

    def _turn(self, source) -> None:
        item = self._next(source)
        if item is not None:
            if item.frame is None:
                self.metrics.error("source")
                self._event({"event": "bad_input", "reason": "bad_input", "sentence": item.problem})
            else:
                self._source_state = "delivering"
                with contextlib.suppress(EdgeError):
                    answer = self.inference.answer(item.frame)
                    self._answers({"name": item.name, **answer})
                    self.learner.see(item.frame)
        self._requests.serve(self._orders.handlers)
        now = self._turned = time.monotonic()
        if now - self._stepped >= STEP_S:
            self._stepped = now
            self._step(now)

    def _next(self, source):
        if source is None:
            time.sleep(WAIT_S)
            return None
        try:
            return source.next(0.0 if len(self._requests) else WAIT_S)
        except SourceEnded as ended:
            self._source_state = f"ended: {ended}"
            self._event({"event": "source_lost", "reason": "source_lost", "sentence": str(ended)})
            return None

    def _step(self, now: float) -> None:
        """What isn't done for every frame."""
        inference = self.inference
        drift = self.learner.drift["score"] if self.learner.drift else None
        try:
            self.learner.tick(
                inference.health(drift),
                inference.runtime.generation,
                inference.latency.miss_share(),
            )
        except EdgeError as error:  # a full disk, a lock that somebody holds: the answers go on
            self._event({"event": "kept", "reason": "write_failed", "sentence": str(error)})
        self._exchange()
        if now - self._booked >= BOOK_S:
            self._booked = now
            self.learner.book()
        if now - self._shown >= SNAPSHOT_S:
            self._show(now)

    def _exchange(self) -> None:
        """Open another head beside the loop, and take it when it is known to answer."""
        if self._swap is None:
            if self.learner.reload:
                self.learner.loaded()
                o = self.options
                self._swap = Swap(self.bundle, self._backend, o.state, o.threads)
            return
        if not self._swap.done:
            return
        swap, self._swap = self._swap, None
        self.learner.loaded()
        if isinstance(swap.error, BusyError):
            self.learner.reload = True
            return
        if swap.runtime is None:
            self._event({"event": "kept", "reason": "parity_failed", "sentence": str(swap.error)})
            with contextlib.suppress(EdgeError):
                self.learner.roll_back("parity_failed")
            return
        drift = self.learner.drift["score"] if self.learner.drift else None
        before = self.inference.health(drift)
        self.inference.swap(swap.runtime)
        self.learner.swapped(before, swap.uncommitted)
        self._event({"event": "swapped", "generation": swap.runtime.generation})
        self._notes(swap.runtime)
        self._restock()

    def _notes(self, runtime: Runtime) -> None:
        """What loading fell back from."""
        for note in runtime.notes:
            if note.startswith("crash_loop"):
                found = {"decision": "rollback", "reason": "crash_loop"}
                found |= {"generation": runtime.generation, "sentence": note}
                with contextlib.suppress(EdgeError):
                    self.store.journal({"time": time.time(), **found})
                self.learner.rolled_back(found)
            else:
                self._event({"event": "note", "sentence": note})

    def _restock(self) -> None:
        self._kept = stored(self.bundle, self.store, self.inference.runtime.generation)
        self._show(time.monotonic())

    def _show(self, now: float) -> None:
        self._shown = now
        ready, why = self.ready()
        self._status = {
            **snapshot(self.bundle, self.inference, self.learner, self._kept, self._fixed),
            "ready": ready,
            "ready_sentence": why,
            "source": self._source_state,
            "uptime_s": now - self._began,
        }
        self.metrics.update(self._status)

    # -- around it ---------------------------------------------------------------------------------

    def _listen(self, stack: contextlib.ExitStack) -> None:
        o = self.options
        if o.http:
            from edgesolve.device.http import serve

            server = serve(
                o.http,
                self,
                token=o.token,
                metrics=self.metrics.render,
                contract=self.bundle.contract,
            )
            stack.callback(server.close)
            self._event({"event": "listening", "sentence": server.url})
        if o.mqtt:
            from edgesolve.device.mqtt import connect

            self._link = connect(o.mqtt, o.device, self, discovery=o.discovery)
            stack.callback(self._link.close)
        stack.callback(self._requests.close)  # before the threads that wait for an answer

    def _event(self, event: dict[str, Any]) -> None:
        event = {"time": time.time(), **event}
        self._count(event)
        self._say(event)
        if self._link is not None and event["event"] != "skipped":
            self._link.event(event)
            self._link.changed()
        if event["event"] in ("accepted", "proposed", "committed", "rollback", "command"):
            self._restock()

    def _count(self, event: dict[str, Any]) -> None:
        what, reason, m = event["event"], event.get("reason", ""), self.metrics
        if what in ("accepted", "proposed", "kept"):
            m.decision(what, reason)
            if event.get("relative_gap") is not None:
                m.solve(event["seconds"], event["relative_gap"])
        elif what == "rollback":
            m.rollback(reason)
        elif what == "skipped":
            m.skipped(reason)
        if event.get("drift"):
            m.drift(event["drift"]["score"], event["drift"]["alarm"])

    def _sentence(self) -> str:
        runtime = self.inference.runtime
        head = f"generation {runtime.generation}" if runtime.generation else "the factory head"
        return f"{self.bundle.manifest['name']}: {head} on {runtime.graph.runtime}."

    def _close(self) -> None:
        self.learner.close()
        if self._swap is not None:
            self._swap.join()
