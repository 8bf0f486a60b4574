"""Open the generation in force on a thread of its own, try it, and hand it over when it is known to answer."""

from __future__ import annotations

import threading
import time

import numpy as np

from edgesolve.device import pointer
from edgesolve.device.bundle import Bundle
from edgesolve.device.errors import BusyError, ParityError
from edgesolve.device.runtime import Runtime, open_generation
from edgesolve.device.store import Store

BUSY_S = 10.0


class Swap:
    """One attempt: `done` once `runtime` or `error` is there. Nothing waits for it."""

    def __init__(self, bundle: Bundle, backend: str, state, threads: int):
        self.runtime: Runtime | None = None
        self.error: Exception | None = None
        self.uncommitted = False
        self._arguments = (bundle, backend, Store(state), threads)
        self._thread = threading.Thread(target=self._open, name="edgesolve-swap", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()

    def _open(self) -> None:
        try:
            self.runtime, self.uncommitted = self._patiently()
        except Exception as error:  # the loop's to judge: this thread must not die unheard
            self.error = error

    def _patiently(self) -> tuple[Runtime, bool]:
        """Somebody else's command may hold the state for a moment."""
        end = time.monotonic() + BUSY_S
        while True:
            try:
                return opened(*self._arguments)
            except BusyError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)


def opened(bundle: Bundle, backend: str, store: Store, threads: int) -> tuple[Runtime, bool]:
    """(the runtime of the generation in force, tried on the bundle's own frames; whether it is on probation).

    A generation on probation loses one of its tries here. Raises EdgeError.
    """
    found = store.start(bundle.sha256)
    runtime = open_generation(bundle, backend, found, list(store.notes), threads)
    check(runtime)
    at = pointer.naming(store.path, runtime.generation)
    return runtime, at is not None and not at.committed


def check(runtime: Runtime) -> None:
    """Raises ParityError where a runtime's first answers are no answers."""
    logits = runtime.logits(runtime.example(2))
    if logits.shape != (2, len(runtime.bundle.classes)) or not np.isfinite(logits).all():
        raise ParityError(
            f"generation {runtime.generation} answers {logits.shape} with NaN or inf."
        )
