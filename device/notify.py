"""Tell systemd that the service is up, what it does and that it still turns (sd_notify(3)).

Without NOTIFY_SOCKET every call does nothing: the same code runs by hand, in Docker, under systemd.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, MutableMapping

VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
# systemd reads its socket in a busy main loop: wait that long for room, then do without.
_SEND_S = 0.5


class Notifier:
    """Messages to the service manager. No call raises and none waits longer than half a second."""

    def __init__(self, environ: MutableMapping[str, str], clock: Callable[[], float]) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._watchdog_s = _watchdog_s(environ)
        self._clock = clock
        self._petted: float | None = None

    @property
    def watchdog_s(self) -> float | None:
        """Seconds of silence after which systemd ends this process; None: it doesn't watch."""
        return self._watchdog_s if self._address else None

    def ready(self) -> bool:
        """The service does its work; call it after the first checked inference."""
        return self._send("READY=1")

    def status(self, text: str) -> bool:
        """One line for `systemctl status`."""
        return self._send("STATUS=" + " ".join(text.split()))

    def watchdog(self) -> bool:
        """The loop turned. Call it on every turn: at most four messages per watchdog period are sent."""
        if self.watchdog_s is None:
            return False
        now = self._clock()
        if self._petted is not None and now - self._petted < self._watchdog_s / 4:
            return False
        self._petted = (
            now  # sent or not: a manager with a full socket must not cost every turn a wait
        )
        return self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> bool:
        """A long start or stop (an engine build) needs `seconds` more from now."""
        return self._send(f"EXTEND_TIMEOUT_USEC={max(0, round(seconds * 1e6))}")

    def stopping(self) -> bool:
        """The service goes down on purpose."""
        return self._send("STOPPING=1")

    def _send(self, message: str) -> bool:
        if self._address is None:
            return False
        with contextlib.suppress(OSError):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                out.settimeout(_SEND_S)
                return out.sendto(message.encode(errors="replace"), self._address) > 0
        return False


def open_notifier(
    *,
    unset: bool = False,
    environ: MutableMapping[str, str] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Notifier:
    """The notifier that the environment asks for. `unset` removes the variables, so that children
    started from here on neither speak for the service nor feed its watchdog."""
    environ = os.environ if environ is None else environ
    notifier = Notifier(environ, clock)
    if unset:
        for name in VARIABLES:
            environ.pop(name, None)
    return notifier


def _address(name: str) -> str | None:
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None


def _watchdog_s(environ: MutableMapping[str, str]) -> float | None:
    """The period, where it is meant for this process."""
    try:
        period = int(environ["WATCHDOG_USEC"]) / 1e6
        mine = int(environ.get("WATCHDOG_PID") or os.getpid()) == os.getpid()
    except (KeyError, ValueError):
        return None
    return period if mine and period > 0 else None
