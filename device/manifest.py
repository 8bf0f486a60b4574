"""`manifest.json`, checked from the first to the last field that a device reads, and files read within limits.

A manifest is input from outside: whatever it holds, the answer is a checked dictionary or one BundleError.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgesolve.device.errors import BundleError

NAME = "manifest.json"
SCHEMA_VERSION = 1
LARGEST = 8 << 20
DEEPEST = 32
SHARED = ("head.safetensors", "reference.safetensors", "parity.npz", "statistics.safetensors")
"""Files that every bundle has."""

_REQUIRED = ("name", "input", "classes", "backends", "files", "rows", "solve", "drift", "split")
_RUNTIMES = ("onnx", "litert")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that steer a terminal, turn the direction of text, or can't be written as UTF-8."""

Rule = tuple[str, Any, Callable[[Any], bool], str]
"""(field, its value, what it must satisfy, what that is called)."""


def parse(raw: bytes) -> dict[str, Any]:
    """The manifest, every field that is read later of the right type and size. Raises BundleError."""
    try:
        manifest = json.loads(raw, parse_constant=_no_number)
        too_deep = _is_deep(manifest)
    except ValueError as error:
        raise BundleError(f"{NAME}: not valid JSON ({error}). Copy the bundle again.") from error
    except RecursionError as error:
        raise _deep() from error
    if too_deep:
        raise _deep()
    found = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if found != SCHEMA_VERSION or isinstance(found, bool):
        raise BundleError(
            f"{NAME}: schema_version is {_shown(found)}, this runtime reads {SCHEMA_VERSION}. "
            "Re-export the bundle with the matching host release, or update edgesolve here."
        )
    missing = [key for key in _REQUIRED if key not in manifest]
    if missing:
        raise BundleError(f"{NAME}: lacks {', '.join(missing)}. Build the bundle again.")
    for field, value, holds, expected in _rules(manifest):
        if not holds(value):
            raise BundleError(
                f"{NAME}: {field} is {_shown(value)}, expected {expected}. Build the bundle again."
            )
    return manifest


def check_name(name: str) -> None:
    """Raises BundleError unless `name` is a file inside the bundle: relative, no way up, no odd character."""
    if not isinstance(name, str) or not 0 < len(name) < 256 or not name.isprintable():
        raise BundleError(f"{_shown(name)}: no name that a file of a bundle can have; refused.")
    if "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise BundleError(f"{name}: points outside the bundle; refused.")


def read_inside(folder: Path, name: str, limit: int) -> bytes:
    """The bytes of the regular file `name` under `folder`, links followed if they stay in there.

    Never reads more than `limit` + 1 bytes, nor waits for a pipe. Raises BundleError, or OSError where the
    system can't read it.
    """
    check_name(name)
    top, real = os.path.realpath(folder), os.path.realpath(folder / name)
    if os.path.commonpath((top, real)) != top:
        raise BundleError(f"{name}: points outside the bundle; refused.")
    descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise BundleError(f"{name}: is no regular file; refused.")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(min(limit, found.st_size) + 1)
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise BundleError(
            f"{name}: is larger than the {limit} bytes that it may have. Copy the bundle again."
        )
    return data


def line(error: Exception) -> str:
    """What another library says, short and printable: it may quote what it was given."""
    return "".join(c if c.isprintable() else " " for c in str(error)[:200])


def _rules(m: dict[str, Any]) -> Iterator[Rule]:
    """In an order in which each rule may rely on those before it."""
    yield from _files(m)
    yield "name", m["name"], _is_text, "a text"
    yield "split", m["split"], _is_text, "a text"
    yield "input", m["input"], _is_dict, "an object"
    yield (
        "input.shape",
        m["input"].get("shape"),
        _is_frame,
        "three counts (height, width, channels)",
    )
    yield "input.dtype", m["input"].get("dtype"), _is_dtype, "uint8, float32, or alike"
    yield "classes", m["classes"], _is_list_of(_is_text), "a list of texts"
    yield "rows", m["rows"], _is_dict, "an object"
    yield "rows.length", m["rows"].get("length"), _is_count(1, 1 << 20), "a count"
    yield "rows.basis_sha256", m["rows"].get("basis_sha256"), _is_text, "a text"
    yield "solve", m["solve"], _is_dict, "an object"
    yield "solve.penalty", m["solve"].get("penalty"), _is_one_of("ridge", "group"), "ridge or group"
    for key in ("lam", "ridge"):
        yield f"solve.{key}", m["solve"].get(key), _is_positive, "a number, not negative"
    yield "adapt", m.get("adapt", {}), _is_dict, "an object"
    yield from _drift(m["drift"])
    yield "backends", m["backends"], _is_dict, "an object"
    yield "backends", m["backends"], bool, "at least one"
    for name, entry in m["backends"].items():
        yield from _backend(name, entry, m["files"])
    known = _is_list_of(_is_one_of(*m["backends"]))
    yield "prefer", m.get("prefer", list(m["backends"])), known, "a list of backends"


def _files(m: dict[str, Any]) -> Iterator[Rule]:
    yield "files", m["files"], _is_dict, "an object"
    for name, entry in m["files"].items():
        check_name(name)
        yield f"files.{name}", entry, _is_dict, "an object"
        yield f"files.{name}.sha256", entry.get("sha256"), _is_sha256, "64 hexadecimal digits"
        yield f"files.{name}.bytes", entry.get("bytes"), _is_count(0, 1 << 40), "a count of bytes"
    missing = [name for name in SHARED if name not in m["files"]]
    yield "files", ", ".join(m["files"]), lambda _: not missing, f"{', '.join(missing)} among them"


def _drift(drift: Any) -> Iterator[Rule]:
    yield "drift", drift, _is_dict, "an object"
    sizes = drift.get("sizes")
    yield "drift.sizes", sizes, _is_list_of(_is_count(1, 1 << 31)), "a list of counts"
    yield "drift.sizes", sizes, lambda s: s == sorted(set(s)), "growing counts"
    for key in ("null", "content"):
        values = drift.get(key)
        yield f"drift.{key}", values, _is_list_of(_is_positive), "a list of numbers"
        yield f"drift.{key}", values, lambda v: len(v) == len(sizes), "a value for each size"
    windows = drift.get("windows_per_false_alarm")
    yield "drift.windows_per_false_alarm", windows, _is_count(1, 1 << 31), "a count"


def _backend(name: str, entry: Any, files: dict[str, Any]) -> Iterator[Rule]:
    at = f"backends.{name}"
    yield "backends", name, _is_text, "a text"
    yield at, entry, _is_dict, "an object"
    yield f"{at}.runtime", entry.get("runtime", name), _is_one_of(*_RUNTIMES), "onnx or litert"
    yield f"{at}.precision", entry.get("precision", "float32"), _is_text, "a text"
    yield f"{at}.ridge", entry.get("ridge", 0.0), _is_positive, "a number, not negative"
    named = _is_one_of(*files)
    for kind in ("backbone", "teacher"):
        yield f"{at}.{kind}", entry.get(kind), named, "a file of this bundle"
    for kind in ("head", "reference", "parity"):
        yield f"{at}.{kind}", entry.get(kind, SHARED[0]), named, "a file of this bundle"
    yield f"{at}.batch", entry.get("batch", 1) or 1, _is_count(1, 1 << 16), "a count or null"
    yield f"{at}.teacher_batch", entry.get("teacher_batch"), _is_count(1, 1 << 16), "a count"
    yield f"{at}.patch", entry.get("patch"), _is_list_of(_is_dict, 0), "a list of objects"
    size = files[entry["backbone"]]["bytes"]
    for place in entry["patch"]:
        fits = _is_patch_of(size)
        yield f"{at}.patch", place, fits, f"channels, and weight and bias within {size} bytes"


def _is_patch_of(size: int) -> Callable[[Any], bool]:
    """What `patch.patched` relies on: a layer's channels, and float32 blocks that lie in the file."""

    def holds(entry: dict[str, Any]) -> bool:
        channels, weight, bias = (entry.get(key) for key in ("channels", "weight", "bias"))
        if not (_is_list_of(_is_count(0, 1 << 24))(channels) and len(channels) == 2):
            return False
        n = channels[1] - channels[0]
        if n < 1 or not (_is_dict(weight) and _is_dict(bias)):
            return False
        shape, axis = weight.get("shape"), weight.get("axis")
        if not (_is_list_of(_is_count(1, 1 << 24))(shape) and len(shape) <= 8):
            return False
        if not _is_count(0, len(shape) - 1)(axis) or shape[axis] != n:
            return False
        floats = 1
        for length in shape:
            floats *= length
        blocks = ((weight.get("offset"), floats), (bias.get("offset"), n))
        return all(_is_count(0, size)(at) and at + 4 * count <= size for at, count in blocks)

    return holds


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 4096 and not _CONTROL.search(value)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("u?int(8|16|32|64)|float(16|32|64)", value))


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))


def _is_positive(value: Any) -> bool:
    """A number, zero included; what is too large to compute with is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e30


def _is_frame(value: Any) -> bool:
    return _is_list_of(_is_count(1, 1 << 16))(value) and len(value) == 3


def _is_count(least: int, most: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most


def _is_one_of(*values: str) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, str) and v in values


def _is_list_of(holds: Callable[[Any], bool], least: int = 1) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, list) and len(v) >= least and all(map(holds, v))


def _is_deep(value: Any) -> bool:
    """Whether objects and lists lie in each other more than DEEPEST deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEEPEST):
        inside = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in inside for v in values if isinstance(v, (dict, list))]
    return bool(level)


def _deep() -> BundleError:
    return BundleError(f"{NAME}: nested more than {DEEPEST} deep; refused.")


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number in JSON")


def _shown(value: Any) -> str:
    """Short, on one line, and printable on any terminal."""
    text = ascii(value) if not isinstance(value, (dict, list)) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}…"
