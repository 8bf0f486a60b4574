"""Which head is in force: pointers and generations read and checked, with every fallback noted."""

from __future__ import annotations

from pathlib import Path

from edgesolve.device import device_key, pointer
from edgesolve.device.generation import Damaged, Generation, folders, read_generation
from edgesolve.device.pointer import Pointer

GENERATIONS = "generations"


def in_force(
    state: Path, bundle_sha256: str | None, notes: list[str]
) -> tuple[Generation | None, Pointer | None]:
    """(the generation in use or None for the factory head, the pointer that says so if any).

    Falls back from CURRENT to CURRENT.bak, to the newest intact generation before them, to the
    factory head; sentences are added to `notes`. Generations that were solved for another bundle
    are ignored. Raises StateError if a newer release wrote it. Creates nothing.
    """
    limit, told = None, len(notes)
    for name in pointer.NAMES:
        at = _pointer(state, name, notes)
        if at is None or (limit is not None and at.generation >= limit):
            continue
        if _foreign(at.generation, at.bundle_sha256, bundle_sha256, notes):
            continue
        limit = at.generation
        if limit == 0:
            return None, at
        found = _usable(state, limit, bundle_sha256, notes, at.sha256)
        if found is not None:
            return found, at
    found = newest(state, bundle_sha256, notes, below=limit)
    if len(notes) > told:
        notes.append(f"In use instead: {named(found)}.")
    return found, None


def newest(
    state: Path, bundle_sha256: str | None, notes: list[str], below: int | None = None
) -> Generation | None:
    """The newest intact generation of this bundle whose number is below that one, or None."""
    for number in reversed(numbers(state)):
        if below is None or number < below:
            found = _usable(state, number, bundle_sha256, notes)
            if found is not None:
                return found
    return None


def numbers(state: Path) -> list[int]:
    """Of the stored generations, ascending: neither unfinished nor rejected ones."""
    return [number for number, folder in folders(state / GENERATIONS) if not folder.suffix]


def folder_of(state: Path, number: int) -> Path:
    return state / GENERATIONS / f"{number:04d}"


def named(found: Generation | None) -> str:
    return f"generation {found.number}" if found else "the factory head"


def is_foreign(base: str | None, bundle_sha256: str | None) -> bool:
    """Whether `base` is another bundle than the one asked for; None is any."""
    return None not in (base, bundle_sha256) and base != bundle_sha256


def _usable(state, number, bundle_sha256, notes, seal_sha256=None) -> Generation | None:
    """The generation if it is intact and of this bundle, else None and a note."""
    key = device_key.read(state)
    try:
        found = read_generation(folder_of(state, number), number, seal_sha256, key)
    except Damaged as damage:
        notes.append(f"Generation {number} is not used: {damage}.")
        return None
    base = found.provenance["bundle_sha256"]
    return None if _foreign(number, base, bundle_sha256, notes) else found


def _foreign(number: int, base: str | None, bundle_sha256: str | None, notes: list[str]) -> bool:
    if not is_foreign(base, bundle_sha256):
        return False
    note = (
        f"vendor_update: generation {number} belongs to bundle {base[:12]}…, "
        f"this is {bundle_sha256[:12]}…."
    )
    if note not in notes:
        notes.append(note)
    return True


def _pointer(state: Path, name: str, notes: list[str]) -> Pointer | None:
    """The pointer, or None: never written, or damaged (with a note)."""
    path = state / name
    try:
        return pointer.read(path)
    except Damaged as damage:
        if path.exists() or numbers(state):
            notes.append(f"{name} is not used: {damage}.")
        return None
