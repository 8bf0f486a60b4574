"""What an operator or an uploaded frame asks of the running service, carried out on its loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgesolve.device import operator
from edgesolve.device.bundle import Bundle
from edgesolve.device.errors import BusyError, EdgeError, InputError, StateError
from edgesolve.device.inference import Inference
from edgesolve.device.learner import Learner


class Orders:
    """`handlers` of `control.Requests`; every command is answered, a refused one with its reason."""

    def __init__(
        self,
        bundle: Bundle,
        inference: Inference,
        learner: Learner,
        done: Callable[[dict[str, Any]], None],
    ):
        """`done` gets each command as an event."""
        self.bundle, self.inference, self.learner, self._done = bundle, inference, learner, done
        self.handlers = {"command": self._command, "predict": self._predict}
        self._commands: dict[str, Callable[[], dict[str, Any]]] = {
            "recalibrate": self._recalibrate,
            "approve": lambda: self._decide(operator.approve, committed=False),
            "reject": lambda: self._decide(operator.reject),
            "rollback": self._roll_back,
            "freeze": lambda: self._decide(operator.freeze),
            "unfreeze": lambda: self._decide(operator.unfreeze),
        }

    def _predict(self, frame: np.ndarray) -> dict[str, Any]:
        frames = self.bundle.contract.check(frame)
        if len(frames) != 1:
            raise InputError(f"{len(frames)} frames were sent, one is answered at a time.")
        answer = self.inference.answer(frames[0])
        self.learner.see(frames[0])
        return answer

    def _command(self, name: str, source: str) -> dict[str, Any]:
        try:
            found = self._commands[name]()
        except BusyError as error:
            found = self._refused("busy", str(error))
        except EdgeError as error:
            found = self._refused("nothing_to_do", str(error))
        self._done({"event": "command", "command": name, "source": source, **found})
        return found

    def _decide(self, act, **more) -> dict[str, Any]:
        found = act(self.bundle, self.learner.store, **more)
        if act is operator.approve:
            self.learner.approved(found)
        return found

    def _roll_back(self) -> dict[str, Any]:
        if self.inference.runtime.generation == 0:
            raise StateError("the factory head is in force; there is nothing to go back to.")
        return self.learner.roll_back("operator")

    def _recalibrate(self) -> dict[str, Any]:
        reason = self.learner.order()
        if reason is not None:
            return self._refused(reason, f"Not now: {reason}.")
        return {
            "ok": True,
            "decision": "started",
            "reason": "operator",
            "generation": self.inference.runtime.generation,
            "sentence": f"Looking at {len(self.learner.window)} frames; an event will tell what came of it.",
        }

    def _refused(self, reason: str, sentence: str) -> dict[str, Any]:
        return {
            "ok": False,
            "decision": "kept",
            "reason": reason,
            "generation": self.inference.runtime.generation,
            "sentence": sentence,
        }
