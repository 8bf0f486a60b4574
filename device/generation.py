"""One learned head on disk: a folder that is written once, sealed, and never edited."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgesolve.device import device_key
from edgesolve.device.atomic import sync_folder, write_durable
from edgesolve.device.errors import StateError

SCHEMA = 1
_HEAD, _STATISTICS, _WINDOW = "head.safetensors", "statistics.safetensors", "window.safetensors"
_PROVENANCE, _SEAL = "provenance.json", "seal.json"


class Damaged(Exception):
    """A file of the state can't be trusted; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One learned head, as read and checked.

    `parent` is the generation it was solved from (0 = factory), `seal_sha256` what a pointer to it
    must name, `window` the moments it was solved from, `sealed` whether this device's key says
    that it was written here.
    """

    number: int
    arrays: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray] | None
    provenance: dict[str, Any]
    parent: int
    seal_sha256: str
    window: dict[str, np.ndarray] | None = None
    sealed: bool = False


def packed(head, statistics, provenance, window=None) -> dict[str, bytes]:
    """The files of a generation by name; `statistics` and `window` may be None."""
    from safetensors.numpy import save

    arrays = {_HEAD: head, _STATISTICS: statistics, _WINDOW: window}
    files = {name: save(_contiguous(of)) for name, of in arrays.items() if of is not None}
    return {**files, _PROVENANCE: json.dumps(provenance, indent=1, default=plain).encode()}


def write_generation(
    folder: Path, number: int, parent: int, files: dict[str, bytes], key: bytes | None = None
) -> str:
    """Write the files of `packed` as `folder`.tmp, make them durable, rename it.

    Returns the seal's SHA-256. Raises OSError, having removed what it wrote.
    """
    record = {"schema": SCHEMA, "generation": number, "parent": parent, "files": hashes(files)}
    if key is not None:
        record["hmac"] = device_key.mark(record, key)
    seal = sealed(record)
    unfinished = folder.with_name(f"{folder.name}.tmp")
    try:
        unfinished.mkdir()
        for name, data in {**files, _SEAL: seal}.items():
            write_durable(unfinished / name, data)
        sync_folder(unfinished)
        os.rename(unfinished, folder)
        sync_folder(folder.parent)
    except OSError:
        with contextlib.suppress(OSError):
            remove(unfinished)
        raise
    return hashlib.sha256(seal).hexdigest()


def read_generation(
    folder: Path, number: int, seal_sha256: str | None = None, key: bytes | None = None
) -> Generation:
    """Read and check one generation. Raises Damaged naming the file."""
    return opened(read_files(folder, number, seal_sha256, key), key)


def read_files(
    folder: Path, number: int, seal_sha256: str | None = None, key: bytes | None = None
) -> dict[str, bytes]:
    """The checked files of a generation by name, its seal among them. Raises Damaged naming one."""
    raw = read(folder / _SEAL)
    seal = unsealed(raw, folder / _SEAL)
    digest = hashlib.sha256(raw).hexdigest()
    if seal["generation"] != number or seal_sha256 not in (None, digest):
        raise Damaged(f"{_SEAL} belongs to another generation")
    mark = seal.pop("hmac", None)
    if None not in (key, mark) and not device_key.matches(seal, mark, key):
        raise Damaged(f"{_SEAL} was not written on this device (its key differs)")
    files = {_SEAL: raw}
    for name, expected in seal["files"].items():
        files[name] = read(folder / name)
        if hashlib.sha256(files[name]).hexdigest() != expected:
            raise Damaged(f"{name} is damaged (its sha256 differs)")
    return files


def opened(files: dict[str, bytes], key: bytes | None) -> Generation:
    """The generation in what `read_files` found with the same key."""
    from safetensors.numpy import load

    seal = json.loads(files[_SEAL])
    arrays = {n: load(files[n]) for n in (_HEAD, _STATISTICS, _WINDOW) if n in files}
    return Generation(
        number=seal["generation"],
        arrays=arrays[_HEAD],
        statistics=arrays.get(_STATISTICS),
        provenance=json.loads(files[_PROVENANCE]),
        parent=seal["parent"],
        seal_sha256=hashlib.sha256(files[_SEAL]).hexdigest(),
        window=arrays.get(_WINDOW),
        sealed=key is not None and "hmac" in seal,
    )


def folders(generations: Path) -> list[tuple[int, Path]]:
    """(number, folder) of all that lie there, sorted; with a suffix if unfinished or rejected."""
    with contextlib.suppress(OSError):
        return sorted(
            (int(found[1]), folder)
            for folder in generations.iterdir()
            if (found := re.fullmatch(r"(\d{4,})(?:\.\w+)?", folder.name))
        )
    return []


def prune(generations: Path, needed: set[int], newest: int) -> None:
    """Delete what is neither needed nor among the newest, and all unfinished. Raises OSError."""
    found = folders(generations)
    finished = [number for number, folder in found if folder.suffix != ".tmp"]
    keep = {*needed, *finished[-newest:]}
    for number, folder in found:
        if number not in keep or folder.suffix == ".tmp":
            # Renamed first: a half-deleted folder must not look like a generation.
            doomed = folder.with_suffix(".tmp")
            os.rename(folder, doomed)
            remove(doomed)


def seal_in(folder: Path) -> dict[str, Any]:
    """The seal alone, unchecked against the files; empty where it can't be read."""
    with contextlib.suppress(Damaged, StateError):
        return read_record(folder / _SEAL)
    return {}


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    """SHA-256 of each file that a seal names: all but the seal."""
    return {n: hashlib.sha256(data).hexdigest() for n, data in files.items() if n != _SEAL}


def sealed(record: dict[str, Any]) -> bytes:
    """JSON of `record` with `schema`, and its own SHA-256 as `check`. Later schemas keep both."""
    record = {"schema": SCHEMA, **record}
    return json.dumps({**record, "check": _check(record)}).encode()


def unsealed(raw: bytes, path: Path) -> dict[str, Any]:
    """The record of `sealed`. Raises Damaged, or StateError if a newer release wrote it."""
    try:
        record = json.loads(raw)
        check = record.pop("check")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise Damaged(f"{path.name} is not a complete record") from error
    if check != _check(record):
        raise Damaged(f"{path.name} is damaged (its checksum differs)")
    if record["schema"] > SCHEMA:
        raise StateError(
            f"{path}: schema is {record['schema']}, this runtime reads {SCHEMA}. "
            "Update edgesolve, or give up what was learned: edgesolve factory-reset."
        )
    return record


def read_record(path: Path) -> dict[str, Any]:
    """The record of `sealed` in a file. Raises Damaged, or StateError if a newer release wrote it."""
    return unsealed(read(path), path)


def read(path: Path) -> bytes:
    """The file's bytes. Raises Damaged if the system can't give them."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read ({error.strerror})") from error


def remove(path: Path) -> None:
    """Delete a file or a whole folder; a missing one is fine. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """NumPy numbers and arrays as JSON knows them."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON: convert it before storing it.")


def _check(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _contiguous(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array, order="C") for name, array in arrays.items()}
