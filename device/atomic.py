"""Replace a file so that a power cut leaves the old bytes or the new ones, never a mixture."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from edgesolve.device.errors import StateError


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of the file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path: str | Path, data: bytes) -> None:
    """Make `path` hold exactly `data`: temporary file beside it, fsync, rename, fsync folder.

    Raises StateError naming the path and the system's reason (disk full, read-only, …); the
    temporary file is then removed and `path` holds what it held, or all of `data`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_durable(temporary, data)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def write_durable(path: Path, data: bytes) -> None:
    """Write a new file and wait until the device says that it holds it. Raises OSError."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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
