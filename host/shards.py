"""Several processes, each with its own share of the calibration frames: sums are merged by addition.

Under `torchrun` every process walks its own frames; moments are added up before anything is solved, so that all
of them solve the same programs and come to the same network. Alone, nothing happens.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch

from edgesolve.kernels.moments import Moments


@dataclass(frozen=True, slots=True)
class Shards:
    """Process `rank` of `count`."""

    rank: int = 0
    count: int = 1

    def moments(self, m: Moments) -> Moments:
        """The sum over processes, the same on each."""
        if self.count == 1:
            return m
        sxx, stx, sx, st, rest = self.arrays(m.sxx, m.stx, m.sx, m.st, np.array([m.n, m.stt]))
        return Moments(float(rest[0]), sx, sxx, stx, st, float(rest[1]))

    def arrays(self, *parts: np.ndarray | float) -> list[np.ndarray]:
        """Each array's sum over processes, float64, in one message."""
        arrays = [np.asarray(p, np.float64) for p in parts]
        if self.count == 1:
            return arrays
        flat = torch.from_numpy(np.concatenate([a.ravel() for a in arrays]))
        cuda = torch.distributed.get_backend() == "nccl"
        flat = flat.cuda() if cuda else flat
        torch.distributed.all_reduce(flat)
        sizes = np.cumsum([a.size for a in arrays])[:-1]
        found = np.split(flat.cpu().numpy(), sizes)
        return [f.reshape(a.shape) for f, a in zip(found, arrays, strict=True)]

    def first(self, values: np.ndarray | float) -> np.ndarray:
        """What process 0 has: for values that differ between processes, such as seconds."""
        return self.arrays(np.asarray(values, np.float64) * (self.rank == 0))[0]

    def numbers(self, *parts: float) -> list[float]:
        return [float(a) for a in self.arrays(*parts)]


ALONE = Shards()


def join() -> Shards:
    """The shard of this process as torchrun says it in the environment; ALONE without torchrun."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend)
    return Shards(torch.distributed.get_rank(), count)


def leave() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
