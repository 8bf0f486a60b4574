"""The device's own key: what marks a head as solved here, where no vendor's signature can reach.

STATE/key holds 32 random bytes and their SHA-256, for its owner only: a damaged key must not disown
what it sealed. A generation of another device fails the check; whoever may write the state folder
could also take the mark away, and then it shows as not sealed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from pathlib import Path
from typing import Any

from edgesolve.device.atomic import write_atomic

NAME = "key"
LENGTH = 32


def read(state: Path) -> bytes | None:
    """The key of the state folder; None where there is none that can be read."""
    try:
        raw = (state / NAME).read_bytes()
    except OSError:
        return None
    key, check = raw[:LENGTH], raw[LENGTH:]
    return key if hashlib.sha256(key).digest() == check else None


def create(state: Path) -> bytes:
    """A new key, durable and readable by its owner only. Raises StateError."""
    key = os.urandom(LENGTH)
    write_atomic(state / NAME, key + hashlib.sha256(key).digest(), mode=0o600)
    return key


def mark(record: dict[str, Any], key: bytes) -> str:
    """HMAC-SHA256 of the record's JSON with sorted keys, hexadecimal."""
    return hmac.new(key, json.dumps(record, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def matches(record: dict[str, Any], found: str, key: bytes) -> bool:
    """Whether `found` is the mark of the record, compared in constant time."""
    return hmac.compare_digest(mark(record, key).encode(), str(found).encode())
