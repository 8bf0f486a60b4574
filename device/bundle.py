"""The bundle: what ships to a device, read-only there. This file is the contract between host and device.

A bundle is a folder. `manifest.json` names every other file with its SHA-256; nothing is read that it does not
name. Only numpy, safetensors and the standard library are needed to read one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgesolve.device.errors import BundleError, InputError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_REQUIRED = ("name", "input", "classes", "backends", "files", "rows", "solve", "drift")
_SHARED = {
    "head": "head.safetensors",
    "reference": "reference.safetensors",
    "parity": "parity.npz",
}
"""Of backends that name no file of their own: those whose rows are the float backbone's."""


@dataclass(frozen=True, slots=True)
class Contract:
    """What a frame must be: `shape` (h, w, c), `dtype`; scaling and normalisation happen inside the graphs."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def check(self, frames: np.ndarray, name: str = "input") -> np.ndarray:
        """`frames` as (n, h, w, c) in the contract's dtype; a single (h, w, c) frame gains its first axis.

        Raises InputError naming `name`, what was found and what was expected. Float frames must be finite.
        """
        frames = np.asarray(frames)
        if frames.shape == self.shape:
            frames = frames[None]
        if frames.shape[1:] != self.shape:
            raise InputError(
                f"{name}: frames have shape {frames.shape[1:]}, this bundle expects {self.shape} "
                "(height, width, channels). Resize or convert them first."
            )
        if frames.dtype != self.dtype:
            if frames.dtype.kind == "f" and self.dtype.kind == "f":
                frames = frames.astype(self.dtype)
            else:
                raise InputError(
                    f"{name}: frames are {frames.dtype}, this bundle expects {self.dtype}. "
                    "Convert them as the calibration data was."
                )
        if self.dtype.kind == "f" and not np.isfinite(frames).all():
            bad = np.flatnonzero(~np.isfinite(frames.reshape(len(frames), -1)).all(axis=1))
            raise InputError(
                f"{name}: item {bad[0]} holds NaN or inf ({len(bad)} of {len(frames)} items do). "
                "Remove them: one NaN spoils every statistic."
            )
        return frames


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle. Arrays and model bytes are read, and their hashes checked, when asked for."""

    path: Path
    manifest: dict[str, Any]
    sha256: str  # of manifest.json, hence of everything it names

    @property
    def contract(self) -> Contract:
        found = self.manifest["input"]
        return Contract(tuple(found["shape"]), np.dtype(found["dtype"]))

    @property
    def classes(self) -> list[str]:
        return self.manifest["classes"]

    @property
    def backends(self) -> dict[str, Any]:
        return self.manifest["backends"]

    def runtime(self, backend: str) -> str:
        """What opens the files of `backend`: "onnx" or "litert"."""
        return self.backends[backend].get("runtime", backend)

    def file(self, backend: str, kind: str) -> str:
        """Name of the "head", "reference" or "parity" file that belongs to the rows of `backend`."""
        return self.backends[backend].get(kind, _SHARED[kind])

    def own_rows(self, backend: str) -> bool:
        """Whether integer kernels make its rows: others than the teacher's, and no statistics to change."""
        return self.backends[backend].get("precision", "float32") != "float32"

    def read(self, name: str) -> bytes:
        """The bytes of the file `name`, whose hash is checked. Raises BundleError naming the file."""
        return _read_checked(self.path, name, self.manifest["files"])

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The tensors of the safetensors file `name`, hash checked."""
        from safetensors.numpy import load

        try:
            return load(self.read(name))
        except BundleError:
            raise
        except Exception as error:
            raise BundleError(f"{name}: not a readable safetensors file ({error}).") from error

    def reference(self, backend: str) -> dict[str, np.ndarray]:
        """Source moments, anchors, prototypes and the drift test's window, for the rows of `backend`."""
        names = dict.fromkeys((_SHARED["reference"], self.file(backend, "reference")))
        return {key: array for name in names for key, array in self.arrays(name).items()}

    def parity(self, backend: str | None = None) -> dict[str, np.ndarray]:
        """`frames` (n, h, w, c), `rows` (n, D), `logits` (n, c) and `teacher_logits` (n, c), as torch computed them.

        With a `backend` that has rows of its own: its rows and logits, as its kernels computed them at build.
        """
        names = [_SHARED["parity"]]
        if backend is not None and self.file(backend, "parity") not in names:
            names.append(self.file(backend, "parity"))
        return {key: array for name in names for key, array in self._archive(name).items()}

    def _archive(self, name: str) -> dict[str, np.ndarray]:
        import io

        with np.load(io.BytesIO(self.read(name)), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    def check_all(self) -> list[str]:
        """Every file's hash; returns the names checked. Raises BundleError at the first that differs."""
        for name in self.manifest["files"]:
            self.read(name)
        return list(self.manifest["files"])


def _read_checked(folder: Path, name: str, files: dict[str, Any]) -> bytes:
    entry = files.get(name)
    if entry is None:
        raise BundleError(
            f"{name}: not in this bundle's manifest, which names {', '.join(sorted(files))}."
        )
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise BundleError(f"{name}: points outside the bundle; refused.")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise BundleError(
            f"{name}: cannot be read ({error.strerror}). Copy the bundle again."
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry["sha256"]:
        raise BundleError(
            f"{name}: sha256 is {digest[:12]}…, the manifest says {entry['sha256'][:12]}…. "
            "The copy is damaged or half-written: copy the bundle again."
        )
    return data


def open_bundle(path: str | Path) -> Bundle:
    """Read and check the manifest of the bundle folder `path`. Raises BundleError with one sentence."""
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder.")
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(
            f"{folder}: {MANIFEST} cannot be read ({error.strerror}); this is not a finished bundle."
        ) from error
    try:
        manifest = json.loads(raw)
    except ValueError as error:
        raise BundleError(
            f"{MANIFEST}: not valid JSON ({error}). Copy the bundle again."
        ) from error
    found = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if found != SCHEMA_VERSION:
        raise BundleError(
            f"{MANIFEST}: schema_version is {found}, this runtime reads {SCHEMA_VERSION}. "
            "Re-export the bundle with the matching host release, or update edgesolve here."
        )
    missing = [key for key in _REQUIRED if key not in manifest]
    if missing:
        raise BundleError(f"{MANIFEST}: lacks {', '.join(missing)}. Build the bundle again.")
    return Bundle(folder, manifest, hashlib.sha256(raw).hexdigest())
