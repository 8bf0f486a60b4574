"""What a network costs in its files: milliseconds on this machine, or bytes; of a layer's forms and of the whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from edgesolve.device.graph import open_graph
from edgesolve.host.adaptable import Upto
from edgesolve.host.decompose import Decomposed, Surveyed
from edgesolve.host.export import to_onnx
from edgesolve.host.latency import alike, form
from edgesolve.host.layer_file import blank, to_int8_onnx
from edgesolve.host.layer_file import to_onnx as layer_to_onnx
from edgesolve.host.network import Cut
from edgesolve.host.plan import Candidate, dense_candidate
from edgesolve.host.quantize_onnx import to_int8_onnx as quantised
from edgesolve.host.rows import Rows
from edgesolve.host.sites import Site

RUNS = 200
MOST_S = 4.0
RANGE_FRAMES = 8
"""Frames that ranges are taken from: an int8 file's size and time don't depend on them."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A head behind `cut` that is solved on what `rows` gives: what it stores, of it what stays in float as `solved`,
    what it multiplies, and KL(original || with the head), measured."""

    cut: Cut
    rows: Rows
    params: int
    macs: int
    solved: int
    divergence: float


@dataclass(frozen=True)
class Ruler:
    """An additive cost of `unit`: per layer and form `table[site.node][form]`, scaled to what the `whole` has.

    `reference`: the original network's cost in float; `measure(decomposed)`: that of a file up to its cut;
    `of_head(head)`: an estimate.
    """

    unit: str
    reference: float
    table: Mapping[str, Mapping[tuple, float]]
    measure: Callable[[Decomposed], float]
    of_head: Callable[[Head], float]

    def __call__(self, site: Site, candidate: Candidate) -> float:
        return self.table[site.node][form(candidate)]


def milliseconds(surveyed: Surveyed, frames: np.ndarray, int8: bool) -> Ruler:
    """Medians of one frame, one thread; of several processes the first one's clock counts.

    Layers' own times are scaled so that, all dense, they sum to the whole network's.
    """
    took = {s.site.node: surveyed.seconds[s.site.node] for s in surveyed.surveys}
    dense = {s.site.node: took[s.site.node][dense_candidate(s.site)] for s in surveyed.surveys}

    def measure(decomposed: Decomposed | None, int8: bool = int8) -> float:
        clocked = _clocked(network_file(surveyed, frames, int8, decomposed), frames[:1])
        return 1e3 * float(surveyed.shards.first(clocked))

    whole = measure(None)
    scale = whole / sum(dense.values())
    table = {node: {form(c): scale * t for c, t in own.items()} for node, own in took.items()}

    @cache
    def of_head(head: Head) -> float:
        z = torch.rand(2, *head.cut.shape)
        clocked = _clocked(to_onnx(head.rows, (z,), ("z",), free_batch=True), z[:1].numpy())
        return 1e3 * float(surveyed.shards.first(clocked))

    reference = measure(None, False) if int8 else whole
    return Ruler("ms", reference, table, measure, of_head)


def file_bytes(surveyed: Surveyed, frames: np.ndarray, int8: bool) -> Ruler:
    """Bytes of the ONNX file. What a file holds beside its layers is shared out evenly among their factors."""
    write = to_int8_onnx if int8 else layer_to_onnx
    table: dict[str, dict[tuple, float]] = {}
    known: dict[tuple, tuple[int, int]] = {}
    for s in surveyed.surveys:
        for c in (dense_candidate(s.site), *s.candidates):
            key = alike(s.site), form(c)
            if key not in known:
                chain = blank(s.site, c)
                known[key] = len(write(s.site, chain)), len(chain.factors)

    def measure(decomposed: Decomposed | None, int8: bool = int8) -> float:
        return float(len(network_file(surveyed, frames, int8, decomposed)))

    dense = sum(known[alike(s.site), ("dense", ())][0] for s in surveyed.surveys)
    whole = measure(None)
    rest = (whole - dense) / len(surveyed.surveys)
    for s in surveyed.surveys:
        own = {
            form(c): known[alike(s.site), form(c)] for c in (dense_candidate(s.site), *s.candidates)
        }
        table[s.site.node] = {f: size + rest * factors for f, (size, factors) in own.items()}

    def of_head(head: Head) -> float:
        solved, gates = (2.0, 1.0) if int8 else (4.0, 4.0)
        return solved * head.solved + gates * (head.params - head.solved)

    reference = measure(None, False) if int8 else whole
    return Ruler("bytes", reference, table, measure, of_head)


def network_file(
    surveyed: Surveyed, frames: np.ndarray, int8: bool, decomposed: Decomposed | None = None
) -> bytes:
    """The whole original, or `decomposed` up to its cut, as ONNX; frames (n, h, w, c) give the int8 ranges."""
    module = Upto(surveyed.network, surveyed.preprocess)
    if decomposed is not None:
        module = Upto(decomposed.network, surveyed.preprocess, decomposed.cut.node)
    frames = np.ascontiguousarray(frames[:RANGE_FRAMES])
    model = to_onnx(module.eval(), (torch.from_numpy(frames[:2]),), ("frames",), free_batch=True)
    return quantised(model, frames) if int8 else model


def _clocked(model: bytes, frame: np.ndarray) -> float:
    graph, took, began = open_graph(model, backend="onnx"), [], time.perf_counter()
    while len(took) < RUNS and time.perf_counter() - began < MOST_S:
        start = time.perf_counter()
        graph(frame)
        took.append(time.perf_counter() - start)
    return float(np.median(took))
