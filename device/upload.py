"""One frame from the body of a request, whose decoded size is bounded before anything is decoded."""

from __future__ import annotations

import io
import threading

import numpy as np

from edgesolve.device import decode
from edgesolve.device.bundle import Contract
from edgesolve.device.errors import InputError

MAX_PIXELS = 16 << 20  # 48 MiB of RGB; decode.py's own bound is for a camera's files
_one = threading.Lock()


class TooLarge(InputError):
    """The image would be larger, once decoded, than a request may make it."""


def frame(body: bytes, contract: Contract, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The frame (h, w, c) in `body`: an image, converted and resized as `load_frames` does, or an `.npy` that fits.

    One body is decoded at a time, so that requests in parallel can't add up their memory.
    Raises InputError with one sentence; TooLarge if the image's header says more than `max_pixels`.
    """
    with _one:
        if not body.startswith(decode.NPY_MAGIC):
            _check_pixels(body, max_pixels)
        return decode.decode(body, contract, "body")


def _check_pixels(body: bytes, max_pixels: int) -> None:
    Image = decode.pillow()
    size = decode.webp_size(body)
    try:
        if size is None:
            with Image.open(io.BytesIO(body), formats=decode.FORMATS) as image:
                size = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLarge(f"body: the image has far more than {max_pixels} pixels.") from None
    except Exception:  # not readable at all: `decode` says so
        return
    if size[0] * size[1] > max_pixels:
        raise TooLarge(
            f"body: the image has {size[0]} x {size[1]} pixels; at most {max_pixels} are decoded."
        )
