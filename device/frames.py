"""Frames from what a user names: an image, a folder of images, an `.npy` or an `.npz`."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgesolve.device.decode import FORMATS, SUFFIXES, check_pixels, image_array, one_line, pillow
from edgesolve.device.errors import EdgeError, InputError

_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    InputError,
    ArithmeticError,
    LookupError,
    struct.error,
)
"""What Pillow's readers raise on damaged files, each in its own way."""


@dataclass(frozen=True, slots=True)
class Frames:
    """`frames` (n, h, w, c); `labels` (n,) int64 or None; `names` per item; `skipped`: one sentence a bad item."""

    frames: np.ndarray
    labels: np.ndarray | None
    names: list[str]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.frames)


def load_frames(
    path: str | Path, *, size: tuple[int, int] | None = None, channels: int = 3
) -> Frames:
    """Read `path`; images are converted to `channels` (1 or 3) and resized to `size` (h, w) if it is given.

    A folder may have one sub-folder per class, in sorted order: its index is then the label. A damaged image among
    good ones is skipped and named; none left, or nothing there, raises InputError.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder.")
    if path.is_dir():
        return _folder(path, size, channels)
    if path.suffix.lower() in (".npy", ".npz"):
        return _arrays(path)
    if path.suffix.lower() in SUFFIXES:
        try:
            return Frames(_image(path, size, channels)[None], None, [path.name])
        except _DAMAGED as error:
            raise InputError(f"{path}: not a readable image ({one_line(error)}).") from error
    raise InputError(
        f"{path}: expected an image ({', '.join(SUFFIXES)}), a folder, an .npy or an .npz file."
    )


def _arrays(path: Path) -> Frames:
    try:
        if path.suffix.lower() == ".npy":
            x, y = np.lib.format.open_memmap(path, mode="r"), None
        else:
            with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as loaded:
                if "x" not in loaded.files:
                    raise InputError(
                        f"{path}: has {', '.join(loaded.files)}, expected x (n, h, w, c)."
                    )
                x = loaded["x"]
                y = loaded["y"] if "y" in loaded.files else None
    except EdgeError:
        raise
    except Exception as error:  # zipfile, zlib, lzma, tokenize: each reader has its own
        raise InputError(f"{path}: not a readable NumPy file ({one_line(error)}).") from error
    if not all(isinstance(a, np.ndarray) for a in (x, y) if a is not None):
        raise InputError(f"{path}: x or y is no NumPy array. Write it with numpy.savez.")
    if x.ndim < 2 or len(x) == 0:
        raise InputError(f"{path}: x has shape {x.shape}, expected (n, h, w, c) with n >= 1.")
    if y is not None:
        if y.dtype.kind not in "iufb" or (y != np.floor(y)).any():
            raise InputError(f"{path}: y holds {y.dtype}, expected whole numbers, the classes.")
        y = y.astype(np.int64).reshape(-1)
        if len(y) != len(x):
            raise InputError(f"{path}: {len(x)} items in x and {len(y)} labels in y.")
    return Frames(x, y, [str(i) for i in range(len(x))])


def _folder(path: Path, size: tuple[int, int] | None, channels: int) -> Frames:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{path}: no images ({', '.join(SUFFIXES)}) in this folder.")
    classes = sorted({p.relative_to(path).parts[0] for p in files if p.parent != path})
    labelled = bool(classes) and all(p.parent != path for p in files)
    frames, names, labels, skipped = [], [], [], []
    for file in files:
        name = str(file.relative_to(path))
        try:
            image = _image(file, size, channels)
        except _DAMAGED as error:
            skipped.append(f"{name}: not a readable image ({one_line(error)}); skipped.")
            continue
        if frames and image.shape != frames[0].shape:
            skipped.append(
                f"{name}: is {image.shape[:2]}, the others are {frames[0].shape[:2]}; skipped."
            )
            continue
        frames.append(image)
        names.append(name)
        labels.append(classes.index(name.split("/")[0]) if labelled else -1)
    if not frames:
        raise InputError(f"{path}: none of {len(files)} images could be read. First: {skipped[0]}")
    y = np.array(labels, np.int64) if labelled else None
    return Frames(np.stack(frames), y, names, skipped)


def _image(path: Path, size: tuple[int, int] | None, channels: int) -> np.ndarray:
    """Raises InputError, BackendError, or one of _DAMAGED."""
    Image = pillow()
    try:
        with Image.open(path, formats=FORMATS) as image:
            check_pixels(image.size, path.name)
            return image_array(image, size, channels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path.name}: {one_line(error)}") from error
