"""Which generation is in force: one small checksummed file, and a second one in case it is lost."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from edgesolve.device.atomic import write_atomic
from edgesolve.device.errors import StateError
from edgesolve.device.generation import Damaged, Generation, read_record, sealed

CURRENT, BACKUP = "CURRENT", "CURRENT.bak"
NAMES = (CURRENT, BACKUP)
TRIES = 3


@dataclass(frozen=True, slots=True)
class Pointer:
    """`generation` 0 is the factory head; `sha256` that of its seal.

    An uncommitted generation may be loaded `tries_left` more times. `sequence` grows with each
    pointer written. Those of older releases have no tries: they mean a committed generation.
    """

    generation: int
    sha256: str | None
    bundle_sha256: str | None
    tries_left: int = 0
    committed: bool = True
    sequence: int = 0


def to(found: Generation | None, bundle_sha256: str | None = None, tries: int = 0) -> Pointer:
    """A pointer to this generation (None: the factory head), uncommitted where it has `tries`."""
    if found is None:
        return Pointer(0, None, bundle_sha256)
    bundle_sha256 = found.provenance["bundle_sha256"]
    return Pointer(found.number, found.seal_sha256, bundle_sha256, tries, tries == 0)


def read(path: Path) -> Pointer:
    """Raises Damaged, or StateError if a newer release wrote it. Keys that are new are ignored."""
    record = read_record(path)
    return Pointer(**{f.name: record[f.name] for f in fields(Pointer) if f.name in record})


def readable(state: Path) -> list[Pointer]:
    """Those of CURRENT and CURRENT.bak that can be read."""
    found = []
    for name in NAMES:
        with contextlib.suppress(Damaged, StateError):
            found.append(read(state / name))
    return found


def naming(state: Path, generation: int) -> Pointer | None:
    """The pointer that puts `generation` in force; None if none does. Reads no generation."""
    return next((p for p in readable(state) if p.generation == generation), None)


def write(state: Path, name: str, pointer: Pointer) -> None:
    """Replace CURRENT or CURRENT.bak; the sequence is set here. Raises StateError."""
    sequence = 1 + max((p.sequence for p in readable(state)), default=0)
    write_atomic(state / name, sealed({**asdict(pointer), "sequence": sequence}))
