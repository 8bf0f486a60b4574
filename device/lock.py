"""One process at a time changes a state folder; the system frees its lock when it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from edgesolve.device.atomic import make_folder, unwritable
from edgesolve.device.errors import BusyError


class Lock:
    """STATE/lock, taken by `with lock.held():`, which may nest. Not thread-safe."""

    def __init__(self, path: Path):
        self.path = path
        self._depth = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Raises BusyError naming the process that holds it, or StateError."""
        if self._depth == 0:
            try:
                make_folder(self.path.parent)
                self._descriptor = _locked(self.path)
            except OSError as error:
                raise unwritable(self.path.parent, error) from error
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                os.close(self._descriptor)


def _locked(path: Path) -> int:
    """A descriptor that holds the lock. Raises BusyError or OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "(unknown)"
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
            raise
        raise BusyError(
            f"{path.parent}: process {holder} is changing this state; wait for it or stop it."
        ) from error
    with contextlib.suppress(OSError):  # the pid is a courtesy: a full disk may refuse it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
