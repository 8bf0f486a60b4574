"""int8 backends of a bundle: weights rounded where it hurts least, integer files, a head solved on their rows.

Everything that a runtime rounds is in the backbone. The head that follows is solved, in float, on what the
integer kernels themselves give for the calibration frames, so it makes up for what rounding did on average.
"""

from __future__ import annotations

import io
import time
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.numpy import save
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from edgesolve.device.graph import Graph, open_graph
from edgesolve.host import export
from edgesolve.host.adaptable import Preprocess, nodes_until
from edgesolve.host.capture import Capture, Progress, batch_size, batches
from edgesolve.host.distill import Distilled, HeadOptions, conclude
from edgesolve.host.heads import halved, head_arrays, source_arrays
from edgesolve.host.metric import Metric
from edgesolve.host.network import Network
from edgesolve.host.quantize_onnx import to_int8_onnx
from edgesolve.host.quantize_tflite import to_int8_tflite
from edgesolve.host.rounding import (
    LEVELS,
    PAIRWISE_LEVELS,
    corrected_bias,
    grid,
    round_nearest,
    round_with_feedback,
)
from edgesolve.host.rows import Rows
from edgesolve.host.sites import Site, folded_run, sites
from edgesolve.host.survey import MOMENT_BYTES, layer_moments, moment_bytes
from edgesolve.host.walk import Walk
from edgesolve.kernels.moments import Moments

STEPS = {"onnx": PAIRWISE_LEVELS, "litert": LEVELS}
"""Largest integer of a weight by runtime."""
MOMENT_FRAMES = 256
RANGE_FRAMES = 256
DROP = 0.01
"""Held-out agreement that int8 may lose against float and still be used by default."""
SLOWER = 1.02
BATCH = 32
ROUNDS = 60

Layers = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Int8:
    """What int8 adds to a bundle. `backends`: manifest entries, each with a head, moments and parity of its own.

    `prefer`: names of backends, one a runtime, in the order in which a device tries them. `report`: one row per
    entry: bytes, agreement and accuracy held out, milliseconds here, and why it is used by default or not.
    """

    backends: dict[str, dict]
    files: dict[str, bytes]
    prefer: tuple[str, ...]
    report: list[dict]

    def merged(
        self, backends: dict[str, dict], files: dict[str, bytes], only: bool
    ) -> tuple[dict[str, dict], dict[str, bytes], tuple[str, ...]]:
        """(backends, files, prefer) of the whole bundle; `only`: without the float backbones."""
        if not only:
            return {**backends, **self.backends}, {**files, **self.files}, self.prefer
        floats = {entry["backbone"] for entry in backends.values()}
        rest = {name: data for name, data in files.items() if name not in floats}
        return self.backends, {**rest, **self.files}, tuple(self.backends)


def add_int8(
    network: Network,
    found: Distilled,
    preprocess: Preprocess,
    x: np.ndarray,
    y: np.ndarray | None,
    backends: dict[str, dict],
    files: dict[str, bytes],
    parity_frames: np.ndarray,
    options: HeadOptions,
    *,
    teacher: Network | None = None,
    progress: Progress = lambda done, total: None,
) -> Int8:
    """int8 forms of the float `backends`, whose files are in `files`; `found` is the float head.

    x (n, h, w, c): calibration frames, y (n,) their labels or None, only reported on. `teacher` gives the logits,
    if it is another network than the one that has the cut. Raises ModelError where a quantiser refuses.
    """
    rounded = rounded_layers(
        network, found.cut.node, preprocess, x, {STEPS[k] for k in backends}, progress
    )
    logits = _logits(teacher or network, preprocess, x)
    turned = _logits(teacher or network, preprocess, x[:, :, ::-1]) if options.flip else None
    entries, made, report, prefer = {}, {}, [], []
    for kind, entry in backends.items():
        module = Rounded(network, found.cut.node, found.rows, preprocess, rounded[STEPS[kind]])
        backbone = integer_file(kind, module, x)
        graph = open_graph(backbone, backend=kind)
        captured = _capture(graph, x, logits, turned, found.capture.index, progress)
        head = conclude(found.cut, found.rows, found.gate_source, captured, options)
        name = f"{kind}-int8"
        entries[name], own = _entry(name, kind, entry, head, graph, parity_frames)
        own[entries[name]["backbone"]] = backbone
        made |= own
        row = _row(name, own, graph, kind, entry, files, found, head, x, y)
        report.append(row)
        prefer.append(name if row["preferred"] else kind)
    return Int8(entries, made, tuple(prefer), report)


# -- weights and files -------------------------------------------------------------------------


def rounded_layers(
    network: Network,
    cut: str,
    preprocess: Preprocess,
    x: np.ndarray,
    levels: Collection[int],
    progress: Progress = lambda done, total: None,
) -> dict[int, Layers]:
    """Weight and bias of each layer up to `cut`, on the grid of each of `levels`, normalisation folded in."""
    pick = np.linspace(0, len(x) - 1, min(len(x), MOMENT_FRAMES)).astype(int)
    every, _ = sites(network)
    walk = Walk(network, preprocess, x[pick], every)
    inside = nodes_until(network, cut)
    here = [site for site in every if site.node in inside]
    made: dict[int, Layers] = {level: {} for level in sorted(levels)}
    with threadpool_limits(1, "blas"):
        for i, site in enumerate(here):
            metrics = _metrics(walk, site)
            for level, layers in made.items():
                layers[site.node] = _rounded(site, metrics, level)
            progress(i + 1, len(here))
    return made


def _metrics(walk: Walk, site: Site) -> list[Metric] | None:
    """One per group; None where the moments would be too large."""
    if moment_bytes(site) > MOMENT_BYTES:
        return None
    return [Metric.of(m) for m in layer_moments(walk, site, seed=0)]


def _rounded(site: Site, metrics: list[Metric] | None, levels: int) -> tuple[Tensor, Tensor]:
    scales = grid(site.weight, levels)
    if metrics is None:
        weight, bias = round_nearest(site.weight, scales), site.bias
    else:
        parts, steps = (np.split(a, site.groups) for a in (site.weight, scales))
        rounded = [
            round_with_feedback(metric, part, step)
            for metric, part, step in zip(metrics, parts, steps, strict=True)
        ]
        weight = np.concatenate(rounded)
        bias = np.concatenate(
            [
                corrected_bias(metric, part.reshape(len(part), -1))
                for metric, part in zip(metrics, rounded, strict=True)
            ]
        )
    shape = site.tensors()[0].shape
    return torch.from_numpy(weight).float().reshape(shape), torch.from_numpy(bias).float()


class Rounded(nn.Module):
    """frames (n, h, w, c) -> rows (n, D): the backbone with the given weight and bias in place of its layers."""

    def __init__(
        self, network: Network, cut: str, rows: Rows, preprocess: Preprocess, layers: Layers
    ):
        super().__init__()
        self.network, self.cut, self.rows, self.preprocess = network, cut, rows, preprocess
        folded, self.norm = folded_run(network, sites(network)[0])
        self.layers = folded | layers

    def forward(self, frames: Tensor) -> Tensor:
        x = self.preprocess(frames)
        return self.rows(self.network.run(x, until=self.cut, norm=self.norm, layers=self.layers))


def integer_file(kind: str, module: nn.Module, x: np.ndarray) -> bytes:
    """`module` as an int8 ONNX ("onnx") or TFLite ("litert") file, ranges from frames x (n, h, w, c)."""
    pick = np.linspace(0, len(x) - 1, min(len(x), RANGE_FRAMES)).astype(int)
    frames = np.ascontiguousarray(x[pick])
    module = module.eval()
    example = torch.from_numpy(frames[:2])
    if kind == "onnx":
        model = export.to_onnx(module, (example,), ("frames",), free_batch=True)
        return to_int8_onnx(model, frames)
    return to_int8_tflite(export.to_tflite(module, (example[:1],)), frames)


# -- heads -------------------------------------------------------------------------------------


def integer_rows(graph: Graph, frames: np.ndarray) -> np.ndarray:
    """Rows (n, D) of frames (n, h, w, c) from an opened backbone."""
    size = graph.inputs[0][1][0] or BATCH
    starts = range(0, len(frames), size)
    return np.concatenate([graph(np.ascontiguousarray(frames[i : i + size]))[0] for i in starts])


def _logits(network: Network, preprocess: Preprocess, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        parts = [network.run(preprocess(b)).numpy() for b in batches(x, batch_size(network))]
    return np.concatenate(parts)


def _capture(graph, x, logits, turned, index, progress) -> Capture:
    """The integer rows of every frame in moments; frames `index` held out; `turned`: logits of mirrored frames."""
    rest = np.setdiff1d(np.arange(len(x)), index)
    parts = [(rest, x, logits), (rest, x[:, :, ::-1], turned)]
    fit, done = None, 0
    for pick, frames, targets in parts if turned is not None else parts[:1]:
        for start in range(0, len(pick), 8 * BATCH):
            here = pick[start : start + 8 * BATCH]
            found = Moments.of(integer_rows(graph, frames[here]), targets[here])
            fit = found if fit is None else fit + found
            done += len(here)
            progress(done, (1 + (turned is not None)) * len(rest))
    rows = integer_rows(graph, x[index])
    return Capture(fit, Moments.of(rows, logits[index]), rows, logits[index], index)


def _entry(name, kind, entry, head: Distilled, graph: Graph, frames) -> tuple[dict, dict]:
    """The manifest's entry, and the files that belong to this backend's rows."""
    rows, parity = integer_rows(graph, frames), io.BytesIO()
    arrays = halved(head_arrays(head), head.capture.rows)
    logits = rows @ arrays["weights"].astype(np.float32) + arrays["intercept"]
    np.savez(parity, rows=rows, logits=logits)
    suffix = {"onnx": "onnx", "litert": "tflite"}[kind]
    made = {
        "runtime": kind,
        "precision": "int8",
        "backbone": f"backbone.int8.{suffix}",
        "head": f"head.{name}.safetensors",
        "reference": f"reference.{name}.safetensors",
        "parity": f"parity.{name}.npz",
        "ridge": head.ridge,
        "patch": [],
        **{key: entry[key] for key in ("teacher", "batch", "teacher_batch")},
    }
    files = {
        made["head"]: save(arrays),
        made["reference"]: save(source_arrays(head)),
        made["parity"]: parity.getvalue(),
    }
    return made, files


# -- what the build says about it --------------------------------------------------------------


def _row(name, own, graph, kind, entry, files, found, head, x, y) -> dict:
    frame = np.ascontiguousarray(x[:1])
    before = open_graph(files[entry["backbone"]], backend=kind)
    ours, theirs = _milliseconds([graph, before], frame)
    lost = found.agreement - head.agreement
    preferred = lost <= DROP and ours <= SLOWER * theirs
    if lost > DROP:
        reason = f"no: {100 * lost:.2f} points of agreement lost, {100 * DROP:g} allowed"
    elif not preferred:
        reason = "no: slower than float on this machine"
    else:
        reason = "yes: no slower than float, and as accurate"
    files_of = [n for n in own if n.startswith(("backbone.", "head."))]
    answers = head.held_out_logits.argmax(1)
    return {
        "backend": name,
        "bytes": sum(len(own[n]) for n in files_of),
        "float_bytes": len(files[entry["backbone"]]) + len(save(head_arrays(head))),
        "accuracy": None if y is None else float((answers == y[head.capture.index]).mean()),
        "agreement": head.agreement,
        "float_agreement": found.agreement,
        "milliseconds": round(ours, 3),
        "float_milliseconds": round(theirs, 3),
        "preferred": preferred,
        "reason": reason,
    }


def _milliseconds(graphs: list[Graph], frame: np.ndarray) -> list[float]:
    """Median time of one frame through each, one thread, in turns."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(ROUNDS):
        for graph, mine in zip(graphs, times, strict=True):
            began = time.perf_counter()
            graph(frame)
            mine.append(1e3 * (time.perf_counter() - began))
    return [float(np.median(mine[ROUNDS // 6 :])) for mine in times]
