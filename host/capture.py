"""Passes over calibration frames that keep moments, never activations of every frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgesolve.host.adaptable import Preprocess
from edgesolve.host.errors import DataError
from edgesolve.host.network import Network
from edgesolve.host.rows import Rows
from edgesolve.kernels.moments import Moments

BATCH_BYTES = 1 << 26  # of the largest activation in a batch
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Capture:
    """Of the rows of calibration frames against the original logits, and of one fold kept apart.

    `fit`, `held_out`: moments; `rows`, `logits` (n, …) float32 of held-out frames; `index` (n,) their frames.
    """

    fit: Moments
    held_out: Moments
    rows: np.ndarray
    logits: np.ndarray
    index: np.ndarray


def batch_size(network: Network) -> int:
    """Frames per pass such that the largest activation stays below 64 MiB; 1..256."""
    return max(1, min(256, BATCH_BYTES // largest_activation(network)))


def largest_activation(network: Network) -> int:
    """Bytes of the largest tensor that one frame makes in float32."""
    sizes = [1]
    with torch.no_grad():
        network.run(
            network.example, watch=lambda n, v, a: sizes.append(4 * v[0].numel() if v.ndim else 4)
        )
    return max(sizes)


def batches(x: np.ndarray, size: int) -> Iterator[Tensor]:
    for start in range(0, len(x), size):
        yield torch.from_numpy(np.ascontiguousarray(x[start : start + size]))


def activations(
    network: Network,
    cut: str,
    preprocess: Preprocess,
    x: np.ndarray,
    teacher: Network | None = None,
) -> tuple[Tensor, Tensor]:
    """z (n, …) at the cut and logits (n, c), those of `teacher` if given, for frames x (n, h, w, c)."""
    zs, outs = [], []
    with torch.no_grad():
        for z, logits in _pairs(network, cut, preprocess, x, teacher):
            zs.append(z)
            outs.append(logits)
    return torch.cat(zs), torch.cat(outs)


def _pairs(network, cut, preprocess, x, teacher=None) -> Iterator[tuple[Tensor, Tensor]]:
    at_cut: list[Tensor] = []

    def watch(node, value, args):
        if node.name == cut:
            at_cut.append(value)

    for frames in batches(x, batch_size(network)):
        inputs = preprocess(frames)
        if teacher is None:
            logits = network.run(inputs, watch=watch)
            z = at_cut.pop()
        else:
            z, logits = network.run(inputs, until=cut), teacher.run(inputs)
        if not torch.isfinite(logits).all() or not torch.isfinite(z).all():
            raise DataError(
                "the network's outputs hold NaN or inf on the calibration data; check --scale, --mean and --std."
            )
        yield z, logits


def capture(
    network: Network,
    cut: str,
    rows: Rows,
    preprocess: Preprocess,
    x: np.ndarray,
    held_out: np.ndarray,
    *,
    flip: bool = False,
    teacher: Network | None = None,
    progress: Progress = lambda done, total: None,
) -> Capture:
    """Stream every frame once (and once mirrored along its width, if `flip`) into moments.

    held_out (n,) bool: frames whose moments are kept apart; never mirrored. `teacher` gives the logits, if it is
    another network.
    """
    sums: list[Moments | None] = [None, None]
    kept_rows, kept_logits = [], []
    parts = [(x[held_out], 1, False), (x[~held_out], 0, False)]
    parts += [(x[~held_out], 0, True)] if flip else []
    total, done = sum(len(p[0]) for p in parts), 0
    with torch.no_grad():
        for frames, fold, mirrored in parts:
            frames = frames[:, :, ::-1] if mirrored else frames
            for z, logits in _pairs(network, cut, preprocess, frames, teacher):
                a = rows(z).numpy()
                m = Moments.of(a, logits.numpy())
                sums[fold] = m if sums[fold] is None else sums[fold] + m
                if fold == 1:
                    kept_rows.append(a)
                    kept_logits.append(logits.numpy())
                done += len(a)
                progress(done, total)
    return Capture(
        sums[0],
        sums[1],
        np.concatenate(kept_rows),
        np.concatenate(kept_logits),
        np.flatnonzero(held_out),
    )


def frame_statistics(
    network: Network, preprocess: Preprocess, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What each frame sends into each normalisation: mean and mean square per channel, (n, S) each."""
    means, squares = [], []
    with torch.no_grad():
        for frames in batches(x, batch_size(network)):
            m: dict[str, Tensor] = {}
            s: dict[str, Tensor] = {}

            def norm(site, y, m=m, s=s):
                spatial = list(range(2, y.ndim))
                m[site.node] = y.mean(spatial) if spatial else y
                s[site.node] = (y * y).mean(spatial) if spatial else y * y
                shape = [1, -1] + [1] * len(spatial)
                scale = site.scale()
                return y * scale.view(shape) + (site.beta - site.mean * scale).view(shape)

            network.run(preprocess(frames), norm=norm)
            order = [n.node for n in network.norms]
            means.append(torch.cat([m[k] for k in order], 1).double().numpy())
            squares.append(torch.cat([s[k] for k in order], 1).double().numpy())
    return np.concatenate(means), np.concatenate(squares)
