"""How long a layer takes: each of its forms as a small ONNX file, run as the device does, one thread, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from edgesolve.device.graph import open_graph
from edgesolve.host.chain import Chain, Factor
from edgesolve.host.plan import Candidate
from edgesolve.host.sites import Site

ROUNDS = 15
ROUND_S = 0.001
"""Every form runs this long, or once, in each round; the least round counts, since other load only adds."""
FORMS = 12
"""Forms measured per layer; the seconds of others come from the nearest in multiply-adds above."""


def blank(site: Site, candidate: Candidate, seed: int = 0) -> Chain:
    """A chain of the candidate's shape with random weights (zeros would be skipped or denormal)."""
    T, c, kh, kw = site.weight.shape
    g, ranks = site.groups, candidate.ranks
    if candidate.format == "dense":
        shapes = [((T, c, kh, kw), "hw", g)]
    elif candidate.format == "lowrank":
        shapes = [((g * ranks[0], c, kh, kw), "hw", g), ((T, ranks[0], 1, 1), "", g)]
    elif candidate.format == "cp":
        r = ranks[0]
        shapes = [
            ((g * r, c, 1, 1), "", g),
            ((g * r, 1, kh, kw), "hw", g * r),
            ((T, r, 1, 1), "", g),
        ]
    else:
        r_out, r_in = ranks
        first = [] if r_in == c else [((g * r_in, c, 1, 1), "", g)]
        last = [] if r_out * g == T else [((T, r_out, 1, 1), "", g)]
        shapes = [*first, ((g * r_out, r_in, kh, kw), "hw", g), *last]
    generator = np.random.default_rng(seed)
    factors = tuple(Factor(generator.normal(size=s) / s[1], a, n) for s, a, n in shapes)
    return Chain(candidate.format, ranks, factors)


def seconds(site: Site, options: list[Candidate]) -> list[float]:
    """Seconds of one frame through each candidate on this machine, ONNX Runtime, one thread."""
    pick = _spread(options)
    runs = [_runner(site, blank(site, options[i])) for i in pick]
    once = [max(_clock(run, 1), 1e-7) for run in runs]
    counts = [max(1, int(ROUND_S / s)) for s in once]
    rounds = [[_clock(run, n) for run, n in zip(runs, counts, strict=True)] for _ in range(ROUNDS)]
    measured = dict(zip(pick, np.min(rounds, axis=0), strict=True))
    return [
        float(measured.get(i, 0.0) or _nearest(i, options, measured)) for i in range(len(options))
    ]


def _spread(options: list[Candidate]) -> list[int]:
    """Dense forms, and the others evenly by multiply-adds."""
    dense = [i for i, c in enumerate(options) if c.format == "dense"]
    rest = sorted(set(range(len(options))) - set(dense), key=lambda i: options[i].macs)
    at = np.unique(np.linspace(0, len(rest) - 1, min(FORMS, len(rest))).round().astype(int))
    return dense + [rest[i] for i in at] if rest else dense


def _nearest(i: int, options: list[Candidate], measured: dict[int, float]) -> float:
    """Of the cheapest measured form that needs at least as many multiply-adds: never too fast."""
    above = [
        j for j in measured if options[j].macs >= options[i].macs and options[j].format != "dense"
    ]
    above = above or [j for j in measured if options[j].macs >= options[i].macs] or list(measured)
    return measured[min(above, key=lambda j: options[j].macs)]


def _clock(run: Callable[[], object], n: int) -> float:
    began = time.perf_counter()
    for _ in range(n):
        run()
    return (time.perf_counter() - began) / n


def _runner(site: Site, chain: Chain) -> Callable[[], object]:
    graph = open_graph(to_onnx(site, chain), backend="onnx")
    c = site.weight.shape[1] * site.groups
    x = np.random.default_rng(1).normal(size=(1, c, *site.at.before)).astype(np.float32)
    return lambda: graph(x)


def to_onnx(site: Site, chain: Chain) -> bytes:
    """The chain at `site` with a ReLU behind it, as it mostly stands in a network, as one ONNX file."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, last = [], [], len(chain.factors) - 1
    for i, factor in enumerate(chain.factors):
        weights.append(numpy_helper.from_array(factor.weight.astype(np.float32), f"w{i}"))
        stride, padding, dilation = site.along(factor.axes)
        nodes.append(
            helper.make_node(
                "Conv",
                [f"v{i}" if i else "x", f"w{i}", *(["b"] if i == last else [])],
                [f"v{i + 1}"],
                kernel_shape=list(factor.weight.shape[2:]),
                strides=stride,
                pads=padding * 2,
                dilations=dilation,
                group=factor.groups,
            )
        )
    nodes.append(helper.make_node("Relu", [f"v{last + 1}"], ["y"]))
    weights.append(numpy_helper.from_array(site.bias.astype(np.float32), "b"))
    c = site.weight.shape[1] * site.groups
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, c, *site.at.before])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "layer", [given], [made], weights)
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
