"""Replace a file so that a power cut leaves the old bytes or the new ones, never a mixture."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from pathlib import Path

from edgesolve.device.errors import StateError

_counting = threading.Lock()
_written = 0


def written() -> int:
    """Bytes that this process has written durably so far: what wears the card."""
    return _written


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of the file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path: str | Path, data: bytes, mode: int = 0o666) -> None:
    """Make `path` hold exactly `data`: temporary file beside it, fsync, rename, fsync folder.

    Raises StateError naming the path and the system's reason (disk full, read-only, …); the
    temporary file is then removed and `path` holds what it held, or all of `data`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_durable(temporary, data, mode)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def write_durable(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file, new ones with `mode` less the umask, and wait until the device says that it
    holds it. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    descriptor = os.open(path, flags, mode)
    try:
        left = memoryview(data)
        while left:
            left = left[_counted(os.write(descriptor, left)) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _counted(n: int) -> int:
    global _written
    with _counting:
        _written += n
    return n


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, and wait until their names are on the
    device: else a power cut takes all that was stored there since. Raises OSError."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    with contextlib.suppress(PermissionError):  # whoever may write there may not list it
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` (creations, renames) are on the device. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritable(path: Path, error: OSError) -> StateError:
    """The one sentence for a failed write."""
    return StateError(
        f"{path}: cannot be written ({error.strerror or error}); nothing stored before is lost."
    )
