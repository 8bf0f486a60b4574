"""The vendor's signature: Ed25519 over the bytes of `manifest.json`, which name every file's SHA-256.

It lies beside the manifest as `manifest.sig`, JSON: schema, algorithm, key_id, signature (base64). Keys are PEM, as
openssl writes them (RFC 8410). Verifying needs PyNaCl, imported here and nowhere else on a device: 1.1 MB of wheels
for a Pi, a quarter of `cryptography`, with the library (libsodium) that wrote Ed25519's usual implementation.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from pathlib import Path

from edgesolve.device import manifest
from edgesolve.device.bundle import Bundle
from edgesolve.device.errors import BundleError, SignatureError, UsageError

NAME = "manifest.sig"
SCHEMA = 1
KEYS_VARIABLE = "EDGESOLVE_KEYS"
PUBLIC = bytes.fromhex("302a300506032b6570032100")
PRIVATE = bytes.fromhex("302e020100300506032b657004220420")
"""What precedes the 32 bytes of a key in PEM files (RFC 8410: SubjectPublicKeyInfo, PKCS #8)."""

_LARGEST = 1 << 16


def check(bundle: Bundle, trusted: list[bytes], required: bool) -> str:
    """ "valid", "unsigned", or "unchecked": signed, but there is no key, or no library, to tell.

    trusted : public keys (32 bytes each), from `trusted_keys`. Raises SignatureError where the signature is wrong,
    of none of these keys, or where `required` and it is missing or can't be checked.
    """
    try:
        raw = manifest.read_inside(bundle.path, NAME, _LARGEST)
    except FileNotFoundError as error:
        if required:
            raise SignatureError(
                f"{bundle.path}: not signed, and a signature is required. Ask the vendor for {NAME}."
            ) from error
        return "unsigned"
    except OSError as error:
        raise SignatureError(f"{NAME}: cannot be read ({error.strerror}).") from error
    except BundleError as error:
        raise SignatureError(str(error)) from error
    if not trusted:
        if required:
            raise SignatureError(
                "a signature is required, and no public key is known to check it with: "
                f"give --key or set {KEYS_VARIABLE}."
            )
        return "unchecked"
    key, signature = _of_a_known_key(raw, trusted)
    try:
        from nacl.exceptions import BadSignatureError
        from nacl.signing import VerifyKey
    except ImportError as error:
        if required:
            raise SignatureError(
                "a signature is required, and PyNaCl is not installed to check it: "
                "pip install 'edgesolve[sign]'"
            ) from error
        return "unchecked"
    try:
        VerifyKey(key).verify(signed_bytes(bundle), signature)
    except BadSignatureError as error:
        raise SignatureError(
            f"{manifest.NAME}: not what key {key_id(key)} signed. It was changed after signing: "
            "get the bundle from the vendor again."
        ) from error
    return "valid"


def trusted_keys(path: str | Path | None = None) -> list[bytes]:
    """The public keys in `path`, by default in what EDGESOLVE_KEYS names: a PEM file, or a folder of them.

    [] where neither is given. Raises UsageError where there is no key, or a private one: it must not be there.
    """
    path = path or os.environ.get(KEYS_VARIABLE)
    if not path:
        return []
    folder = Path(path)
    files = sorted(p for p in folder.iterdir() if p.is_file()) if folder.is_dir() else [folder]
    try:
        keys = [key for file in files for key in pem_keys(file.read_bytes(), "PUBLIC", str(file))]
    except OSError as error:
        raise UsageError(f"{error.filename}: no readable public key ({error.strerror}).") from error
    if not keys:
        raise UsageError(
            f"{path}: holds no public key (PEM, Ed25519). `edgesolve keygen` makes one."
        )
    return keys


def key_id(key: bytes) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a public key: a hint which key signed, no more."""
    return hashlib.sha256(key).hexdigest()[:16]


def signed_bytes(bundle: Bundle) -> bytes:
    """The manifest's bytes, those that were opened. Raises SignatureError if they changed meanwhile."""
    try:
        raw = manifest.read_inside(bundle.path, manifest.NAME, manifest.LARGEST)
    except (OSError, BundleError):
        raw = b""
    if hashlib.sha256(raw).hexdigest() != bundle.sha256:
        raise SignatureError(f"{manifest.NAME}: changed since it was opened. Start again.")
    return raw


def pem_keys(data: bytes, kind: str, name: str) -> list[bytes]:
    """The 32 bytes of every "PUBLIC" or "PRIVATE" key among the PEM blocks of a file; other blocks are skipped.

    Raises UsageError where such a block is no Ed25519 key, and where a private key lies among public ones.
    """
    start, keys = PUBLIC if kind == "PUBLIC" else PRIVATE, []
    for label, body in re.findall(rb"-----BEGIN ([A-Z ]+)-----([^-]*)-----END \1-----", data):
        if kind == "PUBLIC" and label.endswith(b"PRIVATE KEY"):
            raise UsageError(
                f"{name}: is a private key. Keep it away from devices, give its public key instead."
            )
        if label != f"{kind} KEY".encode():
            continue
        try:
            der = base64.b64decode(b"".join(body.split()), validate=True)
        except binascii.Error:
            der = b""
        if not der.startswith(start) or len(der) != len(start) + 32:
            raise UsageError(f"{name}: is no Ed25519 key.")
        keys.append(der[len(start) :])
    return keys


def _of_a_known_key(raw: bytes, trusted: list[bytes]) -> tuple[bytes, bytes]:
    """(public key, signature) of what `manifest.sig` holds. Raises SignatureError."""
    try:
        record = json.loads(raw)
        schema, algorithm, named = (record[k] for k in ("schema", "algorithm", "key_id"))
        signature = base64.b64decode(record["signature"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SignatureError(f"{NAME}: is no signature. Copy the bundle again.") from error
    if schema != SCHEMA or algorithm != "ed25519" or len(signature) != 64:
        raise SignatureError(
            f"{NAME}: a kind of signature that this runtime doesn't know; it reads schema {SCHEMA}, "
            "ed25519. Update edgesolve here."
        )
    for key in trusted:
        if key_id(key) == named:
            return key, signature
    known = ", ".join(key_id(key) for key in trusted)
    raise SignatureError(f"{NAME}: signed by key {str(named)[:16]!a}, trusted here: {known}.")
