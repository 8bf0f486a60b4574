"""Frames from what a user names: an image, a folder of images, an `.npy` or an `.npz`."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edgesolve.device.errors import BackendError, InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm")


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
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{path}: not a readable image ({error}).") from error
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
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable NumPy file ({error}).") from error
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
        except (OSError, ValueError, SyntaxError) as error:
            skipped.append(f"{name}: not a readable image ({error}); skipped.")
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
    try:
        from PIL import Image
    except ImportError as error:
        raise BackendError(
            "reading images needs Pillow: pip install 'edgesolve[images]'"
        ) from error
    with Image.open(path) as image:
        image = image.convert("L" if channels == 1 else "RGB")
        if size is not None and image.size != (size[1], size[0]):
            image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        array = np.asarray(image)
    return array[:, :, None] if channels == 1 else array
