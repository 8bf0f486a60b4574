"""Bytes and raw pictures to frames in the bundle's contract; nothing larger than a bound is ever decoded."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from edgesolve.device.bundle import Contract
from edgesolve.device.errors import BackendError, InputError

MAX_PIXELS = 64_000_000
MAX_ARRAY_BYTES = 64 << 20
MAX_HEADER_BYTES = 10_000  # NumPy's own bound on what it parses
NPY_MAGIC = b"\x93NUMPY"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM")  # those of SUFFIXES; no others are tried


def decode(data: bytes, contract: Contract, name: str = "input") -> np.ndarray:
    """One frame (h, w, c) in `contract` from an image's bytes or those of an `.npy` file.

    Images are converted and resized as `load_frames` does; an array must fit as it is. A header that says more than
    64 megapixels or 64 MiB is refused before anything is decoded. Raises InputError, and nothing else.
    """
    try:
        if not data.startswith(NPY_MAGIC):
            return _picture(data, contract, name)
        stream = io.BytesIO(data)
        header = read_header(stream, name)
        if header.n_bytes > MAX_ARRAY_BYTES:
            raise InputError(
                f"{name}: the array's header says {header.n_bytes} bytes, over 64 MiB."
            )
        if header.count(contract, name) != 1:
            raise InputError(f"{name}: holds {header.shape[0]} frames, expected one.")
        frame = next(read_frames(stream, header, contract, name))
    except InputError:
        raise
    except BackendError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # a decoder's: whatever a damaged or hostile file makes it raise
        raise InputError(f"{name}: not readable ({one_line(error)}).") from error
    if isinstance(frame, InputError):
        raise frame
    if stream.read(1):
        raise InputError(f"{name}: bytes are left after the array.")
    return frame


def contract_frame(image: np.ndarray, contract: Contract, name: str = "input") -> np.ndarray:
    """A picture (h, w), (h, w, 1), (h, w, 3) RGB or (h, w, 4) RGBA, uint8, as one frame of an image contract.

    The whole picture is resized, nothing cropped: with Pillow exactly as `load_frames` does; without it by OpenCV,
    INTER_AREA to shrink and INTER_LINEAR else, which differs by 1 to 3 grey levels on average. A picture that fits may
    be returned as it is. Raises InputError, or BackendError if a picture must be resized and neither library is there.
    """
    h, w, c = image_shape(contract, name)
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[:, :, None]
    known = image.ndim == 3 and image.shape[2] in (1, 3, 4) and image.dtype == np.uint8
    if not known or image.size == 0:
        raise InputError(
            f"{name}: a picture of shape {image.shape}, {image.dtype}, expected uint8 (h, w, 3)."
        )
    image = _channels(image, c)
    return np.ascontiguousarray(image) if image.shape == (h, w, c) else _resize(image, h, w)


def image_shape(contract: Contract, name: str) -> tuple[int, int, int]:
    """(h, w, c) of a contract that pictures can meet: uint8, 1 or 3 channels. InputError for any other."""
    shape = contract.shape
    if contract.dtype != np.uint8 or len(shape) != 3 or shape[2] not in (1, 3):
        raise InputError(
            f"{name}: is a picture, this bundle expects {contract.dtype} arrays of shape {shape}: give .npy."
        )
    return shape


def pillow() -> Any:
    """The module PIL.Image. Raises BackendError naming the extra where it isn't installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise BackendError(
            "reading images needs Pillow: pip install 'edgesolve[images]'"
        ) from error
    return Image


def image_array(image: Any, size: tuple[int, int] | None, channels: int) -> np.ndarray:
    """A PIL image as (h, w, channels) uint8, resized to `size` (h, w) by Pillow's bilinear filter."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:  # else `convert` would copy the whole picture
        image = image.convert(mode)
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), pillow().Resampling.BILINEAR)
    array = np.asarray(image)
    return array[:, :, None] if channels == 1 else array


def _picture(data: bytes, contract: Contract, name: str) -> np.ndarray:
    h, w, c = image_shape(contract, name)
    Image = pillow()
    try:
        check_pixels(webp_size(data), name)  # Pillow's WebP reader allocates before it checks
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_pixels(image.size, name)
            return image_array(image, (h, w), c)
    except Image.UnidentifiedImageError as error:
        raise InputError(
            f"{name}: not a readable image ({', '.join(FORMATS)}) and no .npy."
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name}: the image's header says over 64 megapixels.") from error


def check_pixels(size: tuple[int, int] | None, name: str) -> None:
    if size is not None and size[0] * size[1] > MAX_PIXELS:
        raise InputError(
            f"{name}: the image's header says {size[0]} x {size[1]}, over 64 megapixels."
        )


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Canvas (width, height) that an extended WebP header states; None for all other bytes (at most 16383²)."""
    if data[:4] != b"RIFF" or data[8:16] != b"WEBPVP8X" or len(data) < 30:
        return None
    return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")


def _channels(image: np.ndarray, c: int) -> np.ndarray:
    if c == image.shape[2]:
        return image
    if c == 3:
        return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[:, :, :3]
    # ITU-R 601 in 16-bit fixed point: Pillow's own, to the bit
    r, g, b = (image[:, :, i : i + 1].astype(np.uint32) for i in range(3))
    return ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16).astype(np.uint8)


def _resize(image: np.ndarray, h: int, w: int) -> np.ndarray:
    try:
        Image = pillow()
    except BackendError as missing:
        try:
            import cv2
        except ImportError:
            raise missing from None
        shrink = h <= image.shape[0] and w <= image.shape[1]
        how = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
        return cv2.resize(np.ascontiguousarray(image), (w, h), interpolation=how).reshape(h, w, -1)
    c = image.shape[2]
    picture = Image.fromarray(np.ascontiguousarray(image[:, :, 0] if c == 1 else image))
    return image_array(picture, (h, w), c)


# -- .npy, frame by frame, from anything with readinto -----------------------------------------


@dataclass(frozen=True, slots=True)
class Header:
    """What an `.npy` header says; `n_bytes` of data follow it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def count(self, contract: Contract, name: str) -> int:
        """How many frames of `contract` it announces. InputError for another shape or dtype."""
        one = len(self.shape) == len(contract.shape)
        shape = self.shape if one else self.shape[1:]
        try:  # Contract.check owns the rules and sentences; this array of one value holds no memory
            contract.check(np.broadcast_to(np.zeros((), self.dtype), (1, *shape)), name)
        except ValueError as error:  # more axes or elements than NumPy can count
            raise InputError(
                f"{name}: an array of shape {self.shape}, expected {contract.shape}."
            ) from error
        if not one and self.shape[0] == 0:
            raise InputError(f"{name}: holds no frames.")
        if self.fortran and self.n_bytes > MAX_ARRAY_BYTES:
            raise InputError(f"{name}: in Fortran order and over 64 MiB; save it in C order.")
        return 1 if one else self.shape[0]


def read_header(stream: BinaryIO, name: str) -> Header:
    """The next `.npy` header of `stream`. EOFError if it's at its end, InputError for anything else."""
    start = _exactly(stream, 8, name, may_end=True)
    width = {b"\x01\x00": 2, b"\x02\x00": 4}.get(start[6:])
    if start[:6] != NPY_MAGIC or width is None:
        raise InputError(f"{name}: expected an array as np.save writes it, found other bytes.")
    size = _exactly(stream, width, name)
    if (length := int.from_bytes(size, "little")) > MAX_HEADER_BYTES:
        raise InputError(f"{name}: the array's header is {length} bytes long, expected some 100.")
    text = io.BytesIO(length.to_bytes(4, "little") + _exactly(stream, length, name))
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(text)
    except Exception as error:
        raise InputError(f"{name}: a damaged array header ({one_line(error)}).") from error
    if dtype.hasobject or dtype.fields or not dtype.itemsize or any(n < 0 for n in shape):
        raise InputError(f"{name}: an array of {dtype}, shape {shape}; expected plain numbers.")
    return Header(shape, dtype, fortran)


def read_frames(
    stream: BinaryIO, header: Header, contract: Contract, name: str
) -> Iterator[np.ndarray | InputError]:
    """The frames (h, w, c) that follow `header`, one in memory at a time.

    A frame that holds NaN or inf is yielded as the InputError that says so. Raises InputError if the array as a whole
    doesn't fit, or the data ends early.
    """
    n = header.count(contract, name)
    if header.fortran:
        flat = np.empty(math.prod(header.shape), header.dtype)
        _fill(stream, flat, name)
        whole = flat.reshape(header.shape, order="F").reshape(n, *contract.shape)
    for i in range(n):
        if header.fortran:
            frame = np.ascontiguousarray(whole[i])
        else:
            frame = np.empty(contract.shape, header.dtype)
            _fill(stream, frame, name)
        try:
            yield contract.check(frame, name)[0]
        except InputError as error:
            yield error


def skip(stream: BinaryIO, n_bytes: int, name: str) -> None:
    """Read past the data of an array that isn't wanted, in blocks."""
    block = memoryview(bytearray(min(n_bytes, 1 << 20)))
    while n_bytes > 0:
        _fill(stream, block[:n_bytes], name)
        n_bytes -= len(block[:n_bytes])


def _exactly(stream: BinaryIO, n: int, name: str, may_end: bool = False) -> bytes:
    data = bytearray(n)
    _fill(stream, data, name, may_end)
    return bytes(data)


def _fill(stream: BinaryIO, target: Any, name: str, may_end: bool = False) -> None:
    view = target.reshape(-1).view(np.uint8) if isinstance(target, np.ndarray) else target
    view, got = memoryview(view), 0
    while got < len(view):
        n = stream.readinto(view[got:])
        if not n:
            if may_end and not got:
                raise EOFError
            raise InputError(f"{name}: the data ends early, {len(view) - got} bytes are missing.")
        got += n


def one_line(error: Exception) -> str:
    """What a library says, as one printable line; readers quote the bytes that they choked on."""
    text = " ".join(str(error).split())[:200]
    return "".join(c if c.isprintable() else "?" for c in text) or type(error).__name__
