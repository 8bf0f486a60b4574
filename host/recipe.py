"""From a model and unlabelled frames to a checked bundle: the steps of `edgesolve build`, in order."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from edgesolve.host import bundle_writer, export, int8, stamp
from edgesolve.host import heads as head_files
from edgesolve.host.adaptable import (
    Backbone,
    Preprocess,
    Teacher,
    Upto,
    n_channels,
    nodes_until,
    with_virtual_norms,
)
from edgesolve.host.capture import batch_size, batches, frame_statistics, largest_activation
from edgesolve.host.checkpoint import Checkpoint, digest
from edgesolve.host.compose import Composed, compose
from edgesolve.host.decompose import DecomposeOptions, survey_network
from edgesolve.host.distill import Distilled, HeadOptions, distill
from edgesolve.host.errors import ModelError
from edgesolve.host.load import Data
from edgesolve.host.network import Cut, Network, trace
from edgesolve.host.place import Trial, choose_cut
from edgesolve.host.refine import RefineOptions
from edgesolve.host.shards import ALONE, Shards
from edgesolve.host.thresholds import calibrate

PARITY_FRAMES = 32
HELD_FRAMES = 512
"""By which a refit or fine-tuning of the decomposed network is judged."""
STATISTIC_FRAMES = 2048
STATISTIC_BYTES = 1 << 27
TEACHER_BYTES = 1 << 25  # of the largest activation in a teacher batch


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """`split` names the first module that is replaced; without it `target` picks one."""

    split: str | None = None
    target: tuple[str, float] = ("drop", 1.0)
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None
    backends: tuple[str, ...] = ("onnx", "litert")
    fixed_backbone: bool = False
    original: str | None = None
    head: HeadOptions = field(default_factory=HeadOptions)
    decompose: DecomposeOptions | None = None
    int8: str | None = None  # "add", or "only" without float backbones


@dataclass(frozen=True)
class Built:
    """What the steps made, in memory, before anything is written.

    `network`: the original; `small`: the decomposed one that the backbone is cut from, or the same.
    """

    network: Network
    small: Network
    composed: Composed | None
    preprocess: Preprocess
    data: Data
    distilled: Distilled
    files: dict[str, bytes]
    backends: dict[str, dict]
    statistics: dict[str, np.ndarray]
    drift: dict
    parity: dict[str, np.ndarray]
    reference: dict[str, np.ndarray]
    search: list[dict]
    original_onnx: bytes
    prefer: tuple[str, ...] = ()
    int8_report: list[dict] = field(default_factory=list)
    store: Checkpoint | None = None


class Log:
    """Progress to a `say(text)`; remembers the seconds that every step took."""

    def __init__(self, say):
        self.say, self.seconds, self._began = say, {}, time.perf_counter()

    def step(self, name: str) -> None:
        self.end()
        self._name, self._began = name, time.perf_counter()
        self.say(name)

    def end(self) -> None:
        if hasattr(self, "_name"):
            self.seconds[self._name] = round(time.perf_counter() - self._began, 2)

    def progress(self, done: int, total: int) -> None:
        if time.perf_counter() - self._began > 2.0:
            self.say(f"{self._name}: {done}/{total}", transient=True)


def build(
    model,
    data: Data,
    options: BuildOptions,
    log: Log,
    shards: Shards = ALONE,
    work: Path | None = None,
) -> Built | None:
    """Run every step; nothing is written but to the folder `work`, from which an interrupted build goes on.

    None in all processes but the first of several. Raises ModelError or DataError with one sentence.
    """
    log.step("trace the network")
    h, w, c = data.x.shape[1:]
    preprocess = _preprocess(data.x, options)
    network = trace(model, (c, h, w))
    sample = [preprocess(b) for b in batches(data.x[:512], batch_size(network))]
    network = with_virtual_norms(network, sample)
    if not network.norms:
        raise ModelError(
            "the network has no layer whose statistics could be re-estimated on a device."
        )
    held_out = np.zeros(len(data), bool)
    held_out[:: max(6, len(data) // 2048)] = True
    trial = Trial(network, preprocess, data.x, held_out, log)

    small, composed, search, store = network, None, [], None
    if options.decompose is None:
        log.step("choose what the head replaces")
        cut, search = choose_cut(trial, options)
    else:
        pick = np.flatnonzero(~held_out)
        pick = pick[
            np.linspace(0, len(pick) - 1, min(len(pick), options.decompose.frames)).astype(int)
        ]
        if work is not None:
            store = Checkpoint(work, _key(network, preprocess, data.x[pick], options.decompose))
        given = options.decompose
        frames, others = data.x[pick], data.x[held_out][:HELD_FRAMES]
        surveyed = survey_network(network, preprocess, frames, others, given, log, shards, store)
        composed = compose(trial, surveyed, options)
        if shards.rank:
            return None  # what follows is one process's work
        small, cut = composed.decomposed.network, composed.decomposed.cut
        small = _before(with_virtual_norms(small, sample), cut)

    log.step(f"distil the head behind {cut.name}")
    teacher = None if small is network else network
    found = distill(small, cut, preprocess, data.x, held_out, options.head, log.progress, teacher)

    log.step("calibrate the drift test")
    networks = (network,) if small is network else (small, network)
    channels = sum(n_channels(n) for n in networks)
    most = min(STATISTIC_FRAMES, max(128, STATISTIC_BYTES // (16 * channels)))
    spread = np.linspace(0, len(data) - 1, min(len(data), most)).astype(int)
    of_each = [frame_statistics(n, preprocess, data.x[spread]) for n in networks]
    means, squares = (np.concatenate(parts, axis=1) for parts in zip(*of_each, strict=True))
    predicted = _predictions(network, preprocess, data.x[spread])
    drift, ref_mean, ref_var = calibrate(means, squares, predicted, options.head.seed)

    parts = [_statistics(n) for n in networks]
    statistics = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    files, backends, original = _export(networks, cut, found, preprocess, data.x, options, log)
    prefer, rounded = (), []
    if options.int8:
        log.step("round to int8, and solve a head on integer rows")
        made = int8.add_int8(
            small,
            found,
            preprocess,
            data.x,
            data.y,
            backends,
            files,
            data.x[:PARITY_FRAMES],
            options.head,
            teacher=teacher,
            progress=log.progress,
        )
        backends, files, prefer = made.merged(backends, files, options.int8 == "only")
        rounded = made.report
    return Built(
        network=network,
        small=small,
        composed=composed,
        preprocess=preprocess,
        data=data,
        distilled=found,
        files=files,
        backends=backends,
        statistics=statistics,
        drift=drift,
        parity=_parity(networks, cut, found, preprocess, data.x, statistics),
        reference=_reference(found, ref_mean, ref_var),
        search=search,
        original_onnx=original,
        prefer=prefer,
        int8_report=rounded,
        store=store,
    )


def _key(network: Network, preprocess: Preprocess, x: np.ndarray, given: DecomposeOptions) -> str:
    """What a checkpoint belongs to: the traced network, the frames walked, and how layers are fitted.

    Not the target, nor what follows the fit: another one begins from the same survey.
    """
    graph = [str(node.format_node()) for node in network.nodes]
    weights = [v.numpy() for _, v in sorted(network.constants.items())]
    fitting = asdict(replace(given, slower=False, refine=RefineOptions()))
    return digest(version("edgesolve"), fitting, asdict(preprocess), graph, x, *weights)


def _preprocess(x: np.ndarray, options: BuildOptions) -> Preprocess:
    channels = x.shape[-1]
    scale = options.scale
    if scale is None:
        scale = 1.0 / 255.0 if x.dtype == np.uint8 else 1.0
    mean, std = options.mean or (0.0,) * channels, options.std or (1.0,) * channels
    mean, std = (v * channels if len(v) == 1 else v for v in (mean, std))
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ModelError(
            f"--mean and --std have {len(mean)} and {len(std)} values (std > 0), frames have {channels} channels."
        )
    return Preprocess(scale, tuple(mean), tuple(std))


def _predictions(network, preprocess, x) -> np.ndarray:
    with torch.no_grad():
        parts = [network.run(preprocess(b)).argmax(1) for b in batches(x, batch_size(network))]
    return torch.cat(parts).numpy()


def _statistics(network: Network) -> dict[str, np.ndarray]:
    """Every normalisation's parameters, concatenated; the fields of device/patch.py's Statistics."""
    from edgesolve.host.network import layer_parameters, source_layer

    parts: dict[str, list[np.ndarray]] = {
        k: [] for k in ("mean", "var", "gamma", "beta", "shift", "eps")
    }
    for norm in network.norms:
        bias = None
        if norm.layer is not None:
            bias = layer_parameters(network, source_layer(network, norm.layer))[1]
        parts["mean"].append(norm.mean.numpy())
        parts["var"].append(norm.var.numpy())
        parts["gamma"].append(norm.gamma.numpy())
        parts["beta"].append(norm.beta.numpy())
        parts["shift"].append(np.zeros(norm.channels) if bias is None else bias.numpy())
        parts["eps"].append(np.full(norm.channels, norm.eps))
    return {k: np.concatenate(v).astype(np.float32) for k, v in parts.items()}


def _pair(networks, cut, found, preprocess) -> tuple[Backbone, Teacher]:
    """The backbone, and the teacher around it; networks: (the backbone's, and the original if another)."""
    backbone = Backbone(networks[0], cut.node, found.rows, preprocess).eval()
    student = networks[0] if len(networks) > 1 else None
    teacher = Teacher(networks[-1], cut.node, found.rows, preprocess, student).eval()
    return backbone, teacher


def _before(network: Network, cut: Cut) -> Network:
    """Without the normalisations behind `cut`, which nothing of a backbone goes through."""
    inside = nodes_until(network, cut.node)
    return replace(network, norms=tuple(n for n in network.norms if n.node in inside))


def _export(networks, cut, found, preprocess, x, options, log):
    network = networks[-1]
    backbone, teacher = _pair(networks, cut, found, preprocess)
    channels = {k: [s.start, s.stop] for k, s in teacher.slices.items()}
    batch = int(2 ** np.floor(np.log2(max(4, TEACHER_BYTES // largest_activation(network)))))
    batch = min(32, batch)
    frames = torch.from_numpy(np.ascontiguousarray(x[:batch]))
    while len(frames) < batch:
        frames = torch.cat([frames, frames])[:batch]
    size = sum(n_channels(n) for n in networks)
    teacher_example = (
        frames,
        torch.full((batch,), 1.0 / batch),
        torch.tensor([0.5]),
        torch.zeros(size),
        torch.ones(size),
    )
    names = ("frames", "weight", "mix", "mean", "var")
    if options.fixed_backbone:
        backbone.sites = []
    true = stamp.stamped(backbone)
    files, backends = {}, {}
    try:
        for kind in options.backends:
            log.step(f"export to {'ONNX' if kind == 'onnx' else 'TFLite'}")
            suffix = {"onnx": "onnx", "litert": "tflite"}[kind]
            if kind == "onnx":
                model = export.to_onnx(backbone, (frames[:2],), ("frames",), free_batch=True)
                adaptable = export.to_onnx(teacher, teacher_example, names, free_batch=False)
            else:
                model = export.to_tflite(backbone, (frames[:1],))
                adaptable = export.to_tflite(teacher, teacher_example)
            model, table = stamp.locate_and_fill(model, backbone, true, channels)
            files[f"backbone.{suffix}"], files[f"teacher.{suffix}"] = model, adaptable
            backends[kind] = {
                "backbone": f"backbone.{suffix}",
                "teacher": f"teacher.{suffix}",
                "batch": None if kind == "onnx" else 1,
                "teacher_batch": batch,
                "patch": table,
            }
    finally:
        stamp.restore(backbone, true)
    log.step("export the original network to compare with")
    original = export.to_onnx(
        Upto(network, preprocess), (frames[:2],), ("frames",), free_batch=True
    )
    return files, backends, original


def _parity(networks, cut, found, preprocess, x, statistics) -> dict[str, np.ndarray]:
    """Frames and what torch computed from them: as shipped, re-normalised, and the teacher's half-way mix."""
    frames = torch.from_numpy(np.ascontiguousarray(x[:PARITY_FRAMES]))
    backbone, teacher = _pair(networks, cut, found, preprocess)
    weights, intercept = found.solution.weights, found.solution.intercept
    generator = np.random.default_rng(7)
    mean, var = statistics["mean"], statistics["var"]
    size = len(mean)
    moved_mean = mean + 0.1 * np.sqrt(var) * generator.normal(size=size).astype(np.float32)
    moved_var = var * np.exp(0.1 * generator.normal(size=size)).astype(np.float32)
    share = torch.full((len(frames),), 1.0 / len(frames))
    with torch.no_grad():
        rows = backbone(frames).numpy()
        plain = [torch.from_numpy(a) for a in (mean, var)]
        moved = [torch.from_numpy(a) for a in (moved_mean, moved_var)]
        logits, _, _, _ = teacher(frames, share, torch.zeros(1), *plain)
        adapted_logits, adapted_rows, _, _ = teacher(frames, share, torch.zeros(1), *moved)
        _, _, window_mean, window_var = teacher(
            frames[:4], torch.full((4,), 0.25), torch.full((1,), 0.5), *plain
        )
    return {
        "frames": frames.numpy(),
        "rows": rows,
        "logits": (rows @ weights + intercept).astype(np.float32),
        "teacher_logits": logits.numpy(),
        "mean": moved_mean,
        "var": moved_var,
        "adapted_rows": adapted_rows.numpy(),
        "adapted_logits": adapted_logits.numpy(),
        "window_mean": window_mean.numpy(),
        "window_var": window_var.numpy(),
    }


def _reference(found: Distilled, ref_mean, ref_var) -> dict[str, np.ndarray]:
    """What the device compares with: source moments, window reference, anchors, class prototypes."""
    return {
        **head_files.source_arrays(found),
        "window_mean": ref_mean.astype(np.float32),
        "window_var": ref_var.astype(np.float32),
    }


def write(
    built: Built, folder: str | Path, options: BuildOptions, log: Log, provenance: dict
) -> dict:
    """Write the bundle beside `folder`, check it with `edgesolve verify`, then rename it; returns the report."""
    report = bundle_writer.write(built, Path(folder), asdict(options), log, provenance)
    if built.store is not None:
        built.store.discard()
    return report
