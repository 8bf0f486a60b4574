"""The vendor's side of signing: a key pair, and the signature of a finished bundle. Needs `edgesolve[sign]`."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

from edgesolve.device.atomic import write_atomic
from edgesolve.device.bundle import open_bundle
from edgesolve.device.errors import BackendError, StateError, UsageError
from edgesolve.device.signature import NAME, PRIVATE, PUBLIC, SCHEMA, key_id, pem_keys, signed_bytes


def keygen(private_path: str | Path, public_path: str | Path) -> str:
    """Write a new key pair as PEM and return its key id; the private file is readable by its owner only.

    Raises UsageError where either exists already: a key that signed something must not be lost.
    """
    key = _nacl().SigningKey.generate()
    public = key.verify_key.encode()
    made = []
    try:
        for path, kind, der, mode in (
            (Path(private_path), "PRIVATE", PRIVATE + key.encode(), 0o600),
            (Path(public_path), "PUBLIC", PUBLIC + public, 0o644),
        ):
            _write_new(path, _pem(kind, der), mode)
            made.append(path)
    except FileExistsError as error:
        _remove(made)
        raise UsageError(f"{error.filename}: exists, and a key is never overwritten.") from error
    except OSError as error:
        _remove(made)
        raise StateError(
            f"{error.filename or private_path}: cannot be written ({error.strerror})."
        ) from error
    return key_id(public)


def sign(bundle_folder: str | Path, private_key_path: str | Path) -> dict:
    """Sign the manifest's bytes into `manifest.sig` (atomic; replaces an older one); returns what it holds.

    Every file's hash is checked first: nothing damaged gets a signature. Raises BundleError, UsageError, StateError.
    """
    bundle = open_bundle(bundle_folder)
    bundle.check_all()
    key = _private_key(Path(private_key_path))
    record = {
        "schema": SCHEMA,
        "algorithm": "ed25519",
        "key_id": key_id(key.verify_key.encode()),
        "signature": base64.b64encode(key.sign(signed_bytes(bundle)).signature).decode(),
    }
    write_atomic(bundle.path / NAME, json.dumps(record, indent=1).encode() + b"\n")
    return record


def _private_key(path: Path):
    try:
        keys = pem_keys(path.read_bytes(), "PRIVATE", str(path))
    except OSError as error:
        raise UsageError(f"{path}: no readable private key ({error.strerror}).") from error
    if len(keys) != 1:
        raise UsageError(f"{path}: holds {len(keys)} private keys (PEM, Ed25519), expected one.")
    return _nacl().SigningKey(keys[0])


def _pem(kind: str, der: bytes) -> bytes:
    body = base64.b64encode(der).decode()
    return f"-----BEGIN {kind} KEY-----\n{body}\n-----END {kind} KEY-----\n".encode()


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Durable, and never over another file; nobody else can read it at any moment. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # whatever the umask
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _nacl():
    try:
        from nacl import signing
    except ImportError as error:
        raise BackendError("signing needs PyNaCl: pip install 'edgesolve[sign]'") from error
    return signing
