"""CIFAR-10-C's fifteen corruptions at severity 5, with the published constants for 32 x 32 pixels.

Constants and order of steps: Hendrycks and Dietterich 2019 (arXiv 1903.12261), as their script for CIFAR-10 has them.
Known departures: frost's five photographs are not at hand, so its texture is made here; randomness is NumPy's, seeded.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy import ndimage

Generator = np.random.Generator
SIZE = 32
GREY = np.array([0.299, 0.587, 0.114], np.float32)
ICE = np.array([0.86, 0.94, 1.0], np.float32)


def gaussian_noise(x: np.ndarray, rng: Generator) -> np.ndarray:
    return x + np.float32(0.10) * rng.standard_normal(x.shape, np.float32)


def shot_noise(x: np.ndarray, rng: Generator) -> np.ndarray:
    return rng.poisson(x * 50.0).astype(np.float32) / 50.0


def impulse_noise(x: np.ndarray, rng: Generator) -> np.ndarray:
    """Seven in a hundred values become 0 or 1, each channel by itself."""
    hit, salt = rng.random(x.shape) < 0.07, rng.random(x.shape) < 0.5
    return np.where(hit, salt.astype(np.float32), x)


def defocus_blur(x: np.ndarray, rng: Generator) -> np.ndarray:
    """A disk of radius 1.5: on this grid the mean over 3 x 3 pixels."""
    return ndimage.uniform_filter(x, (0, 3, 3, 0), mode="mirror")


def glass_blur(x: np.ndarray, rng: Generator) -> np.ndarray:
    """Twice, every pixel takes a near one's value, between two blurs of 0.4 pixels.

    The published script means to swap the two, but its second assignment reads what the first wrote.
    """
    y = np.floor(_gaussian(x, 0.4) * 255 + 1e-3)
    every = np.arange(len(y))
    for _ in range(2):
        steps = rng.integers(-1, 1, (SIZE - 2, SIZE - 2, 2, len(y)))
        for i, h in enumerate(range(SIZE - 1, 1, -1)):
            for j, w in enumerate(range(SIZE - 1, 1, -1)):
                y[:, h, w] = y[every, h + steps[i, j, 0], w + steps[i, j, 1]]
    return _gaussian(y / np.float32(255), 0.4)


def motion_blur(x: np.ndarray, rng: Generator) -> np.ndarray:
    return _motion(x, 9, 2.5, rng.uniform(-45, 45, len(x)))


def zoom_blur(x: np.ndarray, rng: Generator) -> np.ndarray:
    """Mean of the image and of 26 enlargements by 1.00 to 1.25."""
    factors = np.arange(1, 1.26, 0.01)
    total = x.copy()
    for factor in factors:
        A = _zoom(SIZE, factor)
        total += np.einsum("ih,nhwc,jw->nijc", A, x, A, optimize=True)
    return total / (len(factors) + 1)


def snow(x: np.ndarray, rng: Generator) -> np.ndarray:
    """Flakes drawn out by the wind, in front of a scene that is half way to white."""
    A = _zoom(SIZE, 1.25)
    flakes = rng.normal(0.3, 0.3, (len(x), SIZE, SIZE)).astype(np.float32)
    flakes = np.einsum("ih,nhw,jw->nij", A, flakes, A, optimize=True)
    flakes = np.where(flakes < 0.65, 0.0, flakes).clip(0, 1)[..., None]
    layer = _motion(flakes.astype(np.float32), 14, 12.0, rng.uniform(-135, -45, len(x)))
    white = np.maximum(x, (x @ GREY)[..., None] * 1.5 + 0.5)
    return 0.8 * x + 0.2 * white + layer + layer[:, ::-1, ::-1]


def frost(x: np.ndarray, rng: Generator) -> np.ndarray:
    """Ice over the lens: veins of a fractal instead of the published photographs, as rough as it takes for a plain
    network to lose what it loses on those (about 30 points)."""
    plasma = diamond_square(5, 256, 1.25, rng)
    low, high = np.quantile(plasma, (0.1, 0.9), axis=(1, 2), keepdims=True)
    veins = (1 - np.abs(2 * np.clip((plasma - low) / (high - low), 0, 1) - 1)) ** 0.7
    which = rng.integers(0, 5, len(x))
    corner = rng.integers(0, 256 - SIZE, (2, len(x)))
    along = np.arange(SIZE)
    rows, columns = (c[:, None] + along for c in corner)
    ice = veins[which[:, None, None], rows[:, :, None], columns[:, None, :]]
    return 0.75 * x + 0.45 * ice[..., None] * ICE


def fog(x: np.ndarray, rng: Generator) -> np.ndarray:
    brightest = x.max((1, 2, 3), keepdims=True)
    veil = diamond_square(len(x), SIZE, 1.75, rng)[..., None]
    return (x + 1.5 * veil) * brightest / (brightest + 1.5)


def brightness(x: np.ndarray, rng: Generator) -> np.ndarray:
    """HSV's value raised by 0.3: hue and saturation stay, black becomes grey."""
    value = x.max(-1, keepdims=True)
    raised = np.minimum(value + 0.3, 1.0)
    return np.where(value > 0, x / np.maximum(value, 1e-6), 1.0) * raised


def contrast(x: np.ndarray, rng: Generator) -> np.ndarray:
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * 0.15 + mean


def elastic_transform(x: np.ndarray, rng: Generator) -> np.ndarray:
    """An affine map that moves three points by up to 0.96 pixels, then a field of 3.2 pixels smoothed by 0.96."""
    n, reach = len(x), SIZE * 0.03
    before = np.array([[26, 26], [26, 6], [6, 6]], np.float32)  # (x, y) of three points
    after = before + rng.uniform(-reach, reach, (n, 3, 2))
    ones = np.ones((n, 3, 1))
    back = np.linalg.solve(np.concatenate([after, ones], 2), np.broadcast_to(before, (n, 3, 2)))
    down, right = np.mgrid[:SIZE, :SIZE].astype(np.float64)
    place = np.stack([right, down, np.ones_like(down)], -1) @ back[:, None]  # (n, h, w, (x, y))
    y = _sampled(x, place[..., 1], place[..., 0], "mirror")
    field = rng.uniform(-1, 1, (2, n, SIZE, SIZE))
    dx, dy = SIZE * 0.1 * ndimage.gaussian_filter(field, (0, 0, reach, reach), truncate=3)
    return _sampled(y, down + dy, right + dx, "reflect")


def pixelate(x: np.ndarray, rng: Generator) -> np.ndarray:
    """Down to 20 x 20 pixels and up again, box-filtered."""

    def coarse(image: Image.Image) -> Image.Image:
        return image.resize((20, 20), Image.Resampling.BOX).resize(
            (SIZE, SIZE), Image.Resampling.BOX
        )

    return _through_pillow(x, coarse)


def jpeg_compression(x: np.ndarray, rng: Generator) -> np.ndarray:
    return jpeg(x, 40)


def jpeg(x: np.ndarray, quality: int) -> np.ndarray:
    """x (n, h, w, 3) on [0, 1], re-encoded as JPEG and decoded."""

    def coded(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _through_pillow(x, coded)


CORRUPTIONS = {
    f.__name__: f
    for f in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
    )
}


def corrupted(name: str, x: np.ndarray, seed: int = 0) -> np.ndarray:
    """uint8 images x (n, 32, 32, 3) under the corruption `name` ("none": as they are), as uint8.

    Cut to whole values, as published. Equal seeds give equal images; an image's result depends on its place in x.
    """
    if name == "none":
        return x
    if x.dtype != np.uint8 or x.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"images are {x.dtype} {x.shape}, expected uint8 (n, 32, 32, 3).")
    rng = np.random.default_rng([seed, list(CORRUPTIONS).index(name)])
    y = CORRUPTIONS[name](x.astype(np.float32) / 255, rng)
    return whole(y)


def whole(y: np.ndarray) -> np.ndarray:
    """Images on [0, 1] as uint8, cut rather than rounded."""
    return np.floor(np.clip(y, 0, 1) * 255 + 1e-3).astype(np.uint8)


def diamond_square(n: int, size: int, decay: float, rng: Generator) -> np.ndarray:
    """`n` fractal surfaces (n, size, size) on [0, 1], periodic; each halving of the step divides the jitter by
    decay^2. `size` a power of two."""
    z = np.zeros((n, size, size))
    step, jitter = size, 100.0

    def wobble(total):
        return total / 4 + jitter * rng.uniform(-jitter, jitter, total.shape)

    while step >= 2:
        half = step // 2
        corner = z[:, ::step, ::step]
        pair = corner + np.roll(corner, -1, 1)
        z[:, half::step, half::step] = wobble(pair + np.roll(pair, -1, 2))
        middle = z[:, half::step, half::step]
        across = corner + np.roll(corner, -1, 2)
        z[:, ::step, half::step] = wobble(middle + np.roll(middle, 1, 1) + across)
        down = corner + np.roll(corner, -1, 1)
        z[:, half::step, ::step] = wobble(middle + np.roll(middle, 1, 2) + down)
        step, jitter = half, jitter / decay
    z -= z.min((1, 2), keepdims=True)
    return (z / z.max((1, 2), keepdims=True)).astype(np.float32)


def _gaussian(x: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")


def _motion(x: np.ndarray, radius: int, sigma: float, degrees: np.ndarray) -> np.ndarray:
    """ImageMagick's motion blur: half a Gaussian over 2 radius + 1 pixels, along one angle for each image."""
    n, h, w = x.shape[:3]
    steps = np.arange(2 * radius + 1)
    weight = np.exp(-(steps**2) / (2 * sigma**2))
    angle = np.deg2rad(degrees)
    right = np.ceil(np.outer(np.cos(angle), steps) - 0.5).astype(int)
    down = np.ceil(np.outer(np.sin(angle), steps) - 0.5).astype(int)
    every, total = np.arange(n)[:, None, None], np.zeros_like(x)
    for i, share in enumerate(weight / weight.sum()):
        rows = np.clip(np.arange(h) + down[:, i, None], 0, h - 1)
        columns = np.clip(np.arange(w) + right[:, i, None], 0, w - 1)
        total += np.float32(share) * x[every, rows[:, :, None], columns[:, None, :]]
    return total


def _zoom(size: int, factor: float) -> np.ndarray:
    """(size, size): the middle of an axis enlarged by `factor`, straight between pixels."""
    crop = int(np.ceil(size / factor))
    top = (size - crop) // 2
    whole_ = ndimage.zoom(np.eye(size)[top : top + crop], (factor, 1), order=1)
    trim = (len(whole_) - size) // 2
    return whole_[trim : trim + size].astype(np.float32)


def _sampled(x: np.ndarray, rows: np.ndarray, columns: np.ndarray, mode: str) -> np.ndarray:
    """x (n, h, w, c) at rows, columns (n, h, w) in pixels, straight between them; `mode` as SciPy names edges."""
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    every, total = np.arange(len(x))[:, None, None], 0.0
    for i in (0, 1):
        for j in (0, 1):
            share = np.abs(1 - i - (rows - top)) * np.abs(1 - j - (columns - left))
            pixel = x[every, _inside(top + i, mode), _inside(left + j, mode)]
            total = total + share[..., None] * pixel
    return total


def _inside(index: np.ndarray, mode: str) -> np.ndarray:
    """Indices reflected into 0 .. SIZE - 1, about the edge pixel ("mirror") or beside it ("reflect")."""
    if mode == "mirror":
        index = np.abs(index) % (2 * SIZE - 2)
        return np.minimum(index, 2 * SIZE - 2 - index)
    index = index % (2 * SIZE)
    return np.minimum(index, 2 * SIZE - 1 - index)


def _through_pillow(x: np.ndarray, step) -> np.ndarray:
    images = np.round(x * 255).astype(np.uint8)
    done = [np.asarray(step(Image.fromarray(image))) for image in images]
    return np.stack(done).astype(np.float32) / 255
