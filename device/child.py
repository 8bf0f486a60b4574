"""Start, watch, pause and end the child process that adapts (`worker.py`), without ever waiting for it."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgesolve.device.adapt import Options
from edgesolve.device.board import python_command
from edgesolve.device.window import Window

GRACE_S = 30.0
"""Beyond its own time budget a child is given this long before it is killed."""


class Child:
    """One run of the worker. `step` is what it does now; `poll()` gives its result once."""

    def __init__(
        self,
        bundle: Path,
        window: Window,
        *,
        state: Path,
        backend: str,
        threads: int,
        action: str,
        options: Options,
        seconds: float,
    ):
        """The frames of `window` are handed over in memory. Killed after `seconds`, pauses not counted."""
        self.look_only = options.look_only
        self.step, self.paused = "starting", False
        self._began, self._limit, self._stopped = time.monotonic(), seconds + GRACE_S, 0.0
        self._paused_at = 0.0
        descriptor = _in_memory(window)
        request = {
            "bundle": str(bundle),
            "state": str(state),
            "backend": backend,
            "threads": threads,
            "action": action,
            "options": asdict(options),
            "descriptor": descriptor,
            "shape": [window.n, *window.shape],
            "dtype": str(window.dtype),
        }
        try:
            self._process = subprocess.Popen(
                [*python_command(), "-m", "edgesolve.device.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[descriptor],
                start_new_session=True,
                env={
                    k: v
                    for k, v in os.environ.items()
                    if not k.startswith(("NOTIFY_", "WATCHDOG_"))
                },
            )
        finally:
            os.close(descriptor)
        self._process.stdin.write(json.dumps(request).encode())
        self._process.stdin.close()
        for stream in (self._process.stdout, self._process.stderr):
            os.set_blocking(stream.fileno(), False)
        self._text, self._errors = b"", b""

    @property
    def seconds(self) -> float:
        """Since the start, pauses not counted."""
        pause = time.monotonic() - self._paused_at if self.paused else 0.0
        return time.monotonic() - self._began - self._stopped - pause

    def poll(self) -> dict[str, Any] | None:
        """None while it runs; then {"report": …}, or {"error": sentence, "reason": code}."""
        self._text += _read(self._process.stdout)
        self._errors = (self._errors + _read(self._process.stderr))[-4096:]
        done = self._process.poll() is not None
        if done:
            self._text += _read(self._process.stdout)
        result = None
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                self.step = said.get("step", self.step)
                result = said if "step" not in said else result
        if result is not None:
            self.close()
            return result if "report" in result else {"reason": "solver_crashed", **result}
        if done:
            self.close()
            how = f"signal {-self._process.returncode}" if self._process.returncode < 0 else "exit"
            last = self._errors.decode(errors="replace").strip().splitlines()[-1:]
            return {
                "reason": "solver_crashed",
                "error": f"the child ended ({how}). {''.join(last)}",
            }
        if self.seconds > self._limit:
            self.close()
            return {"reason": "deadline_missed", "error": "the child overran its budget; killed."}
        return None

    def pause(self, wanted: bool) -> None:
        """Stop it where it stands, or let it go on: what it has summed up so far stays in its memory."""
        if wanted == self.paused:
            return
        now = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGSTOP if wanted else signal.SIGCONT)
        if wanted:
            self._paused_at = now
        else:
            self._stopped += now - self._paused_at
        self.paused = wanted

    def close(self) -> None:
        """End it, whatever it does; idempotent."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            stream.close()


def _in_memory(window: Window) -> int:
    """A descriptor of an anonymous file in memory that holds the frames of `window`: their only copy."""
    shape = (window.n, *window.shape)
    descriptor = os.memfd_create("edgesolve-window", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, window.dtype.itemsize * math.prod(shape))
    with mmap.mmap(descriptor, 0) as view:
        out = np.frombuffer(view, window.dtype).reshape(shape)
        window.frames(out)
        del out  # a mapping that is looked at can't be closed
    return descriptor


def _read(stream) -> bytes:
    if stream.closed:
        return b""
    with contextlib.suppress(BlockingIOError):
        return stream.read() or b""
    return b""
