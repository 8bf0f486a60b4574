"""The child process that looks at one window: started by the service, gone when it has decided.

    python -m edgesolve.device.worker < request.json

The request names a file descriptor that holds the frames (a memfd: they never touch the disk). Every step is a JSON
line on stdout, {"step": …}, the last one {"report": …} or {"error": …, "exit_code": …}. It runs at the lowest
priority and dies with the service; a crash, a leak or the solver's libraries stay in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import signal
import sys
from typing import Any

import numpy as np

from edgesolve.device import atomic
from edgesolve.device.errors import EdgeError

NICE = 19
_PR_SET_PDEATHSIG = 1


def main() -> int:
    parent = os.getppid()
    _die_with(parent)
    with contextlib.suppress(OSError):
        os.nice(NICE)
    request = json.loads(sys.stdin.read())
    try:
        report = _run(request)
    except EdgeError as error:
        _say({"error": str(error), "exit_code": error.exit_code})
        return error.exit_code
    except MemoryError:
        _say({"error": "not enough memory to adapt.", "exit_code": 1, "reason": "memory_bound"})
        return 1
    _say({"report": {**report, "written": atomic.written()}})
    return 0


def _run(request: dict[str, Any]) -> dict[str, Any]:
    from edgesolve.device.adapt import Options
    from edgesolve.device.recalibrate import run

    frames = _frames(request["descriptor"], request["shape"], request["dtype"])
    return run(
        request["bundle"],
        frames,
        None,
        state=request["state"],
        backend=request["backend"],
        threads=request["threads"],
        action=request["action"],
        options=Options(**request["options"]),
        say=lambda step: _say({"step": step}),
    )


def _frames(descriptor: int, shape: list[int], dtype: str) -> np.ndarray:
    """A read-only view of the frames behind `descriptor`."""
    view = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    return np.frombuffer(view, np.dtype(dtype), count=int(np.prod(shape))).reshape(shape)


def _die_with(parent: int) -> None:
    """Linux: be killed when the service dies, however it does."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line, default=float), flush=True)


if __name__ == "__main__":
    sys.exit(main())
