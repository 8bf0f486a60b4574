"""One form of one layer as an ONNX file of its own, with made-up weights: to be timed and weighed."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgesolve.host.chain import Chain, Factor
from edgesolve.host.plan import Candidate
from edgesolve.host.rounding import PAIRWISE_LEVELS
from edgesolve.host.sites import Site

ZERO = 128
"""Of activations in uint8."""


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


def to_onnx(site: Site, chain: Chain) -> bytes:
    """The chain at `site` with a ReLU behind it, as it mostly stands in a network; x (1, c, h, w) float32."""
    nodes, weights, last = [], [], len(chain.factors) - 1
    for i, factor in enumerate(chain.factors):
        weights.append(numpy_helper.from_array(factor.weight.astype(np.float32), f"w{i}"))
        inputs = [f"v{i}" if i else "x", f"w{i}", *(["b"] if i == last else [])]
        nodes.append(_node("Conv", inputs, f"v{i + 1}", site, factor))
    nodes.append(helper.make_node("Relu", [f"v{last + 1}"], ["y"]))
    weights.append(numpy_helper.from_array(site.bias.astype(np.float32), "b"))
    return _file(site, nodes, weights, TensorProto.FLOAT)


def to_int8_onnx(site: Site, chain: Chain) -> bytes:
    """The same with int8 weights and uint8 activations, where a ReLU is but a range; x (1, c, h, w) uint8.

    Scales are such that activations keep their spread.
    """
    scale, zero = np.float32(0.05), np.uint8(ZERO)
    nodes, last = [], len(chain.factors) - 1
    weights = [numpy_helper.from_array(np.asarray(v), n) for n, v in (("s", scale), ("z", zero))]
    for i, factor in enumerate(chain.factors):
        n_out, fan_in = len(factor.weight), factor.weight[0].size
        most = np.abs(factor.weight).reshape(n_out, -1).max(axis=1)[:, None, None, None]
        made = {
            f"w{i}": np.round(factor.weight / most * PAIRWISE_LEVELS).astype(np.int8),
            f"ws{i}": np.full(n_out, 2.0 / (PAIRWISE_LEVELS * np.sqrt(fan_in)), np.float32),
            f"wz{i}": np.zeros(n_out, np.int8),
            f"b{i}": np.arange(n_out, dtype=np.int32),
        }
        weights += [numpy_helper.from_array(v, n) for n, v in made.items()]
        inputs = [f"v{i}" if i else "x", "s", "z", f"w{i}", f"ws{i}", f"wz{i}", "s", "z", f"b{i}"]
        made_here = "y" if i == last else f"v{i + 1}"
        nodes.append(_node("QLinearConv", inputs, made_here, site, factor))
    return _file(site, nodes, weights, TensorProto.UINT8)


def nothing() -> bytes:
    """A file with a ReLU of one number."""
    shape = [1, 1, 1, 1]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "xy")
    return _model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "layer", [x], [y]))


def _node(operation: str, inputs: list[str], output: str, site: Site, factor: Factor):
    stride, padding, dilation = site.along(factor.axes)
    return helper.make_node(
        operation,
        inputs,
        [output],
        kernel_shape=list(factor.weight.shape[2:]),
        strides=stride,
        pads=padding * 2,
        dilations=dilation,
        group=factor.groups,
    )


def _file(site: Site, nodes, weights, element: int) -> bytes:
    c = site.weight.shape[1] * site.groups
    given = helper.make_tensor_value_info("x", element, [1, c, *site.at.before])
    made = helper.make_tensor_value_info("y", element, None)
    return _model(helper.make_graph(nodes, "layer", [given], [made], weights))


def _model(graph) -> bytes:
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
