"""The bundle: what ships to a device, read-only there. This file is the contract between host and device.

A bundle is a folder. `manifest.json` names every other file with its SHA-256; nothing is read that it does not
name. Only numpy, safetensors and the standard library are needed to read one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgesolve.device import manifest
from edgesolve.device.errors import BundleError, InputError

SCHEMA_VERSION = manifest.SCHEMA_VERSION
MANIFEST = manifest.NAME
_SHARED = {
    "head": "head.safetensors",
    "reference": "reference.safetensors",
    "parity": "parity.npz",
}
"""Of backends that name no file of their own: those whose rows are the float backbone's."""

_HEAD = {"weights": "Dc", "intercept": "c", "starts": "g"}
_STATISTICS = dict.fromkeys(("mean", "var", "gamma", "beta", "shift", "eps"), "S")
_REFERENCE = {
    "moments.n": "1",
    "moments.v": "1",
    "moments.mean_x": "D",
    "moments.mean_t": "c",
    "moments.s": "T",
    "moments.c": "cD",
    "prototypes": "cc",
    "anchor_rows": "kD",
    "anchor_logits": "kc",
    "window_mean": "S",
    "window_var": "S",
}
_PARITY = {
    "rows": "nD",
    "logits": "nc",
    "teacher_logits": "nc",
    "adapted_logits": "nc",
    "adapted_rows": "nD",
    "mean": "S",
    "var": "S",
    "window_mean": "S",
    "window_var": "S",
}
"""What a file must hold, one letter an axis: D features of the head, c classes, S channels of the statistics,
T = D (D + 1) / 2, 1 for one number. Any other letter is any length, the same wherever it stands in the file."""


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
        """The tensors of the safetensors file `name`: hash, shapes and numbers checked. Raises BundleError."""
        from safetensors.numpy import load

        data = self.read(name)
        try:
            found = load(data)
        except Exception as error:
            raise BundleError(
                f"{name}: not a readable safetensors file ({manifest.line(error)})."
            ) from error
        if name == "statistics.safetensors":
            self._check(name, found, _STATISTICS)
            if not ((found["var"] >= 0).all() and (found["eps"] > 0).all()):
                raise BundleError(f"{name}: a variance is negative, or an eps isn't positive.")
        elif name in [_SHARED["head"], *(self.file(b, "head") for b in self.backends)]:
            self._check(name, found, _HEAD)
        return found

    def reference(self, backend: str) -> dict[str, np.ndarray]:
        """Source moments, anchors, prototypes and the drift test's window, for the rows of `backend`."""
        names = dict.fromkeys((_SHARED["reference"], self.file(backend, "reference")))
        found = {key: array for name in names for key, array in self.arrays(name).items()}
        self._check(", ".join(names), found, _REFERENCE, self._channels())
        if not (found["moments.n"] > 0).all():
            raise BundleError(f"{', '.join(names)}: moments of no rows. Build the bundle again.")
        return found

    def parity(self, backend: str | None = None) -> dict[str, np.ndarray]:
        """`frames` (n, h, w, c), `rows` (n, D), `logits` (n, c) and `teacher_logits` (n, c), as torch computed them.

        With a `backend` that has rows of its own: its rows and logits, as its kernels computed them at build.
        """
        names = [_SHARED["parity"]]
        if backend is not None and self.file(backend, "parity") not in names:
            names.append(self.file(backend, "parity"))
        found = {key: array for name in names for key, array in self._archive(name).items()}
        try:
            frames = self.contract.check(found.get("frames"), "frames")
        except InputError as error:
            raise BundleError(f"{', '.join(names)}: {error}") from error
        lengths = {**self._channels(), "n": len(frames)}
        self._check(", ".join(names), found, _PARITY, lengths)
        return found

    def _channels(self) -> dict[str, int]:
        return {"S": self.arrays("statistics.safetensors")["mean"].size}

    def _archive(self, name: str) -> dict[str, np.ndarray]:
        import io
        import zipfile

        data = self.read(name)
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if any(entry.compress_type for entry in archive.infolist()):
                    raise ValueError("a part is compressed: nobody knows to which size it grows")
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        except Exception as error:
            raise BundleError(
                f"{name}: not a readable NumPy archive ({manifest.line(error)})."
            ) from error

    def _check(
        self,
        name: str,
        found: dict[str, np.ndarray],
        layout: dict[str, str],
        known: dict[str, int] | None = None,
    ) -> None:
        """Raises BundleError unless every array of `layout` is there, of its shape, real and finite."""
        length, classes = self.manifest["rows"]["length"], len(self.classes)
        lengths = {"D": length, "c": classes, "T": length * (length + 1) // 2, **(known or {})}
        for key, axes in layout.items():
            array = found.get(key)
            if array is None:
                raise BundleError(f"{name}: lacks {key}. Build the bundle again.")
            shape = (array.size,) if axes == "1" else array.shape
            expected = tuple(
                1 if axis == "1" else lengths.setdefault(axis, size)
                for axis, size in zip(axes, shape, strict=False)
            )
            fits = len(shape) == len(axes) and shape == expected and array.size > 0
            if not fits or array.dtype.kind not in "fiu":
                raise BundleError(
                    f"{name}: {key} is {array.dtype} of shape {array.shape}, which doesn't fit "
                    f"{length} features, {classes} classes and the arrays beside it."
                )
            if not np.isfinite(array).all():
                raise BundleError(f"{name}: {key} holds NaN or inf.")

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
    try:
        data = manifest.read_inside(folder, name, entry["bytes"])
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
        raw = manifest.read_inside(folder, MANIFEST, manifest.LARGEST)
    except OSError as error:
        raise BundleError(
            f"{folder}: {MANIFEST} cannot be read ({error.strerror}); this is not a finished bundle."
        ) from error
    return Bundle(folder, manifest.parse(raw), hashlib.sha256(raw).hexdigest())
