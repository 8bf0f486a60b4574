"""A head that waits for approval: one sealed folder beside the generations, never loaded.

STATE/candidate        what is proposed
STATE/candidate.old    the one before, only while a newer one takes its place
STATE/candidate.new    not complete, or on its way out
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from edgesolve.device import device_key
from edgesolve.device.atomic import sync_folder
from edgesolve.device.errors import StateError
from edgesolve.device.generation import (
    Damaged,
    Generation,
    folders,
    hashes,
    opened,
    read_files,
    remove,
    seal_in,
    write_generation,
)
from edgesolve.device.in_force import GENERATIONS, in_force, is_foreign, named

_NOW, _OLD, _NEW = "candidate", "candidate.old", "candidate.new"


def write(state: Path, files: dict[str, bytes], parent: int, key: bytes | None) -> None:
    """Propose these files: a kill at any moment leaves the old candidate or this one. Raises OSError."""
    now, old, new = (state / name for name in (_NOW, _OLD, _NEW))
    for path in (new, state / f"{_NEW}.tmp"):
        remove(path)
    write_generation(new, 0, parent, files, key)
    if now.exists():
        remove(old)
        os.rename(now, old)
    os.rename(new, now)
    sync_folder(state)
    with contextlib.suppress(OSError):  # the next one removes it
        remove(old)


def offered(state: Path, bundle_sha256: str | None) -> tuple[Generation, dict[str, bytes]] | None:
    """(the candidate as generation 0, its files), or None where there is none.

    Raises Damaged with the reason why it can't be offered: damaged, of another bundle, committed
    already, or stale.
    """
    places = (_NOW, _OLD, _NOW)  # twice: another process may be replacing it
    folder = next((state / n for n in places if (state / n).exists()), None)
    if folder is None:
        return None
    key = device_key.read(state)
    try:
        files = read_files(folder, 0, key=key)
    except StateError as error:  # a newer release's must not stop this one
        raise Damaged(str(error).rstrip(".")) from error
    found = opened(files, key)
    base = found.provenance["bundle_sha256"]
    if is_foreign(base, bundle_sha256):
        raise Damaged(f"it belongs to bundle {base[:12]}…, this is {bundle_sha256[:12]}…")
    used, _ = in_force(state, base, [])
    number = used.number if used else 0
    if _taken(state, number, files):
        raise Damaged("it was committed already")  # and the process killed before it was removed
    if found.parent != number:
        before = f"generation {found.parent}" if found.parent else "the factory head"
        raise Damaged(f"it is stale, solved from {before} while {named(used)} is in use")
    return found, files


def discard(state: Path) -> None:
    """Remove the candidate, however damaged; none is fine. Raises OSError."""
    doomed = state / _NEW
    for name in (_OLD, _NOW):
        with contextlib.suppress(FileNotFoundError):
            remove(doomed)
            # Renamed first: a half-deleted folder must not look like a candidate.
            os.rename(state / name, doomed)
            sync_folder(state)
    remove(doomed)


def _taken(state: Path, used: int, files: dict[str, bytes]) -> bool:
    """Whether a generation in use, before that, or rolled back holds the same files.

    One after it doesn't count: its commit was interrupted.
    """
    for number, folder in folders(state / GENERATIONS):
        counts = folder.suffix == ".rejected" or (not folder.suffix and number <= used)
        if counts and seal_in(folder).get("files") == hashes(files):
            return True
    return False
