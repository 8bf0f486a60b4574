"""What each form of one network costs and gives: bytes on disk, multiply-adds, latency, accuracy, side by side.

    python benchmarks/bench_artefacts.py                          ResNet-20
    python benchmarks/bench_artefacts.py --network resnet56
    python benchmarks/bench_artefacts.py --bundle r20.bundle      also its ONNX backends: head, head + int8, ...
    python benchmarks/bench_artefacts.py --quick                  few frames, to see that it runs

The five artefacts of Saxena et al. (arXiv 2407.15904): dynamic-range, fp16, full int8, structured and unstructured
pruning, without labels or fine-tuning; and combinations. Every file is an ONNX that takes uint8 frames; latency is of
one frame on one thread, all files in turns. To OUT/artefacts.json and .md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import compression_cases
import numpy as np
import torch
from environment import ROOT, environment, say
from figures import aligned, keep, plain, plain_rows, text
from torch import nn

from edgesolve.device.bundle import open_bundle
from edgesolve.device.graph import open_graph
from edgesolve.device.runtime import open_runtime
from edgesolve.host.alps import alps
from edgesolve.host.export import to_onnx
from edgesolve.host.int8 import integer_file, rounded_layers
from edgesolve.host.metric import Metric
from edgesolve.host.prune import NofM, Pattern, PerLayer, Pruned
from edgesolve.host.prune_channels import remove_channels
from edgesolve.host.quantize_onnx import to_dynamic_onnx, to_fp16_onnx, to_int8_onnx
from edgesolve.host.rounding import PAIRWISE_LEVELS
from edgesolve.host.splice import Compressed, Dense
from edgesolve.host.survey import layer_moments

BATCH = 32


@dataclass(frozen=True)
class Artefact:
    """`run`: frames -> logits. `sparse`: bytes if zeros weren't stored."""

    name: str
    bytes: int
    macs: float
    run: Callable[[np.ndarray], np.ndarray]
    sparse: int | None = None


class Framed(nn.Module):
    """The network behind its preprocessing."""

    def __init__(self, case, module: nn.Module):
        super().__init__()
        self.preprocess, self.module = case.preprocess, module

    def forward(self, frames):
        return self.module(self.preprocess(frames))


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    env, began = environment(1), time.perf_counter()
    depth, n_test = int(args.network.removeprefix("resnet")), 300 if args.quick else args.test
    case = compression_cases.resnet(depth, 128 if args.quick else 1024, 256, n_test)
    made = artefacts(case) + [a for path in args.bundle for a in from_bundle(path)]
    rows = measured(case, made, 20 if args.quick else args.rounds)
    print(aligned(rows))
    accuracy = [float(r[5].split()[0]) for r in rows[1:]]
    figures = [
        plain(f"{a.name}: accuracy", share, baseline=f"original {accuracy[0]:.2f} %")
        for a, share in zip(made, accuracy, strict=True)
    ]
    caption = f"{case.title}, {len(case.test)} test images, one frame, one thread, in turns"
    section = {
        "environment": env,
        "seconds": time.perf_counter() - began,
        "quick": args.quick,
        "figures": plain_rows(figures),
        "details": {"tables": {caption: rows}},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    order = ("resnet20", "resnet56")
    keep(args.out / "artefacts.json", order, args.network, section, "One network, many artefacts")
    print("\n" + text(figures))


def artefacts(case) -> list[Artefact]:
    """fp32, fp16, dynamic, int8 as published and with rounded weights, three prunings, and two combinations."""
    whole, calibration = _file(case, case.original), np.ascontiguousarray(case.x[:256])
    made = [
        _of("fp32", whole, case.macs),
        _of("fp16 weights", to_fp16_onnx(whole), case.macs),
        _of("dynamic int8", to_dynamic_onnx(whole), case.macs),
        _of("int8, nearest", to_int8_onnx(whole, calibration), case.macs),
        _of("int8, with feedback", _rounded(case, case.original), case.macs),
    ]
    patterns = {"half the weights zero": PerLayer(0.5), "2 of 4": NofM(2, 4)}
    for name, pattern in patterns.items():
        say(name)
        module, sparse = pruned(case, pattern)
        made.append(_of(name, _file(case, module), case.macs, sparse))
    say("channels")
    module, macs = fewer_channels(case, 0.75)
    made.append(_of("3/4 of the inner channels", _file(case, module), macs))
    made.append(_of("3/4 of the channels, int8", _rounded(case, module), macs))
    return made


def pruned(case, pattern: Pattern) -> tuple[nn.Module, int]:
    """Every convolution but the first in the pattern, fitted one after the other; and the bytes without zeros."""
    walk, sparse, other = case.walk(), 0, 0
    for i, site in enumerate(case.found):
        if i == 0 or site.kind != "conv2d" or site.groups > 1:
            other += 4 * (site.weight.size + len(site.bias))
            continue
        metric = Metric.of(layer_moments(walk, site, 0)[0])
        weight = alps(metric, pattern)
        walk.layers[site.node] = Dense(site, weight, metric.bias(weight))
        sparse += Pruned(weight).bytes_sparse() + 4 * len(site.bias)
    return Compressed(case.network, case.found, walk.layers), sparse + other


def fewer_channels(case, share: float) -> tuple[nn.Module, int]:
    """Between the two convolutions of each residual block `share` of the channels; and its multiply-adds."""
    layers, macs = {}, case.macs
    by_name = {site.name: site for site in case.found}
    for name, second in by_name.items():
        first = by_name.get(name.removesuffix("conv2") + "conv1")
        if not name.endswith(".conv2") or first is None:
            continue
        walk = case.walk()  # a fresh one: what it keeps lies behind `first`, which changes below
        walk.layers.update(layers)
        metric = Metric.of(layer_moments(walk, second, 0)[0])
        left = remove_channels(metric, second.shape, round(share * second.shape[1]))
        layers[first.node] = _narrow(first, first.weight[left.kept], first.bias[left.kept])
        layers[second.node] = _narrow(second, left.weight, left.bias)
        gone = 1.0 - len(left.kept) / second.shape[1]
        macs -= gone * (first.macs + second.macs)
    return Compressed(case.network, case.found, layers), macs


def _narrow(site, weight: np.ndarray, bias: np.ndarray) -> nn.Module:
    """A Dense with another number of channels."""
    layer = Dense(site)
    layer.weight, layer.bias = (torch.from_numpy(v).float() for v in (weight, bias))
    return layer


def _rounded(case, module: nn.Module) -> bytes:
    """The int8 file of `module`, weights rounded with feedback layer by layer."""
    from edgesolve.host.network import trace

    network = trace(module, case.shape)
    last = network.nodes[-2].name
    layers = rounded_layers(network, last, case.preprocess, case.x, {PAIRWISE_LEVELS})
    rounded = _Replaced(network, layers[PAIRWISE_LEVELS])
    return integer_file("onnx", Framed(case, rounded), case.x)


class _Replaced(nn.Module):
    def __init__(self, network, layers):
        super().__init__()
        self.network, self.layers = network, layers

    def forward(self, x):
        return self.network.run(x, layers=self.layers)


def from_bundle(path: Path) -> list[Artefact]:
    """Each ONNX backend of a bundle: the backbone and its own head."""
    bundle = open_bundle(path)
    report = json.loads(bundle.read("report.json"))
    made = []
    for name in bundle.backends:
        if bundle.runtime(name) == "onnx":
            size = sum(len(bundle.read(f)) for f in _shipped(bundle, name))
            runtime = open_runtime(bundle, backend=name)
            title = f"{path.name}: {name}"
            made.append(Artefact(title, size, report["macs"]["after"], runtime.logits))
    return made


def _shipped(bundle, name: str) -> tuple[str, str]:
    return bundle.backends[name]["backbone"], bundle.file(name, "head")


def measured(case, made: list[Artefact], rounds: int) -> list[list[str]]:
    times = _times([a.run for a in made], case.test.x[:1], rounds)
    base = made[0].run(case.test.x).argmax(1)
    rows = [["artefact", "bytes", "ratio", "M MACs", "p50 / p95 ms", "accuracy", "agreement"]]
    for a, mine in zip(made, times, strict=True):
        answers = a.run(case.test.x).argmax(1)
        sparse = "" if a.sparse is None else f" ({a.sparse:,} without zeros)"
        p50, p95 = np.percentile(mine, (50, 95))
        rows.append(
            [
                a.name,
                f"{a.bytes:,}{sparse}",
                f"{made[0].bytes / a.bytes:.2f}",
                f"{a.macs / 1e6:.1f}",
                f"{p50:.2f} / {p95:.2f}",
                f"{100 * (answers == case.test.y).mean():.2f} %",
                f"{100 * (answers == base).mean():.2f} %",
            ]
        )
    return rows


def _times(runs, frame: np.ndarray, rounds: int) -> np.ndarray:
    """Milliseconds (runs, rounds) of one frame, all in turns."""
    found = np.empty((len(runs), rounds))
    for k in range(-10, rounds):  # the first ten warm up
        for i, run in enumerate(runs):
            began = time.perf_counter()
            run(frame)
            found[i, max(k, 0)] = 1e3 * (time.perf_counter() - began)
    return found


def _of(name: str, file: bytes, macs: float, sparse: int | None = None) -> Artefact:
    graph = open_graph(file, backend="onnx")

    def run(frames: np.ndarray) -> np.ndarray:
        starts = range(0, len(frames), BATCH)
        return np.concatenate([graph(frames[i : i + BATCH])[0] for i in starts])

    return Artefact(name, len(file), macs, run, sparse)


def _file(case, module: nn.Module) -> bytes:
    frames = torch.from_numpy(np.ascontiguousarray(case.x[:2]))
    return to_onnx(Framed(case, module).eval(), (frames,), ("frames",), free_batch=True)


def _arguments():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--network", choices=("resnet20", "resnet56"), default="resnet20")
    p.add_argument("--bundle", type=Path, action="append", default=[], metavar="DIR")
    p.add_argument("--test", type=int, default=2000)
    p.add_argument("--rounds", type=int, default=200)
    p.add_argument("--quick", action="store_true")
    p.add_argument("--threads", type=int, default=1, help="of torch, while the files are made")
    p.add_argument("--out", type=Path, default=ROOT / "bench_out")
    return p.parse_args()


if __name__ == "__main__":
    main()
