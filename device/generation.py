"""One learned head on disk: a folder that is written once, sealed, and never edited."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgesolve.device.atomic import sync_folder, write_durable
from edgesolve.device.errors import StateError

SCHEMA = 1
_HEAD, _STATISTICS, _PROVENANCE = "head.safetensors", "statistics.safetensors", "provenance.json"
_SEAL = "seal.json"


class Damaged(Exception):
    """A file of the state can't be trusted; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One learned head, as read and checked.

    `parent` is the generation it was solved from (0 = factory), `seal_sha256` what a pointer to it
    must name.
    """

    number: int
    arrays: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray] | None
    provenance: dict[str, Any]
    parent: int
    seal_sha256: str


def write_generation(folder: Path, number: int, parent: int, head, statistics, provenance) -> str:
    """Write everything as `folder`.tmp, make it durable, rename it; returns the seal's SHA-256.

    Raises OSError, having removed what it wrote.
    """
    from safetensors.numpy import save

    files = {
        _HEAD: save(_contiguous(head)),
        _PROVENANCE: json.dumps(provenance, indent=1, default=plain).encode(),
    }
    if statistics is not None:
        files[_STATISTICS] = save(_contiguous(statistics))
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    seal = sealed({"generation": number, "parent": parent, "files": hashes})
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


def read_generation(folder: Path, number: int, seal_sha256: str | None = None) -> Generation:
    """Read and check one generation. Raises Damaged naming the file."""
    from safetensors.numpy import load

    raw = read(folder / _SEAL)
    digest = hashlib.sha256(raw).hexdigest()
    seal = unsealed(raw, folder / _SEAL)
    if seal["generation"] != number or seal_sha256 not in (None, digest):
        raise Damaged(f"{_SEAL} belongs to another generation")
    files = {}
    for name, expected in seal["files"].items():
        files[name] = read(folder / name)
        if hashlib.sha256(files[name]).hexdigest() != expected:
            raise Damaged(f"{name} is damaged (its sha256 differs)")
    return Generation(
        number=number,
        arrays=load(files[_HEAD]),
        statistics=load(files[_STATISTICS]) if _STATISTICS in files else None,
        provenance=json.loads(files[_PROVENANCE]),
        parent=seal["parent"],
        seal_sha256=digest,
    )


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
