"""TFLite files with int8 or fp16 weights, by ai-edge-quantizer, for LiteRT's XNNPACK kernels.

Measured (ResNet-56, CIFAR-10, AVX2 without VNNI, one thread): int8 takes a quarter of the bytes, but 3.5 ms
against 3.1 in float; on such a machine it pays in size only. the dynamic variant 3.1 and a
quarter as well. A bundle's rows in int8 give 9.8 % accuracy instead of 91.5: see `better_in_float`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import numpy as np

from edgesolve.host.errors import ModelError
from edgesolve.host.quantize_onnx import MIN_WEIGHTS, all_bias
from edgesolve.host.quiet import quiet

_CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV")
_PRODUCTS = ("FULLY_CONNECTED",)


def to_int8_tflite(
    model: bytes,
    frames: np.ndarray | Iterable[np.ndarray],
    *,
    keep_float: Collection[str] | None = None,
) -> bytes:
    """`model` with int8 weights (per output channel, symmetric) and int8 activations (per tensor, affine).

    frames : (n, h, w, c), or an iterable of single frames (1, h, w, c), of the dtype that the file takes. Ranges are
        the extremes over them. (The quantizer's own default, a moving average, depends on their order and clips.)
    keep_float : names of output tensors whose operations stay in float; by default `better_in_float`.

    Input and output keep their types. Weights on the grid of `rounding.grid(weight)` are stored as they are.
    """
    kept = better_in_float(model) if keep_float is None else keep_float
    rules = [_rule(".*", "*", "min_max_uniform_quantize", _static())]
    rules += [_rule(f"^{re.escape(name)};?$", "*", "no_quantize", {}) for name in kept]
    return _quantised(model, rules, frames)


def to_dynamic_tflite(model: bytes) -> bytes:
    """int8 weights per channel; each activation's range is found while it runs, so no calibration."""
    from ai_edge_quantizer import recipe

    return _quantised(model, recipe.dynamic_wi8_afp32())


def to_fp16_tflite(model: bytes) -> bytes:
    """Weights stored as float16 and widened when the file is loaded; arithmetic stays float32."""
    config = {
        "weight_tensor_config": _tensor(16, dtype="FLOAT", granularity="TENSORWISE"),
        "compute_precision": "FLOAT",
        "explicit_dequantize": True,
        "skip_checks": False,
        "min_weight_elements": 0,
    }
    return _quantised(model, [_rule(".*", "*", "float_casting", config)])


def better_in_float(model: bytes) -> list[str]:
    """Names of the outputs of what is better left in float, by the rule of quantize_onnx.py.

    A channel without weights is worse here: its bias is clipped to 32 bits, the answer is wrong.
    """
    from ai_edge_litert import schema_py_generated as schema

    file = schema.ModelT.InitFromPackedBuf(model, 0)
    graph = file.subgraphs[0]
    codes = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    leads: set[int] = set()
    kept = []
    for operator in reversed(graph.operators):
        code = file.operatorCodes[operator.opcodeIndex]
        kind = codes[max(code.builtinCode, code.deprecatedBuiltinCode)]
        inputs, outputs = list(operator.inputs), list(operator.outputs)
        arrays = [_array(file, graph.tensors[i]) for i in inputs[1:]]
        large = kind in _PRODUCTS and arrays[0] is not None and arrays[0].size >= MIN_WEIGHTS
        if large or kind in _CONVOLUTIONS or leads.intersection(outputs):
            leads.update(inputs)
            if kind not in _CONVOLUTIONS or not _all_bias(kind, arrays):
                continue
        kept += [graph.tensors[i].name.decode() for i in outputs]
    return kept[::-1]


def _array(file, tensor) -> np.ndarray | None:
    """A float constant's values."""
    data = file.buffers[tensor.buffer].data
    if data is None or tensor.type != 0 or not len(data):
        return None
    return np.frombuffer(bytes(data), "<f4").reshape(tensor.shape)


def _all_bias(kind: str, arrays: list[np.ndarray | None]) -> bool:
    weight, bias = arrays[0], arrays[1] if len(arrays) > 1 else None
    if weight is None or bias is None:
        return False
    axis = 3 if kind == "DEPTHWISE_CONV_2D" else 0
    return all_bias(np.moveaxis(weight, axis, 0), bias)


def _quantised(model: bytes, rules: list[dict], frames=None) -> bytes:
    try:
        from ai_edge_quantizer import quantizer
    except ImportError as error:
        raise ModelError(
            f"int8 TFLite needs ai-edge-quantizer ({error}): pip install ai-edge-quantizer"
        ) from error
    with quiet():
        try:
            work = quantizer.Quantizer(bytearray(model), rules)
            ranges = None if frames is None else _extremes(model, rules, frames)
            made = work.quantize(ranges).quantized_model
        except Exception as error:
            raise ModelError(f"TFLite quantisation failed: {_first_line(error)}") from error
    return bytes(made)


def _extremes(model: bytes, rules: list[dict], frames) -> dict:
    """The least and the greatest value of each tensor over all frames."""
    from ai_edge_quantizer import calibrator, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(rules)
    watched = calibrator.Calibrator(
        bytearray(model), num_threads=1, qsv_update_func=qsv_utils.min_max_update
    )
    key, name = _signature(model)
    watched.calibrate({key: _samples(name, frames)}, manager)
    return watched.get_model_qsvs()


def _signature(model: bytes) -> tuple[str, str]:
    """Name of the file's signature and of its one input."""
    from ai_edge_litert.interpreter import Interpreter

    found = Interpreter(model_content=model).get_signature_list()
    if len(found) != 1 or len(next(iter(found.values()))["inputs"]) != 1:
        raise ModelError("the file must have one signature with one input of frames.")
    key, entry = next(iter(found.items()))
    return key, entry["inputs"][0]


def _samples(name: str, frames) -> list[dict[str, np.ndarray]]:
    if isinstance(frames, np.ndarray):
        frames = np.split(frames, len(frames)) if len(frames) else []
    samples = [{name: np.ascontiguousarray(frame)} for frame in frames]
    if not samples:
        raise ModelError("frames is empty: ranges are calibrated on frames, give some.")
    return samples


def _rule(regex: str, operation: str, algorithm: str, config: dict) -> dict:
    return {
        "regex": regex,
        "operation": operation,
        "algorithm_key": algorithm,
        "op_config": config,
    }


def _static() -> dict:
    return {
        "activation_tensor_config": _tensor(8, symmetric=False, granularity="TENSORWISE"),
        "weight_tensor_config": _tensor(8),
        "compute_precision": "INTEGER",
        "explicit_dequantize": False,
        "skip_checks": False,
        "min_weight_elements": 0,
    }


def _tensor(bits: int, *, symmetric=True, granularity="CHANNELWISE", dtype="INT") -> dict:
    return {"num_bits": bits, "symmetric": symmetric, "granularity": granularity, "dtype": dtype}


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:240] if lines else type(error).__name__
