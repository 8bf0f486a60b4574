"""What the device learned: numbered generations of the head, and a pointer to the one in use.

    STATE/CURRENT, CURRENT.bak   which generation is in use, and which one was before
    STATE/generations/0007/      head and statistics (safetensors), provenance.json, seal.json
    STATE/journal                the last 256 decisions, one JSON object a line
    STATE/lock                   held by the process that is changing something

A generation is never edited, the factory head lies in the bundle, and every byte read is checked:
killed or unplugged at any moment, the state loads the old generation or the new one, bit for bit.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgesolve.device.atomic import sync_folder, unwritable, write_atomic
from edgesolve.device.errors import BusyError, StateError
from edgesolve.device.generation import (
    Damaged,
    Generation,
    plain,
    read,
    read_generation,
    remove,
    sealed,
    unsealed,
    write_generation,
)

JOURNAL_LENGTH = 256
KEEP_NEWEST = 3
_POINTERS = ("CURRENT", "CURRENT.bak")


class Store:
    """The state folder `path`. Reading creates nothing and needs no write permission.

    `notes` says, in one sentence each, what the last `current()` fell back from. Not thread-safe.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.notes: list[str] = []
        self._locked = 0

    def current(self, bundle_sha256: str | None = None) -> Generation | None:
        """The generation in use, or None for the factory head.

        Falls back from CURRENT to CURRENT.bak, to the newest intact generation before them, to the
        factory head; `notes` tells. With `bundle_sha256`, generations that were solved for another
        bundle are ignored (note `vendor_update`). Raises StateError if a newer release wrote it.
        """
        self.notes = []
        limit = None
        for name in _POINTERS:
            pointer = self._pointer(name)
            if pointer is None or (limit is not None and pointer["generation"] >= limit):
                continue
            if self._foreign(pointer, bundle_sha256):
                continue
            limit = pointer["generation"]
            if limit == 0:
                return None
            found = self._usable(limit, bundle_sha256, pointer["sha256"])
            if found is not None:
                return found
        older = (n for n in self._numbers() if limit is None or n < limit)
        found = self._newest(older, bundle_sha256)
        if self.notes:
            instead = f"generation {found.number}" if found else "the factory head"
            self.notes.append(f"In use instead: {instead}.")
        return found

    def history(self) -> list[dict[str, Any]]:
        """The decisions in the journal, oldest first; damaged lines are left out."""
        entries = []
        with contextlib.suppress(OSError):
            for line in (self.path / "journal").read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    entries.append(json.loads(line))
        return [entry for entry in entries if isinstance(entry, dict)]

    def commit(
        self,
        head: dict[str, np.ndarray],
        statistics: dict[str, np.ndarray] | None,
        provenance: dict[str, Any],
    ) -> int:
        """Store a new generation and make it current; returns its number.

        `provenance` must be JSON and name the `bundle_sha256` that the head was solved for. Raises
        StateError (disk full, read-only, …) or BusyError: the old generation or the new one is then
        in use, whole.
        """
        bundle_sha256 = provenance["bundle_sha256"]
        with self._changing():
            used = self.current(bundle_sha256)
            parent = used.number if used else 0
            self._prune(used.parent if used else 0)
            number = 1 + max([*self._numbers("any"), *self._pointed_at()], default=0)
            folder = self._folder(number)
            folder.parent.mkdir(exist_ok=True)
            sync_folder(self.path)
            seal_sha256 = write_generation(folder, number, parent, head, statistics, provenance)
            self._point("CURRENT.bak", parent, used and used.seal_sha256, bundle_sha256)
            self._point("CURRENT", number, seal_sha256, bundle_sha256)
            self._prune()
        return number

    def rollback(self, bundle_sha256: str | None = None) -> int:
        """Go back to what the generation in use was solved from; returns its number, 0 = factory.

        The one left behind is kept aside as `NNNN.rejected` and never loaded again. Repeated calls
        go further back; the factory head stays the factory head.
        """
        with self._changing():
            used = self.current(bundle_sha256)
            older = (n for n in self._numbers() if used and n <= used.parent)
            target = self._newest(older, bundle_sha256)
            if used:
                folder = self._folder(used.number)
                os.rename(folder, folder.with_name(f"{folder.name}.rejected"))
                sync_folder(folder.parent)
                bundle_sha256 = used.provenance["bundle_sha256"]
            self._point_both(target, bundle_sha256)
        return target.number if target else 0

    def factory_reset(self) -> None:
        """Use the factory head and delete every generation; works on a damaged or newer state."""
        with self._writing():
            for name in ("lock", *_POINTERS):
                if (self.path / name).is_dir():  # a repaired file system may leave anything
                    remove(self.path / name)
        with self._changing():
            self._point_both(None, None)
            remove(self.path / "generations")
            sync_folder(self.path)

    def journal(self, entry: dict[str, Any]) -> None:
        """Append one decision and drop the oldest beyond 256. Raises StateError or BusyError."""
        with self._changing():
            entries = [*self.history(), entry][-JOURNAL_LENGTH:]
            lines = (json.dumps(e, default=plain) + "\n" for e in entries)
            write_atomic(self.path / "journal", "".join(lines).encode())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold STATE/lock; the methods that change something take it themselves, and may nest.

        Raises BusyError naming the process that holds it. The system frees it when a process dies.
        """
        if self._locked == 0:
            with self._writing():
                self.path.mkdir(parents=True, exist_ok=True)
                self._descriptor = _lock_file(self.path / "lock")
        self._locked += 1
        try:
            yield
        finally:
            self._locked -= 1
            if self._locked == 0:
                os.close(self._descriptor)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with self.lock(), self._writing():
            yield

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _folder(self, number: int) -> Path:
        return self.path / "generations" / f"{number:04d}"

    def _numbers(self, which: str = "stored") -> list[int]:
        """Numbers of the stored generations, or of "any" folder, unfinished or rejected."""
        pattern = r"(\d{4,})" if which == "stored" else r"(\d{4,})(?:\.\w+)?"
        try:
            names = os.listdir(self.path / "generations")
        except OSError:
            return []
        return [int(found[1]) for name in names if (found := re.fullmatch(pattern, name))]

    def _newest(self, numbers, bundle_sha256: str | None) -> Generation | None:
        for number in sorted(numbers, reverse=True):
            found = self._usable(number, bundle_sha256)
            if found is not None:
                return found
        return None

    def _usable(self, number, bundle_sha256, seal_sha256=None) -> Generation | None:
        """The generation if it is intact and of this bundle, else None and a note."""
        try:
            found = read_generation(self._folder(number), number, seal_sha256)
        except Damaged as damage:
            self.notes.append(f"Generation {number} is not used: {damage}.")
            return None
        record = {"generation": number, "bundle_sha256": found.provenance["bundle_sha256"]}
        return None if self._foreign(record, bundle_sha256) else found

    def _foreign(self, record: dict[str, Any], bundle_sha256: str | None) -> bool:
        """Whether the record belongs to another bundle than the one asked for, with a note."""
        base = record["bundle_sha256"]
        if None in (base, bundle_sha256) or base == bundle_sha256:
            return False
        note = (
            f"vendor_update: generation {record['generation']} belongs to bundle {base[:12]}…, "
            f"this is {bundle_sha256[:12]}…."
        )
        if note not in self.notes:
            self.notes.append(note)
        return True

    def _prune(self, *needed: int) -> None:
        """Delete what is neither needed, pointed at, nor among the newest; failing is no error."""
        with contextlib.suppress(OSError):
            folders = sorted(
                (int(found[1]), folder)
                for folder in (self.path / "generations").iterdir()
                if (found := re.fullmatch(r"(\d{4,})(?:\.\w+)?", folder.name))
            )
            finished = [number for number, folder in folders if folder.suffix != ".tmp"]
            keep = {*needed, *self._pointed_at(), *finished[-KEEP_NEWEST:]}
            for number, folder in folders:
                if number not in keep or folder.suffix == ".tmp":
                    # Renamed first: a half-deleted folder must not look like a generation.
                    doomed = folder.with_suffix(".tmp")
                    os.rename(folder, doomed)
                    remove(doomed)

    def _pointer(self, name: str) -> dict[str, Any] | None:
        """The pointer, or None: never written, or damaged (with a note)."""
        path = self.path / name
        try:
            return unsealed(read(path), path)
        except Damaged as damage:
            if path.exists() or self._numbers():
                self.notes.append(f"{name} is not used: {damage}.")
            return None

    def _readable_pointers(self) -> list[dict[str, Any]]:
        found = []
        for name in _POINTERS:
            with contextlib.suppress(Damaged, StateError):
                found.append(unsealed(read(self.path / name), self.path / name))
        return found

    def _pointed_at(self) -> list[int]:
        return [pointer["generation"] for pointer in self._readable_pointers()]

    def _point(self, name, generation, seal_sha256, bundle_sha256) -> None:
        sequence = 1 + max((p["sequence"] for p in self._readable_pointers()), default=0)
        pointer = {
            "generation": generation,
            "sequence": sequence,
            "sha256": seal_sha256,
            "bundle_sha256": bundle_sha256,
        }
        write_atomic(self.path / name, sealed(pointer))

    def _point_both(self, target: Generation | None, bundle_sha256: str | None) -> None:
        # CURRENT.bak too: what was rolled back must not come back when CURRENT is damaged.
        for name in _POINTERS:
            number, seal = (target.number, target.seal_sha256) if target else (0, None)
            self._point(name, number, seal, bundle_sha256)


def _lock_file(path: Path) -> int:
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
