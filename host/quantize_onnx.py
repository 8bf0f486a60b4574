"""ONNX graphs with int8 or fp16 weights, for ONNX Runtime's CPU kernels.

Measured (ResNet-56, CIFAR-10, onnxruntime 1.31.1, AVX2 without VNNI, one thread): uint8 activations with int8
weights of at most 64 steps are the only pair that is fast and right there: 2.0 ms against 3.3 ms in float. Weights of
127 steps overflow (agreement with the float network 97.3 instead of 99.3 %), uint8 weights take 3.0 ms, int8
activations aren't fused on x86 (8.3 ms). On ARM no kernel overflows, so the same file is right there.

Integer operators instead of pairs of quantise and dequantise nodes (ResNet-56, decomposed): the same answers from 159
nodes instead of 573, 7 % fewer bytes, opened in 237 instead of 390 ms.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgesolve.host.compact import compact
from edgesolve.host.errors import ModelError
from edgesolve.host.quiet import quiet

BATCH = 32
MIN_WEIGHTS = 1024
"""A product with a smaller constant is bookkeeping (a pooling pattern, a last layer): left in float."""

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_PRODUCTS = ("Gemm", "MatMul")


def to_int8_onnx(
    model: bytes,
    frames: np.ndarray | Iterable[np.ndarray],
    *,
    keep_float: Collection[str] | Callable[[onnx.ModelProto], Collection[str]] | None = None,
) -> bytes:
    """`model` with int8 weights (per output channel, symmetric) and uint8 activations (per tensor, affine).

    frames : what the graph's one input takes, (n, h, w, c) or an iterable of such batches. Ranges are the extremes over
        them: leaving out the outermost 0.01 % of the values raised the error of the logits (.040 to .053 on ResNet-20).
    keep_float : names of nodes, or a rule that gives them; by default `better_in_float`.

    Input and output keep their types. Weights on the grid of `rounding.grid(weight, PAIRWISE_LEVELS)` are stored
    as they are. Same input, same bytes.
    """
    from onnxruntime import quantization as q

    graph = _opened(model)
    rule = better_in_float if keep_float is None else keep_float
    kept = rule(graph) if callable(rule) else rule
    _check_names(graph, kept)
    return _quantised(
        graph,
        q.quantize_static,
        _reader(graph.graph.input[0].name, frames),
        quant_format=q.QuantFormat.QOperator,
        activation_type=q.QuantType.QUInt8,
        calibrate_method=q.CalibrationMethod.MinMax,
        nodes_to_exclude=sorted(kept),
        extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
    )


def to_dynamic_onnx(model: bytes) -> bytes:
    """int8 weights per channel; each activation's range is found while it runs, so no calibration."""
    from onnxruntime import quantization as q

    return _quantised(_opened(model), q.quantize_dynamic)


def _quantised(graph: onnx.ModelProto, quantise: Callable, *args, **options) -> bytes:
    """What onnxruntime's `quantise(source, target, ...)` makes of `graph`, with 7-bit weights per channel."""
    from onnxruntime import quantization as q

    with tempfile.TemporaryDirectory() as folder, quiet():
        given, source, target = (str(Path(folder) / f"{i}.onnx") for i in range(3))
        try:
            del graph.graph.value_info[:]  # of weights that the quantiser will transpose
            onnx.save(graph, given)
            q.shape_inference.quant_pre_process(
                given, source, skip_symbolic_shape=True, skip_onnx_shape=True
            )
            options = {"per_channel": True, "reduce_range": True, **options}
            quantise(source, target, *args, weight_type=q.QuantType.QInt8, **options)
        except Exception as error:
            raise ModelError(f"ONNX quantisation failed: {_first_line(error)}") from error
        return compact(onnx.load(target))


def to_fp16_onnx(model: bytes) -> bytes:
    """Weights stored as float16 and widened when the session opens; arithmetic stays float32."""
    graph = _opened(model)
    casts = []
    for tensor in graph.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < 16:
            continue
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name = f"{tensor.name}_half"
        casts.append(helper.make_node("Cast", [name], [tensor.name], to=onnx.TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), name))
    nodes = [*casts, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    return compact(graph)


def better_in_float(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes after the last layer with weights, and of layers with a channel that is all bias.

    Layers are convolutions, and products with a constant of MIN_WEIGHTS entries. Quantising what follows them
    (how a bundle makes its rows) saves neither bytes nor time, and costs a rounding of every row. A channel
    without weights has no scale for its bias.
    """
    constants = {t.name: t for t in model.graph.initializer}
    leads: set[str] = set()
    kept = []
    for node in reversed(model.graph.node):
        weights = [numpy_helper.to_array(constants[i]) for i in node.input if i in constants]
        large = node.op_type in _PRODUCTS and any(w.size >= MIN_WEIGHTS for w in weights)
        if large or node.op_type in _CONVOLUTIONS or leads.intersection(node.output):
            leads.update(node.input)
            if node.op_type not in _CONVOLUTIONS or not all_bias(*weights):
                continue
        kept.append(node.name)
    return kept[::-1]


def all_bias(weight: np.ndarray, bias: np.ndarray | None = None) -> bool:
    """Whether a channel's weights (T, ...) are too small beside its bias (T,) to carry it in 32 bits."""
    if bias is None or bias.shape != weight.shape[:1]:
        return False
    largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1, initial=0.0)
    return bool((largest < 1e-5 * np.abs(bias)).any())


class _Reader:
    """onnxruntime's way of being given calibration data."""

    def __init__(self, name: str, batches: Iterable[np.ndarray]):
        self._batches = ({name: batch} for batch in batches)

    def get_next(self):
        return next(self._batches, None)


def _reader(name: str, frames) -> _Reader:
    if isinstance(frames, np.ndarray):
        if not len(frames):
            raise ModelError("frames is empty: ranges are calibrated on frames, give some.")
        starts = range(0, len(frames), BATCH)
        return _Reader(name, [frames[i : i + BATCH] for i in starts])
    return _Reader(name, frames)


def _opened(model: bytes) -> onnx.ModelProto:
    graph = onnx.load_from_string(model)
    for i, node in enumerate(graph.graph.node):
        node.name = node.name or f"node_{i}"
    if len(graph.graph.input) != 1:
        raise ModelError(
            f"the graph takes {len(graph.graph.input)} inputs, expected one batch of frames."
        )
    return graph


def _check_names(graph: onnx.ModelProto, names: Collection[str]) -> None:
    unknown = set(names) - {node.name for node in graph.graph.node}
    if unknown:
        raise ValueError(f"keep_float names {sorted(unknown)[0]!r}, which is no node of the graph.")


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:240] if lines else type(error).__name__
