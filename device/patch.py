"""Fold new normalisation statistics into a model file's bytes, in memory, without any graph library.

The host recorded where each normalised layer's weight and bias lie in the file. A layer computes
`weight * x + bias` with `weight = W * s`, `bias = beta + (b - mean) * s`, `s = gamma / sqrt(var + eps)` per output
channel; new statistics change s and the bias, so inference pays nothing for the adaptation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgesolve.device.errors import BundleError


@dataclass(frozen=True, slots=True)
class Statistics:
    """Every normalisation of the network, concatenated over channels: all fields (S,) float64.

    `shift` is the bias of the layer before the normalisation.
    """

    mean: np.ndarray
    var: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    shift: np.ndarray
    eps: np.ndarray

    def scale(self) -> np.ndarray:
        return self.gamma / np.sqrt(self.var + self.eps)

    def bias(self) -> np.ndarray:
        return self.beta + (self.shift - self.mean) * self.scale()

    def replaced(self, mean: np.ndarray, var: np.ndarray) -> Statistics:
        """The same layers with other statistics; `mean`, `var` (S,). Raises BundleError if they can't be."""
        if mean.shape != self.mean.shape or var.shape != self.var.shape:
            raise BundleError(
                f"statistics have {mean.shape[0]} channels, this bundle's network has {len(self.mean)}."
            )
        if not (np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all()):
            raise BundleError("statistics hold NaN, inf or a negative variance.")
        return Statistics(
            np.asarray(mean, np.float64),
            np.asarray(var, np.float64),
            self.gamma,
            self.beta,
            self.shift,
            self.eps,
        )


def patched(model: bytes, table: list[dict], source: Statistics, target: Statistics) -> bytes:
    """`model` with each layer of `table` moved from `source` to `target` statistics.

    An entry has `channels` [start, stop) into the statistics, `weight` {offset, shape, axis} and `bias`
    {offset}: byte offsets of little-endian float32 data, `axis` the output channels' axis.
    """
    out = bytearray(model)
    old, new, bias = source.scale(), target.scale(), target.bias()
    ratio = np.divide(new, old, out=np.ones_like(new), where=old != 0.0)
    for entry in table:
        start, stop = entry["channels"]
        place = entry["weight"]
        shape = tuple(place["shape"])
        weight = _view(out, place["offset"], shape)
        along = [1] * len(shape)
        along[place["axis"]] = stop - start
        weight *= ratio[start:stop].reshape(along).astype(np.float32)
        _view(out, entry["bias"]["offset"], (stop - start,))[:] = bias[start:stop]
    return bytes(out)


def _view(buffer: bytearray, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(buffer, "<f4", count=int(np.prod(shape)), offset=offset).reshape(shape)
