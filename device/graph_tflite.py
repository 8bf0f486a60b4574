"""LiteRT (or tflite-runtime where that is what is installed), imported here and nowhere else."""

from __future__ import annotations

import re

import numpy as np

from edgesolve.device.errors import BackendError


class TfliteGraph:
    """One CPU interpreter (XNNPACK) with a fixed number of threads; shapes are fixed by the file."""

    def __init__(self, model: bytes, threads: int = 1):
        interpreter, self.runtime = _interpreter_class()
        try:
            self._interpreter = interpreter(model_content=model, num_threads=threads)
            self._interpreter.allocate_tensors()
        except Exception as error:
            line = str(error).strip().splitlines()[0][:200]
            raise BackendError(f"{self.runtime} refuses this model: {line}") from error
        inputs = sorted(self._interpreter.get_input_details(), key=_position)
        self._in = [detail["index"] for detail in inputs]
        self.inputs = [
            (d["name"], tuple(int(s) for s in d["shape"]), np.dtype(d["dtype"])) for d in inputs
        ]
        self._out = [detail["index"] for detail in self._outputs_in_order()]

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        try:
            for index, array in zip(self._in, arrays, strict=True):
                self._interpreter.set_tensor(index, array)
            self._interpreter.invoke()
            return [self._interpreter.get_tensor(index) for index in self._out]
        except Exception as error:
            line = str(error).strip().splitlines()[0][:200]
            raise BackendError(f"{self.runtime} cannot run this model: {line}") from error

    def _outputs_in_order(self) -> list[dict]:
        details = self._interpreter.get_output_details()
        if len(details) == 1:
            return details
        # The file lists outputs in any order; only the signature says which is output_0, output_1, …
        signature = next(iter(self._interpreter._get_full_signature_list().values()))
        by_index = {detail["index"]: detail for detail in details}
        names = sorted(signature["outputs"], key=lambda name: int(name.rsplit("_", 1)[1]))
        return [by_index[signature["outputs"][name]] for name in names]


def _position(detail: dict) -> int:
    found = re.search(r"args_(\d+)", detail["name"])
    return int(found.group(1)) if found else detail["index"]


def _interpreter_class():
    try:
        import ai_edge_litert
        from ai_edge_litert.interpreter import Interpreter

        return Interpreter, f"ai-edge-litert {getattr(ai_edge_litert, '__version__', '')}".strip()
    except ImportError as first:
        reason = first
    try:
        import tflite_runtime.interpreter as module
    except ImportError as error:
        raise BackendError(
            f"neither ai-edge-litert ({reason}) nor tflite-runtime can be imported: "
            "pip install 'edgesolve[litert]'"
        ) from error
    if int(np.__version__.split(".")[0]) >= 2:
        raise BackendError(
            f"tflite-runtime was built for NumPy 1; found NumPy {np.__version__}: "
            "pip install ai-edge-litert, or 'numpy<2'"
        )
    return module.Interpreter, "tflite-runtime"
