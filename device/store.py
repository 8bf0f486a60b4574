"""What the device learned: numbered generations of the head, and a pointer to the one in use.

    STATE/CURRENT, CURRENT.bak   which generation is in use, and which one was before
    STATE/generations/0007/      head, statistics, window (safetensors), provenance.json, seal.json
    STATE/candidate/             the same, of a head that waits for approval
    STATE/journal                the last 256 decisions, one JSON object a line
    STATE/key, ledger            of this device; what it did today and ever
    STATE/lock                   held by the process that is changing something

A generation is never edited, the factory head lies in the bundle, and every byte read is checked:
killed or unplugged at any moment, the state loads the old generation or the new one, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgesolve.device import candidate, device_key, pointer
from edgesolve.device.atomic import sync_folder, unwritable, write_atomic
from edgesolve.device.errors import StateError
from edgesolve.device.generation import (
    Damaged,
    Generation,
    folders,
    packed,
    plain,
    prune,
    remove,
    seal_in,
    write_generation,
)
from edgesolve.device.in_force import GENERATIONS, folder_of, in_force, named, newest
from edgesolve.device.lock import Lock
from edgesolve.device.pointer import BACKUP, CURRENT, TRIES, Pointer

JOURNAL_LENGTH = 256
KEEP_NEWEST = 3


class Store:
    """The state folder `path`. Reading creates nothing and needs no write permission.

    `notes` says, in one sentence each, what the last `current`, `start` or `candidate` fell back
    from. Not thread-safe.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.notes: list[str] = []
        self._generations = self.path / GENERATIONS
        self._lock = Lock(self.path / "lock")

    # -- what is in force ----------------------------------------------------------------------

    def current(self, bundle_sha256: str | None = None) -> Generation | None:
        """The generation in use, or None for the factory head.

        Falls back from CURRENT to CURRENT.bak, to the newest intact generation before them, to the
        factory head; `notes` tells. With `bundle_sha256`, generations that were solved for another
        bundle are ignored (note `vendor_update`). Raises StateError if a newer release wrote it.
        """
        self.notes = []
        return in_force(self.path, bundle_sha256, self.notes)[0]

    def pointer(self, bundle_sha256: str | None = None) -> dict[str, Any] | None:
        """generation, sequence, tries_left, committed of what is in use; None: nothing names it."""
        found = in_force(self.path, bundle_sha256, [])[1]
        keys = ("generation", "sequence", "tries_left", "committed")
        return None if found is None else {key: getattr(found, key) for key in keys}

    def start(self, bundle_sha256: str | None = None) -> Generation | None:
        """What a service loads: `current`, but each load of an uncommitted generation is counted.

        Its tries are lowered durably before it is returned; once none is left it is rolled back
        (note `crash_loop`). Where they can't be lowered (disk full, read-only, …), what it was
        solved from is returned and a note tells. Raises BusyError.
        """
        self.notes = []
        found, at = in_force(self.path, bundle_sha256, self.notes)
        if found is None or (at and at.committed):
            return found
        try:
            with self._changing():
                return self._counted(bundle_sha256)
        except StateError as error:
            note = f"Generation {found.number} is on probation, its tries can't be counted: {error}"
            instead = newest(self.path, bundle_sha256, [], below=found.parent + 1)
            self.notes += [note, f"In use instead: {named(instead)}."]
            return instead

    def confirm(self, number: int) -> None:
        """Commit the generation in use: it is loaded without counting from now on.

        Repeated calls do nothing. Raises StateError if `number` is not in use, or BusyError.
        """
        if self._on_probation(number) is None:
            return
        with self._changing():
            if at := self._on_probation(number):
                pointer.write(self.path, CURRENT, replace(at, tries_left=0, committed=True))

    # -- changes -------------------------------------------------------------------------------

    def commit(
        self,
        head: dict[str, np.ndarray],
        statistics: dict[str, np.ndarray] | None,
        provenance: dict[str, Any],
        *,
        window: dict[str, np.ndarray] | None = None,
        committed: bool = True,
        tries: int = TRIES,
    ) -> int:
        """Store a new generation and make it current; returns its number.

        `provenance` must be JSON and name the `bundle_sha256` that the head was solved for;
        `window` holds the moments it was solved from. Not `committed`, it can be loaded by `start`
        `tries` times until `confirm`. Raises StateError (disk full, read-only, …) or BusyError: the
        old generation or the new one is then in use, whole.
        """
        _check(tries)
        files = packed(head, statistics, provenance, window)
        with self._changing():
            return self._commit(files, provenance["bundle_sha256"], committed, tries)

    def rollback(self, bundle_sha256: str | None = None) -> int:
        """Go back to what the generation in use was solved from; returns its number, 0 = factory.

        The one left behind is kept aside as `NNNN.rejected` and never loaded again. Repeated calls
        go further back; the factory head stays the factory head.
        """
        with self._changing():
            self.notes = []
            used, _ = in_force(self.path, bundle_sha256, self.notes)
            below = used.parent + 1 if used else 0
            target = newest(self.path, bundle_sha256, self.notes, below)
            if used:
                bundle_sha256 = used.provenance["bundle_sha256"]
            at = pointer.to(target, bundle_sha256)
            for known in pointer.readable(self.path):
                if target and known.sha256 == target.seal_sha256:
                    at = known  # still on probation, perhaps
            if used:
                folder = folder_of(self.path, used.number)
                os.rename(folder, folder.with_name(f"{folder.name}.rejected"))
                sync_folder(folder.parent)
            self._point_both(at)
        return target.number if target else 0

    def propose(
        self,
        head: dict[str, np.ndarray],
        statistics: dict[str, np.ndarray] | None,
        provenance: dict[str, Any],
        window: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Keep a head for approval, instead of an older candidate; what is in use stays.

        `provenance` as in `commit`, and `parent`: the generation that it was solved from.
        """
        files = packed(head, statistics, provenance, window)
        with self._changing():
            candidate.write(self.path, files, provenance["parent"], self._key())

    def candidate(self, bundle_sha256: str | None = None) -> Generation | None:
        """The head that waits for approval, as number 0, or None and a note if it can't be had:
        damaged, of another bundle, committed already, or stale (its parent is not in use)."""
        self.notes = []
        try:
            found = candidate.offered(self.path, bundle_sha256)
        except Damaged as why:
            self.notes.append(f"The candidate is not offered: {why}.")
            return None
        return found and found[0]

    def approve(
        self, bundle_sha256: str | None = None, *, committed: bool = True, tries: int = TRIES
    ) -> int:
        """Commit the candidate's bytes as a new generation; returns its number.

        Raises StateError where `candidate` would give None, or BusyError.
        """
        _check(tries)
        with self._changing():
            try:
                found = candidate.offered(self.path, bundle_sha256)
            except Damaged as why:
                raise StateError(f"{self.path}: the candidate can't be approved: {why}.") from why
            if found is None:
                raise StateError(f"{self.path}: no candidate waits for approval.")
            base = found[0].provenance["bundle_sha256"]
            number = self._commit(found[1], base, committed, tries)
            with contextlib.suppress(OSError):  # it is not offered again
                candidate.discard(self.path)
        return number

    def reject(self) -> None:
        """Remove the candidate; none is fine. Raises StateError or BusyError."""
        with self._changing():
            candidate.discard(self.path)

    def factory_reset(self) -> None:
        """Use the factory head, delete every generation and the candidate; works on a damaged or
        newer state. The journal, the key and the ledger stay."""
        with self._writing():
            for name in ("lock", "journal", device_key.NAME, *pointer.NAMES):
                if (self.path / name).is_dir():  # a repaired file system may leave anything
                    remove(self.path / name)
        with self._changing():
            self._point_both(Pointer(0, None, None))
            candidate.discard(self.path)
            remove(self._generations)
            sync_folder(self.path)

    # -- journal and lock ----------------------------------------------------------------------

    def history(self) -> list[dict[str, Any]]:
        """The decisions in the journal, oldest first; damaged lines are left out."""
        entries = []
        with contextlib.suppress(OSError):
            for line in (self.path / "journal").read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    entries.append(json.loads(line))
        return [entry for entry in entries if isinstance(entry, dict)]

    def journal(self, entry: dict[str, Any]) -> None:
        """Append one decision and drop the oldest beyond 256. Raises StateError or BusyError."""
        with self._changing():
            entries = [*self.history(), entry][-JOURNAL_LENGTH:]
            lines = (json.dumps(e, default=plain) + "\n" for e in entries)
            write_atomic(self.path / "journal", "".join(lines).encode())

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold STATE/lock; the methods that change something take it themselves, and may nest.

        Raises BusyError naming the process that holds it. The system frees it when a process dies.
        """
        return self._lock.held()

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

    # -- under the lock ------------------------------------------------------------------------

    def _commit(self, files: dict[str, bytes], bundle_sha256: str, committed, tries) -> int:
        self.notes = []
        used, at = in_force(self.path, bundle_sha256, self.notes)
        parent = used.number if used else 0
        self._prune(used.parent if used else 0)
        number = 1 + max([n for n, _ in folders(self._generations)] + self._pointed_at(), default=0)
        self._generations.mkdir(exist_ok=True)
        sync_folder(self.path)
        folder = folder_of(self.path, number)
        seal_sha256 = write_generation(folder, number, parent, files, self._key())
        before = at or _unnamed(used) if used else Pointer(0, None, bundle_sha256)
        pointer.write(self.path, BACKUP, before)
        tries_left = 0 if committed else tries
        now = Pointer(number, seal_sha256, bundle_sha256, tries_left, committed)
        pointer.write(self.path, CURRENT, now)
        self._prune()
        return number

    def _counted(self, bundle_sha256: str | None) -> Generation | None:
        notes = []
        while True:
            self.notes = []
            found, at = in_force(self.path, bundle_sha256, self.notes)
            if found is None or (at and at.committed):
                break
            left = at or _unnamed(found)
            if left.tries_left > 0:
                lowered = replace(left, tries_left=left.tries_left - 1)
                if at is None:
                    pointer.write(self.path, BACKUP, lowered)
                pointer.write(self.path, CURRENT, lowered)
                break
            notes.append(
                f"crash_loop: generation {found.number} used up its tries and was never confirmed."
            )
            self.rollback(bundle_sha256)
        self.notes = notes + self.notes
        return found

    def _key(self) -> bytes | None:
        """The device's key, made with the first seal; a lost one is not replaced while seals are
        left that it made: the new one would disown them."""
        key = device_key.read(self.path)
        if key or any("hmac" in seal_in(folder) for _, folder in folders(self._generations)):
            return key
        return device_key.create(self.path)

    def _point_both(self, at: Pointer) -> None:
        # CURRENT.bak too: what was rolled back must not come back when CURRENT is damaged.
        for name in pointer.NAMES:
            pointer.write(self.path, name, at)

    def _pointed_at(self) -> list[int]:
        return [at.generation for at in pointer.readable(self.path)]

    def _prune(self, *needed: int) -> None:
        with contextlib.suppress(OSError):  # failing to tidy up is no error
            prune(self._generations, {*needed, *self._pointed_at()}, KEEP_NEWEST)
            for name in (*pointer.NAMES, "journal", device_key.NAME):
                for left in self.path.glob(f".{name}.*.tmp"):  # of a process that was killed
                    remove(left)

    def _on_probation(self, number: int) -> Pointer | None:
        """What names this generation, None if it is committed. Raises StateError: not in use."""
        found, at = in_force(self.path, None, [])
        if number != (found.number if found else 0):
            raise StateError(
                f"{self.path}: generation {number} can't be confirmed, {named(found)} is in use."
            )
        return None if found is None or (at and at.committed) else at or _unnamed(found)


def _unnamed(found: Generation) -> Pointer:
    """What holds for a generation that no pointer names: nobody knows if it was ever confirmed."""
    return pointer.to(found, tries=TRIES)


def _check(tries: int) -> None:
    if tries < 1:
        raise ValueError(f"tries must be at least 1, got {tries}.")
