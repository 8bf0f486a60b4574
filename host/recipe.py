"""From a model and unlabelled frames to a checked bundle: the steps of `edgesolve build`, in order."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from edgesolve.host import bundle_writer, export, int8, stamp
from edgesolve.host import heads as head_files
from edgesolve.host.adaptable import (
    Backbone,
    Preprocess,
    Teacher,
    n_channels,
    nodes_until,
    with_virtual_norms,
)
from edgesolve.host.capture import batch_size, batches, frame_statistics, largest_activation
from edgesolve.host.checkpoint import Checkpoint
from edgesolve.host.clock import Clock
from edgesolve.host.compose import Composed, frontier, to_drop, to_latency, to_size, try_heads
from edgesolve.host.decompose import DecomposeOptions, decompose, survey_network, with_seconds
from edgesolve.host.distill import Distilled, HeadOptions, distill
from edgesolve.host.errors import ModelError
from edgesolve.host.gates import affordable
from edgesolve.host.load import Data
from edgesolve.host.network import Cut, Network, costs, cuts, trace
from edgesolve.host.shards import ALONE, Shards
from edgesolve.host.thresholds import calibrate

PARITY_FRAMES = 32
STATISTIC_FRAMES = 2048
STATISTIC_BYTES = 1 << 27
SEARCH_FRAMES = 3072
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
    store: Checkpoint | None = None,
) -> Built:
    """Run every step; nothing is written but to `store`. Raises ModelError or DataError with one sentence."""
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

    small, composed, search = network, None, []
    if options.decompose is None:
        log.step("choose what the head replaces")
        cut, search = choose_cut(network, preprocess, data, held_out, options, log)
    else:
        composed = compose(network, preprocess, data, held_out, options, log, shards, store)
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
    )


def compose(network, preprocess, data, held_out, options, log, shards, store) -> Composed:
    """The head's place and the decomposition before it that together meet the target."""
    given, (kind, value) = options.decompose, options.target
    pick = np.flatnonzero(~held_out)
    pick = pick[np.linspace(0, len(pick) - 1, min(len(pick), given.frames)).astype(int)]
    surveyed = survey_network(network, preprocess, data.x[pick], given, log, shards, store)
    if kind == "latency-ms" or not given.slower:
        surveyed = with_seconds(surveyed, log)

    def distil(net: Network, cut: Cut, head: HeadOptions) -> Distilled:
        few = np.linspace(0, len(data) - 1, min(len(data), SEARCH_FRAMES)).astype(int)
        x, held = data.x[few], held_out[few]
        held = held if held.sum() >= 32 else np.arange(len(x)) % 6 == 0
        teacher = None if net is network else network
        return distill(net, cut, preprocess, x, held, head, log.progress, teacher)

    log.step("try places for the head")
    places = [named_cut(network, options.split)] if options.split else heads(network, options.head)
    tried_heads = try_heads(network, places, distil, options.head, log)
    tried: list[dict] = []
    if kind in ("params", "macs"):
        head, plan = to_size(surveyed, tried_heads, kind, value)
        got = decompose(surveyed, head.cut, plan, log)
    elif kind == "latency-ms":
        clock = Clock(network, preprocess, data.x[:1])
        head, plan, got, tried = to_latency(surveyed, tried_heads, value, clock, log)
    else:
        head, plan, got, tried = to_drop(surveyed, tried_heads, value, distil, options.head, log)
    return Composed(head, plan, got, frontier(surveyed, tried_heads), tuple(tried))


def named_cut(network: Network, name: str) -> Cut:
    """The place for the head that --split names."""
    found = cuts(network)
    for cut in found:
        if cut.name == name or cut.name.startswith(name + "."):
            return cut
    names = ", ".join(c.name for c in found)
    raise ModelError(f"--split {name}: no such place. The network splits at: {names}.")


def heads(network: Network, options: HeadOptions) -> list[Cut]:
    """Places behind which a head saves parameters and multiply-adds, shallow first."""
    macs = sum(m for _, m in costs(network).values())
    classes = network.run(network.example).shape[1]
    candidates = [
        c
        for c in cuts(network)
        if c.macs_after < 0.9 * macs
        and affordable(network, c, classes, options.gates, options.ramps)
    ]
    if not candidates:
        raise ModelError(
            "no split saves parameters and multiply-adds with a convex head; name one with --split."
        )
    return candidates


def choose_cut(network, preprocess, data, held_out, options, log) -> tuple[Cut, list[dict]]:
    """The named split, or the cheapest whose held-out agreement (or size) meets the target."""
    if options.split is not None:
        return named_cut(network, options.split), []
    total = costs(network)
    macs, params = sum(m for _, m in total.values()), sum(p for p, _ in total.values())
    kind, value = options.target
    candidates = heads(network, options.head)
    if kind in ("params", "macs"):
        left = [
            1 - c.params_after / params if kind == "params" else 1 - c.macs_after / macs
            for c in candidates
        ]
        fits = [c for c, ratio in zip(candidates, left, strict=True) if ratio <= value]
        if not fits:
            raise ModelError(
                f"--target {kind}={value}: the smallest backbone here keeps {min(left):.2f} of the {kind}."
            )
        return fits[-1], []
    return _search_drop(candidates, value, network, preprocess, data, held_out, options, log)


def _search_drop(candidates, drop, network, preprocess, data, held_out, options, log):
    """Bisect over the candidates, cheapest first; each is measured on held-out rows."""
    pick = np.linspace(0, len(data) - 1, min(len(data), SEARCH_FRAMES)).astype(int)
    x, held = data.x[pick], held_out[pick]
    if held.sum() < 32:
        held = np.arange(len(x)) % 6 == 0
    measured: dict[int, float] = {}

    def loss(index: int) -> float:
        if index not in measured:
            log.say(f"trying {candidates[index].name}", transient=True)
            quick = replace(options.head, flip=False)
            got = distill(network, candidates[index], preprocess, x, held, quick, log.progress)
            measured[index] = 100.0 * (1.0 - got.agreement)
        return measured[index]

    low, high = 0, len(candidates) - 1  # high: dearest, hence the surest
    best = None
    while low <= high:
        middle = (low + high) // 2
        if loss(middle) <= drop:
            best, high = middle, middle - 1
        else:
            low = middle + 1
    table = [
        {
            "split": candidates[i].name,
            "params_replaced": candidates[i].params_after,
            "agreement_loss": round(v, 3),
        }
        for i, v in sorted(measured.items())
    ]
    if best is None:
        nearest = min(measured, key=measured.get)
        raise ModelError(
            f"--target drop={drop:g}: of the splits tried that save anything, the closest loses "
            f"{measured[nearest]:.2f} points of held-out agreement, --split {candidates[nearest].name}. "
            "Give more calibration frames, or a larger drop."
        )
    return candidates[best], table


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
        _Whole(network, preprocess), (frames[:2],), ("frames",), free_batch=True
    )
    return files, backends, original


class _Whole(torch.nn.Module):
    """The unchanged network behind the bundle's preprocessing."""

    def __init__(self, network: Network, preprocess: Preprocess):
        super().__init__()
        self.network, self.preprocess = network, preprocess

    def forward(self, frames):
        return self.network.run(self.preprocess(frames))


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
    return bundle_writer.write(built, Path(folder), asdict(options), log, provenance)
