"""`edgesolve serve` on a terminal or under systemd: signals, answers on stdout, events on stderr."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from typing import Any

from edgesolve.device.bundle import Bundle
from edgesolve.device.lock import Lock
from edgesolve.device.service import ServeOptions, Service


def run(bundle: Bundle, options: ServeOptions, *, as_json: bool, answers: bool) -> int:
    """The command: until SIGTERM, SIGINT or the end of its source. One service a state folder. Raises EdgeError."""
    stopped = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.append(True))
    with Lock(options.state / "serving").held():
        service = Service(
            bundle, options, _teller(sys.stderr, as_json), _printer(as_json) if answers else _quiet
        )
        service.run(lambda: bool(stopped))
    return 0


def _quiet(answer: dict[str, Any]) -> None:
    pass


def _printer(as_json: bool) -> Callable[[dict[str, Any]], None]:
    def show(a: dict[str, Any]) -> None:
        print(
            json.dumps(a) if as_json else f"{a['name']}  {a['class']}  {a['score']:.3f}", flush=True
        )

    return show


def _teller(stream, as_json: bool) -> Callable[[dict[str, Any]], None]:
    def tell(event: dict[str, Any]) -> None:
        if as_json:
            print(json.dumps(event, default=float), file=stream, flush=True)
            return
        words = [event["event"]]
        words += [f"({event['reason']})"] if event.get("reason") else []
        words += [str(event["sentence"])] if event.get("sentence") else []
        print(" ".join(words), file=stream, flush=True)

    return tell
