"""Damaged and hostile input: whatever a bundle or a frame file holds, the answer is a result or one EdgeError.

    python benchmarks/fuzz_bundle.py --bundle BUILT/bundle          40,000 cases and more, some minutes
    python benchmarks/fuzz_bundle.py --bundle BUILT/bundle --quick  a few hundred of each, to see that it runs

BUILT is what tests/tiny_bundle.py writes. A case is one seeded change: of the manifest (fields, types, nesting,
truncation, bits), of a file with its hash fixed up, so that the readers behind the hash see it (safetensors, NumPy
archives with pickles, ONNX and TFLite in child processes, which may not die either), or of an image or array. Every
exception that is no EdgeError, every message that is not one printable sentence, every file written elsewhere than in
the case's folder and every case over a time limit is a failure: printed with its seed, which repeats it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment, say
from figures import Figure, at_least, at_most, plain, text

from edgesolve.device import signature
from edgesolve.device.bundle import Bundle, open_bundle
from edgesolve.device.drift import test as drift_test
from edgesolve.device.errors import EdgeError
from edgesolve.device.frames import load_frames
from edgesolve.device.patch import patched
from edgesolve.device.runtime import factory_head, source_statistics
from edgesolve.device.solve import source_moments

SECONDS = 10.0
MODELS = {"onnx": "backbone.onnx", "litert": "backbone.tflite"}
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "x", "\0", "\ud800", "../x", "/etc/passwd", "a\\b", "0" * 64, "x" * 100_000, "\x1b[2J", "‮"),
    *([], [None], [[]], [0] * 9, ["x"], {}, {"": None}, {"a": {"b": {}}}),
]  # fmt: skip


@dataclass
class Tally:
    """What became of the cases of one kind."""

    kind: str
    cases: int = 0
    refused: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)
    errors: Counter = field(default_factory=Counter)


class TooSlow(BaseException):
    """Raised by the alarm: no `except Exception` may swallow it."""


def run(tally: Tally, name: str, case: Callable[[], Any]) -> None:
    """One case: counted, timed, and judged."""
    tally.cases += 1
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's, about overflow: the result is what counts
            case()
    except EdgeError as error:
        tally.refused += 1
        tally.errors[type(error).__name__] += 1
        if not str(error).isprintable() or len(str(error)) > 4000:
            tally.failures.append(f"{name}: the message is no sentence: {str(error)[:200]!a}")
    except TooSlow:
        tally.failures.append(f"{name}: not done after {SECONDS:.0f} s")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        at = traceback.extract_tb(error.__traceback__)[-1]
        last = next((f for f in reversed(traceback.extract_tb(error.__traceback__))
                     if f.filename.split(os.sep)[-2] in ("device", "kernels")), at)  # fmt: skip
        where = f"{Path(last.filename).name}:{last.lineno}"
        tally.errors[f"{type(error).__name__} at {where}"] += 1
        tally.failures.append(f"{name}: {where}: {type(error).__name__}: {str(error)[:160]!a}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    tally.slowest = max(tally.slowest, time.monotonic() - began)


def read_everything(folder: Path) -> None:
    """All that a device does with a bundle before it runs a model."""
    bundle = open_bundle(folder)
    _ = bundle.contract, bundle.classes
    signature.check(bundle, [b"k" * 32], required=False)
    bundle.check_all()
    source = source_statistics(bundle)
    bundle.parity()
    for backend in bundle.backends:
        read_backend(bundle, backend, source)


def read_backend(bundle: Bundle, backend: str, source) -> None:
    reference = bundle.reference(backend)
    source_moments(reference).means()
    factory_head(bundle, backend)(reference["anchor_rows"].astype(np.float32))
    bundle.parity(backend)
    size = len(reference["window_mean"])
    drift_test(np.zeros(size), np.ones(size), 32, reference, bundle.manifest["drift"])
    entry = bundle.backends[backend]
    if entry["patch"]:
        moved = source.replaced(source.mean + 1, source.var)
        patched(bundle.read(entry["backbone"]), entry["patch"], source, moved)


# -- the changes -------------------------------------------------------------------------------


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every field, list items included."""
    found = [path]
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in inside:
        found += places(item, (*path, key))
    return found


def changed_field(rng, manifest: dict, paths: list[tuple]) -> bytes:
    """Some fields replaced, removed, renamed, doubled, or exchanged with another."""
    manifest = json.loads(json.dumps(manifest))
    for _ in range(rng.integers(1, 4)):
        path = paths[rng.integers(1, len(paths))]
        try:
            at = manifest
            for key in path[:-1]:
                at = at[key]
            _change_at(rng, at, path[-1], manifest)
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # an earlier change took it away
    return json.dumps(manifest).encode()


def _change_at(rng, at: Any, key: Any, manifest: dict) -> None:
    choice = rng.integers(0, 6)
    if choice == 0:
        del at[key]
    elif choice == 1 and isinstance(at, dict):
        at[str(ODD[rng.integers(14, 25)])] = at.pop(key)
    elif choice == 2:
        at[key] = [deepcopy(at[key]) for _ in range(rng.integers(0, 4))]
    elif choice == 3 and isinstance(at[key], (int, float)):
        at[key] = at[key] * int(rng.integers(-3, 1000)) + int(rng.integers(-2, 3))
    elif choice == 4:
        at[key] = deepcopy(list(manifest.values())[rng.integers(0, len(manifest))])
    else:
        at[key] = deepcopy(ODD[rng.integers(0, len(ODD))])


def damaged(rng, data: bytes) -> bytes:
    """Bits flipped, bytes removed, inserted, repeated, or the end cut off."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, max(len(out), 1)))
        n = int(rng.integers(1, 40))
        choice = rng.integers(0, 6)
        if choice <= 1 and out:
            out[at] ^= 1 << int(rng.integers(0, 8))
        elif choice == 2:
            del out[at : at + n]
        elif choice == 3:
            out[at:at] = rng.bytes(n)
        elif choice == 4:
            out[at:at] = out[max(0, at - n) : at]
        else:
            del out[at:]
    return bytes(out)


def nested(rng) -> bytes:
    depth = int(rng.choice([5, 31, 32, 33, 100, 900, 5000, 200_000]))
    opening, closing = ("[", "]") if rng.random() < 0.5 else ('{"a":', "}")
    inside = "0" if rng.random() < 0.7 else ""
    return (opening * depth + inside + closing * (depth if rng.random() < 0.7 else 0)).encode()


def odd_text(rng, data: bytes) -> bytes:
    """Numbers, constants and encodings that JSON's readers differ about."""
    text = data.decode()
    choice = rng.integers(0, 6)
    if choice == 0:
        return text.replace(
            "32", str(rng.choice(["NaN", "Infinity", "1e999", "9" * 5000, "-0"])), 1
        ).encode()
    if choice == 1:
        return text.encode(str(rng.choice(["utf-16", "utf-32", "utf-8-sig", "utf-16-le"])))
    if choice == 2:
        return text.replace("sha256", "\\ud800", int(rng.integers(1, 9))).encode()
    if choice == 3:
        return text.replace('"files"', '"files": {}, "files"').encode()
    if choice == 4:
        return text.encode() + rng.bytes(3)
    return nested(rng)


def safetensors_header(rng, data: bytes) -> bytes:
    """The header's JSON changed, its length kept true or not."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    choice = rng.integers(0, 3)
    if choice == 0:
        raw = changed_field(rng, header, places(header))
    elif choice == 1:
        name = list(header)[rng.integers(0, len(header))]
        dtypes = ["F64", "F16", "BF16", "F8_E4M3", "I64", "BOOL", "U8", "C64", "X", "F4"]
        header[name] = {**header[name], "dtype": str(rng.choice(dtypes))}
        raw = json.dumps(header).encode()
    else:
        raw = damaged(rng, data[8 : 8 + size])
    length = len(raw) if rng.random() < 0.8 else int(rng.integers(0, 2**63))
    return struct.pack("<Q", length) + raw + body


def changed_arrays(rng, data: bytes, name: str) -> bytes:
    """Arrays of another shape, type or content, well written."""
    arrays = _loaded(data, name)
    for _ in range(rng.integers(1, 3)):
        key = list(arrays)[rng.integers(0, len(arrays))]
        arrays[key] = _other_array(rng, arrays[key])
        if rng.random() < 0.15:
            arrays["x" * int(rng.integers(0, 40))] = arrays.pop(key)
    arrays = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
    return _saved(rng, arrays, name)


def _other_array(rng, array: np.ndarray) -> np.ndarray:
    choice = rng.integers(0, 9)
    if choice == 0:
        return array.ravel()
    if choice == 1:
        return array[:0]
    if choice == 2:
        return array[1:]
    if choice == 3:
        return array.T
    if choice == 4:
        return array.astype(str(rng.choice(["f2", "f8", "i8", "u1", "i2"])))
    if choice == 5 and array.dtype.kind == "f":
        return np.where(
            rng.random(array.shape) < 0.1, rng.choice([np.nan, np.inf, -1.0]), array
        ).astype(array.dtype)
    if choice == 6:
        return np.zeros_like(array)
    if choice == 7:
        return -array if array.dtype.kind == "f" else ~array
    return array[..., None]


def _loaded(data: bytes, name: str) -> dict[str, np.ndarray]:
    if name.endswith(".npz"):
        with np.load(io.BytesIO(data)) as archive:
            return dict(archive)
    from safetensors.numpy import load

    return load(data)


def _saved(rng, arrays: dict[str, np.ndarray], name: str) -> bytes:
    if not name.endswith(".npz"):
        from safetensors.numpy import save

        return save(arrays)
    out = io.BytesIO()
    (np.savez_compressed if rng.random() < 0.2 else np.savez)(out, **arrays)
    return out.getvalue()


class Planted:
    """Unpickling this writes a file: the proof that a pickle was opened."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def archive(rng, data: bytes, trap: Path) -> bytes:
    """A ZIP whose parts are pickles, lies about their sizes, odd headers, names with ways up, or no arrays."""
    arrays = _loaded(data, ".npz")
    out = io.BytesIO()
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(out, "w", int(rng.choice([0, 8, 12, 14]))) as made,
    ):
        warnings.simplefilter("ignore")  # names twice
        for key, array in arrays.items():
            part = io.BytesIO()
            np.save(part, array)
            raw = part.getvalue()
            if rng.random() < 0.3:
                raw = odd_npy(rng, raw, trap)
            made.writestr(f"{rng.choice(['', '', '../', '/', 'a/'])}{key}.npy", raw)
    raw = bytearray(out.getvalue())
    return damaged(rng, bytes(raw)) if rng.random() < 0.3 else bytes(raw)


def odd_npy(rng, raw: bytes, trap: Path) -> bytes:
    choice = rng.integers(0, 5)
    if choice == 0:
        return pickle.dumps(Planted(str(trap)))
    if choice == 1:
        return npy_header(rng, pickle.dumps(Planted(str(trap))), "|O", "(1,)")
    if choice == 2:
        shape = str(
            rng.choice(
                ["(1099511627776,)", "(-1,)", "(2147483648, 2147483648, 4)", "()", "(0,)", "3", "x"]
            )
        )
        return npy_header(
            rng,
            raw[128:],
            str(rng.choice(["<f4", "|u1", "<M8[s]", "|V9", "<U3", "<c16", "x"])),
            shape,
        )
    if choice == 3:
        return raw[:6] + rng.bytes(2) + raw[8:]
    return damaged(rng, raw)


def npy_header(rng, body: bytes, dtype: str, shape: str) -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': {rng.choice(['True', 'False', 'x'])}, 'shape': {shape}, }}"
    if rng.random() < 0.1:
        header = "[" * 3000 if rng.random() < 0.5 else header + "\0" + "(" * 500
    raw = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + body


# -- the kinds of cases ------------------------------------------------------------------------


class Case:
    """A bundle folder whose files are links to the original until one is changed."""

    def __init__(self, bundle: Path, work: Path):
        self.folder = work / "case"
        self.folder.mkdir()
        self.original = {p.name: p.read_bytes() for p in bundle.iterdir() if p.is_file()}
        self.manifest = json.loads(self.original["manifest.json"])
        self.paths = places(
            {k: v for k, v in self.manifest.items() if k not in ("provenance", "licences")}
        )
        for name, data in self.original.items():
            (self.folder / name).write_bytes(data)

    def put_manifest(self, raw: bytes) -> None:
        (self.folder / "manifest.json").write_bytes(raw)

    def put_file(self, name: str, data: bytes) -> None:
        """With a manifest that names its hash: only the readers behind it can refuse."""
        (self.folder / name).write_bytes(data)
        files = {**self.manifest["files"]}
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        self.put_manifest(json.dumps({**self.manifest, "files": files}).encode())

    def restore(self, name: str) -> None:
        for each in (name, "manifest.json"):
            (self.folder / each).write_bytes(self.original[each])


def manifests(case: Case, n: int, seed: int) -> Tally:
    """Fields, types and nesting; what is accepted must be readable to the end."""
    tally = Tally("manifest: fields and types")
    for i in range(n):
        rng = np.random.default_rng([seed, 1, i])
        case.put_manifest(changed_field(rng, case.manifest, case.paths))
        run(tally, f"manifest {i}", lambda: read_everything(case.folder))
    case.restore("manifest.json")
    return tally


def manifest_bytes(case: Case, n: int, seed: int) -> Tally:
    tally, raw = Tally("manifest: bytes, encodings, nesting"), case.original["manifest.json"]
    for i in range(n):
        rng = np.random.default_rng([seed, 2, i])
        case.put_manifest(damaged(rng, raw) if rng.random() < 0.6 else odd_text(rng, raw))
        run(tally, f"manifest bytes {i}", lambda: read_everything(case.folder))
    case.restore("manifest.json")
    return tally


def signatures(case: Case, n: int, seed: int) -> Tally:
    tally = Tally("manifest.sig")
    good = {
        "schema": 1,
        "algorithm": "ed25519",
        "key_id": signature.key_id(b"k" * 32),
        "signature": "A" * 86 + "==",
    }
    for i in range(n):
        rng = np.random.default_rng([seed, 3, i])
        raw = (
            changed_field(rng, good, places(good))
            if rng.random() < 0.5
            else damaged(rng, json.dumps(good).encode())
        )
        (case.folder / signature.NAME).write_bytes(nested(rng) if rng.random() < 0.1 else raw)
        bundle = open_bundle(case.folder)
        run(
            tally,
            f"signature {i}",
            lambda bundle=bundle: signature.check(bundle, [b"k" * 32], False),
        )
    (case.folder / signature.NAME).unlink(missing_ok=True)
    return tally


def arrays(case: Case, n: int, seed: int, trap: Path) -> Tally:
    """safetensors and NumPy archives, their hashes fixed up."""
    tally = Tally("arrays behind a right hash")
    names = [name for name in case.original if name.endswith((".safetensors", ".npz"))]
    for i in range(n):
        rng = np.random.default_rng([seed, 4, i])
        name = names[rng.integers(0, len(names))]
        data, choice = case.original[name], rng.random()
        if choice < 0.35:
            data = changed_arrays(rng, data, name)
        elif choice < 0.7:
            data = (
                archive(rng, data, trap) if name.endswith(".npz") else safetensors_header(rng, data)
            )
        else:
            data = damaged(rng, data)
        case.put_file(name, data)
        run(tally, f"{name} {i}", lambda: read_everything(case.folder))
        case.restore(name)
    return tally


def folders(case: Case, n: int, seed: int) -> Tally:
    """Files that are folders, pipes, links elsewhere, loops, huge, empty, missing, unreadable."""
    tally, names = Tally("what lies in the folder"), list(case.original)
    for i in range(n):
        rng = np.random.default_rng([seed, 5, i])
        path = case.folder / names[rng.integers(0, len(names))]
        path.unlink()
        choice = int(rng.integers(0, 8))
        if choice == 0:
            path.mkdir()
        elif choice == 1:
            os.mkfifo(path)
        elif choice in (2, 3, 4):
            path.symlink_to([path.name, "/dev/zero", "/etc/passwd"][choice - 2])
        elif choice == 5:
            path.write_bytes(case.original[path.name])
            os.truncate(path, int(rng.integers(1, 1 << 42)))
        elif choice == 6:
            path.write_bytes(b"")
        run(tally, f"{path.name} as {choice} {i}", lambda: read_everything(case.folder))
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(case.original[path.name])
    return tally


def images(work: Path, n: int, seed: int) -> Tally:
    """Image files of every kind that `frames` names, damaged; Pillow decodes them."""
    from PIL import Image

    tally, folder = Tally("images"), work / "images"
    folder.mkdir()
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 20, 3)).astype(np.uint8)
    good = {}
    for suffix in (".png", ".jpg", ".bmp", ".webp", ".ppm", ".pgm"):
        out = io.BytesIO()
        image = Image.fromarray(pixels).convert("L" if suffix == ".pgm" else "RGB")
        image.save(out, {".jpg": "JPEG", ".pgm": "PPM"}.get(suffix, suffix[1:].upper()))
        good[suffix] = out.getvalue()
    for i in range(n):
        rng = np.random.default_rng([seed, 6, i])
        suffix = str(rng.choice(list(good)))
        data = good[str(rng.choice(list(good)))] if rng.random() < 0.1 else good[suffix]
        path = folder / f"x{suffix}"
        path.write_bytes(huge(rng, data) if rng.random() < 0.15 else damaged(rng, data))
        target = path if rng.random() < 0.8 else folder
        channels = int(rng.choice([1, 3]))
        run(
            tally,
            f"image {suffix} {i}",
            lambda t=target, c=channels: load_frames(t, size=(16, 16), channels=c),
        )
        path.unlink()
    return tally


def huge(rng, data: bytes) -> bytes:
    """A header that says billions of pixels."""
    side = int(rng.choice([0, 1, 30_000, 70_000, 2**31 - 1]))
    if data.startswith(b"\x89PNG"):
        import zlib

        header = b"IHDR" + struct.pack(">II", side, side) + data[24:29]
        return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
    if data.startswith(b"BM"):
        return data[:18] + struct.pack("<ii", side, side) + data[26:]
    if data[:1] == b"P":
        return data[:3] + f"{side} {side}\n255\n".encode() + data[-30:]
    return damaged(rng, data)


def array_files(work: Path, n: int, seed: int, trap: Path) -> Tally:
    """`.npy` and `.npz` as a user names them."""
    tally, folder = Tally(".npy and .npz of frames"), work / "arrays"
    folder.mkdir()
    x = np.random.default_rng(seed).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    npy, npz = io.BytesIO(), io.BytesIO()
    np.save(npy, x)
    np.savez(npz, x=x, y=np.arange(5))
    for i in range(n):
        rng = np.random.default_rng([seed, 7, i])
        if rng.random() < 0.5:
            path = folder / "x.npy"
            data = odd_npy(rng, npy.getvalue(), trap)
        else:
            path = folder / "x.npz"
            data = archive(rng, npz.getvalue(), trap)
            if rng.random() < 0.3:
                data = changed_arrays(rng, npz.getvalue(), "x.npz")
        path.write_bytes(data)
        run(tally, f"{path.name} {i}", lambda p=path: np.asarray(load_frames(p).frames))
        path.unlink()
    return tally


CHILD = """
import sys
from pathlib import Path
from edgesolve.device.errors import EdgeError
from edgesolve.device.graph import open_graph
for path in sys.argv[2:]:
    print(path, flush=True)
    try:
        open_graph(Path(path).read_bytes(), backend=sys.argv[1])
    except EdgeError as error:
        print("  refused" if str(error).isprintable() else "  unprintable", flush=True)
    except BaseException as error:
        print("  " + type(error).__name__, str(error)[:100].replace("\\n", " "), flush=True)
    else:
        print("  opened", flush=True)
"""


def models(case: Case, work: Path, n: int, seed: int) -> Tally:
    """ONNX and TFLite, opened in child processes: a crash there is the runtime's, and counted apart."""
    tally, folder = Tally("ONNX and TFLite bytes"), work / "models"
    for backend, name in MODELS.items():
        folder.mkdir()
        paths = []
        for i in range(n // len(MODELS)):
            rng = np.random.default_rng([seed, 8, i])
            path = folder / f"{i}{Path(name).suffix}"
            path.write_bytes(damaged(rng, case.original[name]))
            paths.append(str(path))
        while paths:
            done = subprocess.run(
                [sys.executable, "-c", CHILD, backend, *paths], capture_output=True, text=True
            )
            lines = done.stdout.splitlines()
            tried = [line for line in lines if not line.startswith("  ")]
            answers = [line.strip() for line in lines if line.startswith("  ")]
            tally.cases += len(tried)
            tally.refused += answers.count("refused")
            tally.errors.update(answer.split()[0] for answer in answers)
            tally.failures += [
                f"{backend}: {a}" for a in answers if a.split()[0] not in ("refused", "opened")
            ]
            if done.returncode and tried:
                tally.errors[f"{backend} killed its process ({done.returncode})"] += 1
            if not tried:
                tally.failures.append(f"{backend}: the child did nothing: {done.stderr[-200:]!a}")
                break
            paths = paths[len(tried) :]
        shutil.rmtree(folder)
    return tally


# -- the benchmark -----------------------------------------------------------------------------


class Watch:
    """Every file that this process opens to write, renames or makes outside `root`, whatever opens it."""

    EVENTS = ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink")

    def __init__(self, root: Path):
        self.root, self.found, self.on = f"{root}{os.sep}", set(), True
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if not writes or not isinstance(path, (str, bytes, os.PathLike)):
                return
        elif event in self.EVENTS and arguments[-1] != -1 and isinstance(arguments[-1], int):
            return  # relative to an opened folder: `rmtree` of our own
        elif event in self.EVENTS:
            path = arguments[event in ("os.rename", "os.link", "os.symlink")]
        else:
            return
        if isinstance(path, int) or os.fspath(path) == os.devnull:
            return
        real = os.path.abspath(os.fsdecode(path))
        if not real.startswith(self.root):
            self.found.add(f"{event} {real}")


def main() -> None:
    args = _arguments()
    signal.signal(signal.SIGALRM, _too_slow)
    root = Path(tempfile.mkdtemp(prefix="edgesolve-fuzz-"))
    work, trap = root / "work", root / "opened-a-pickle"
    work.mkdir()
    watch, tallies = Watch(root), []
    tempfile.tempdir = str(work)
    try:
        case = Case(args.bundle, work)
        read_everything(case.folder)  # else nothing below means anything
        n = 200 if args.quick else args.cases
        kinds = [
            lambda: manifests(case, n * 5 // 2, args.seed),
            lambda: manifest_bytes(case, n, args.seed),
            lambda: signatures(case, n, args.seed),
            lambda: arrays(case, n, args.seed, trap),
            lambda: folders(case, n // 4, args.seed),
            lambda: images(work, n * 3, args.seed),
            lambda: array_files(work, n * 3, args.seed, trap),
            lambda: models(case, work, 40 if args.quick else args.models, args.seed),
        ]
        for kind in kinds:
            began = time.monotonic()
            tallies.append(kind())
            last = tallies[-1]
            say(
                f"{last.kind}: {last.cases} cases, {len(last.failures)} failures, {time.monotonic() - began:.0f} s"
            )
        watch.on = False
        written = sorted(watch.found | {p.name for p in root.iterdir() if p != work})
    finally:
        shutil.rmtree(root)
    figures = _figures(tallies, written)
    print(text(figures))
    print("".join(f"\nwritten: {name}" for name in written[:20]))
    for tally in tallies:
        print(f"\n{tally.kind}: {dict(tally.errors.most_common(12))}")
        for failure in tally.failures[:20]:
            print(f"  {failure}")
    if args.json:
        rows = [vars(tally) for tally in tallies]
        result = {"environment": environment(1), "seed": args.seed, "tallies": rows}
        args.json.write_text(
            json.dumps({**result, "figures": [vars_of(f) for f in figures]}, indent=1)
        )
    sys.exit(1 if any(f.met is False for f in figures) else 0)


def vars_of(figure: Figure) -> dict[str, Any]:
    return {name: getattr(figure, name) for name in ("what", "measured", "bar", "met", "value")}


def _figures(tallies: list[Tally], written: list[str]) -> list[Figure]:
    figures = [
        plain(
            tally.kind,
            tally.cases,
            measured=f"{tally.cases:,} cases",
            baseline=f"{tally.refused} refused, slowest {tally.slowest:.2f} s",
        )
        for tally in tallies
    ]
    total, failures = sum(t.cases for t in tallies), sum(len(t.failures) for t in tallies)
    figures.append(at_least("cases", total, 40_000, "", measured=f"{total:,}"))
    figures.append(
        at_most("exceptions that are no EdgeError, or no sentence, or too slow", failures, 0, "")
    )
    figures.append(at_most("files written elsewhere", len(written), 0, ""))
    return figures


def _too_slow(number, frame) -> None:
    raise TooSlow


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument(
        "--cases", type=int, default=3600, help="per kind; kinds that matter more get more"
    )
    parser.add_argument(
        "--models", type=int, default=600, help="ONNX and TFLite files, in child processes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write everything here")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
