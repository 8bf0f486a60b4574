"""What other threads may ask of a running service, and how their calls reach its loop."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from typing import Any, Protocol

import numpy as np

from edgesolve.device.errors import BusyError

COMMANDS = ("recalibrate", "approve", "reject", "rollback", "freeze", "unfreeze")
WAITING = 64
ANSWER_S = 15.0


class Control(Protocol):
    """Thread-safe. HTTP, MQTT and the status page talk to this and to nothing else."""

    def status(self) -> dict[str, Any]:
        """The last snapshot; not to be changed."""

    def alive(self) -> bool:
        """Whether the loop turned within the last 30 seconds."""

    def ready(self) -> tuple[bool, str]:
        """Whether a checked head answers and the source delivers, and a sentence."""

    def command(self, name: str, source: str) -> dict[str, Any]:
        """Carry out one of COMMANDS for `source` ("http", "mqtt", …): ok, decision, reason, generation, sentence."""

    def predict(self, frame: np.ndarray) -> dict[str, Any]:
        """top1, class, score and generation for one frame (h, w, c). Raises InputError."""


class Requests:
    """Calls from other threads, carried out one by one by the loop that owns everything."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[str, tuple, Future]] = queue.Queue(WAITING)
        self._closed = False

    def ask(self, kind: str, *arguments) -> Any:
        """The handler's result or exception. Raises BusyError where the loop has too much to do."""
        if self._closed:
            raise BusyError("the service is stopping.")
        answer: Future = Future()
        try:
            self._waiting.put_nowait((kind, arguments, answer))
            return answer.result(ANSWER_S)
        except queue.Full:
            raise BusyError(f"{WAITING} requests wait already; try again later.") from None
        except Late:
            answer.cancel()
            raise BusyError(f"no answer within {ANSWER_S:g} s; try again later.") from None

    def serve(self, handlers: Mapping[str, Callable[..., Any]]) -> None:
        """Answer all that wait now; called by the loop."""
        for _ in range(self._waiting.qsize()):
            kind, arguments, answer = self._waiting.get_nowait()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(handlers[kind](*arguments))
            except Exception as error:  # the asker's to see: the loop goes on
                answer.set_exception(error)

    def close(self) -> None:
        """Nobody will answer any more: whoever waits is told, and so is whoever asks."""
        self._closed = True
        while True:
            try:
                _, _, answer = self._waiting.get_nowait()
            except queue.Empty:
                return
            if answer.set_running_or_notify_cancel():
                answer.set_exception(BusyError("the service is stopping."))

    def __len__(self) -> int:
        return self._waiting.qsize()
