"""How much memory a solve will take, before it starts."""

import numpy as np

from edgesolve.kernels.designs import SAMPLE_ROWS, TILE_FLOATS, Masked, Pooled
from edgesolve.kernels.gap import GRAM_WEIGHTS
from edgesolve.kernels.gated import TILE_FLOATS as GATED_TILE_FLOATS

FIXED_BYTES = 1 << 16
"""What small objects of a solve take."""


def peak_mib(loss, method: str) -> float:
    """Peak memory of a method beside the loss, in MiB: an upper bound, against which tests measure."""
    D, c = loss.shape
    if not hasattr(loss, "design"):
        square = D * D
        numbers = {
            "fista": 2 * square + 12 * D * c,  # the proof of its step size factors Q
            # A float32 copy, and both copies of the gates at work and of those that are on.
            "newton": 4.5 * square + 24 * D * c,
            "ridge": 3 * square + 4 * D * c,
        }[method]
        return (8 * numbers + FIXED_BYTES) / 2**20
    n, m, data = loss.n, len(loss.design.starts) - 1, loss.design.nbytes / 8
    numbers = {
        # The power iteration takes four columns at a time.
        "fista": 12 * D * max(c, 4) + _tiles(loss, max(c, 4)) + _certificate(loss),
        "newton": 24 * D * c + _tiles(loss, c) + 0.5 * data + n * m / 4 + _surrogate(loss),
        "variational": 7 * n * n + 4 * n * m * c + 3 * m * m + 7 * D * c + _written_out(loss),
        "ridge": 4 * n * n + 3 * D * c + _tiles(loss, c) + _written_out(loss),
    }[method]
    if hasattr(loss, "T"):
        # Probabilities, their logarithms, and the local model in two precisions.
        numbers += 12 * n * max(c, 2)
    if method == "newton" and not isinstance(loss.design, Masked):
        numbers += 2 * data  # the rows of the gates at work, in two precisions
    return (8 * (numbers + 6 * n * c) + FIXED_BYTES) / 2**20


def _certificate(loss):
    """The Gram matrix of the rows and its factors, where least squares without a penalty is certified by them."""
    D = loss.shape[0]
    return 5 * D * D if min(loss.n, GRAM_WEIGHTS) >= D else 0


def _tiles(loss, c):
    """Numbers that one product with the rows holds for a tile of them."""
    design = loss.design
    if isinstance(design, Pooled):
        (_, p, r), m = design.z.shape, design.D.shape[2]
        return 2 * min(GATED_TILE_FLOATS, loss.n * (p * (r + m) + m * r))
    if isinstance(design, Masked):
        return 3 * min(TILE_FLOATS, loss.n * (design.D.shape[1] * c + design.X.shape[1]))
    return 0 if design.A.dtype == np.float64 else min(TILE_FLOATS, loss.n * loss.shape[0])


def _surrogate(loss):
    """Gamma and S, their factors, and the sample of rows that pooled and explicit ones come from."""
    sizes = np.diff(loss.design.starts)
    D, k, r = loss.shape[0], len(sizes), int(sizes.max())
    sample = 0 if isinstance(loss.design, Masked) else 2 * min(loss.n, SAMPLE_ROWS) * D + 2 * D * D
    return 6 * k * k + 4 * r * r + sample + 3 * min(TILE_FLOATS, k * k * r)


def _written_out(loss):
    """Rows in float64, weighted rows, and what pooling made them from."""
    return 0 if isinstance(loss.design, Masked) else 3 * loss.n * loss.shape[0]
