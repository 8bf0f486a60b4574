"""The original and the compressed network over the same frames, moved forward together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from edgesolve.host.adaptable import Preprocess
from edgesolve.host.capture import batch_size
from edgesolve.host.errors import DataError
from edgesolve.host.network import Layer, Network
from edgesolve.host.shards import ALONE, Shards
from edgesolve.host.sites import Site, folded_run

CACHE_BYTES = 1 << 29
"""Live activations are kept where those of all frames fit; elsewhere a step starts again from the last such place."""
BATCH = 64
"""Frames in a batch, if the network's activations allow it."""


@dataclass
class State:
    """Live outputs of one batch in the original (`teacher`) and the compressed network (`student`)."""

    teacher: dict[str, object]
    student: dict[str, object]
    at: tuple[int, int] = (0, 0)


@dataclass
class Walk:
    """Frames x (n, h, w, c) on their way through both networks, batch by batch; of several processes each
    takes every `shards.count`-th batch.

    `layers[node]` is what the compressed network has in a layer's place; set it before walking past it.
    Live activations are kept at the last call site where those of all frames fit into `bound` bytes.
    """

    network: Network
    preprocess: Preprocess
    x: np.ndarray
    found: list[Site]
    layers: dict[str, Layer] = field(default_factory=dict)
    shards: Shards = ALONE
    bound: int = CACHE_BYTES

    def __post_init__(self):
        self.original, self.norm = folded_run(self.network, self.found)
        self.size = min(BATCH, batch_size(self.network))
        if self.n_batches < self.shards.count:
            raise DataError(
                f"{len(self.x)} frames make {self.n_batches} batches of {self.size}, fewer than the "
                f"{self.shards.count} processes. Give more frames, or start fewer processes."
            )
        self.live = live_bytes(self.network)
        self.kept: dict[int, State] = {}

    @property
    def n_batches(self) -> int:
        return -(-len(self.x) // self.size)

    @property
    def mine(self) -> range:
        """Numbers of the batches that this process takes."""
        return range(self.shards.rank, self.n_batches, self.shards.count)

    def before(self, node: str) -> Iterator[tuple[int, State]]:
        """(number, state) of each batch, the teacher past `node` and the student just before it.

        Quick where call sites move forward; a step back starts from the frames again.
        """
        index = self.network.index(node)
        fits = 2 * self.live[index] * len(self.x) <= self.bound * self.shards.count
        for k in self.mine:
            state = self._at(k, index)
            if fits:
                self.kept[k] = State(dict(state.teacher), dict(state.student), state.at)
            yield k, state

    def finish(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (n, c) of every batch in the original and in the compressed network."""
        stop = len(self.network.nodes) - 1
        for k in self.mine:
            state = self._at(k, stop)
            yield tuple(self.network.result(v) for v in (state.teacher, state.student))

    def _at(self, k: int, index: int) -> State:
        """Batch k at call site `index`, from where it was kept; a state of its own."""
        kept = self.kept.get(k)
        if kept is None or kept.at[1] > index:
            frames = np.ascontiguousarray(self.x[k * self.size : (k + 1) * self.size])
            x = self.preprocess(torch.from_numpy(frames))
            kept = State({self.network.input: x}, {self.network.input: x})
        state = State(dict(kept.teacher), dict(kept.student), kept.at)
        self._advance(state, index)
        return state

    def _advance(self, state: State, index: int) -> None:
        student = {**self.original, **self.layers}
        with torch.no_grad():
            for values, start, stop, layers in (
                (
                    state.teacher,
                    state.at[0],
                    min(index + 1, len(self.network.nodes)),
                    self.original,
                ),
                (state.student, state.at[1], index, student),
            ):
                self.network.advance(values, start, stop, norm=self.norm, layers=layers)
        state.at = (index + 1, index)


def live_bytes(network: Network) -> list[int]:
    """Bytes of live float32 outputs that one frame has before each call site."""
    values: dict[str, object] = {network.input: network.example}
    constants = {n.name for n in network.nodes if n.op == "get_attr"}
    found = []
    with torch.no_grad():
        for i in range(len(network.nodes)):
            live = (v for k, v in values.items() if isinstance(v, Tensor) and k not in constants)
            found.append(4 * sum(v[0].numel() for v in live if v.ndim))
            network.advance(values, i, i + 1)
    return found
