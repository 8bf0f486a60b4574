"""ONNX Runtime, imported here and nowhere else."""

from __future__ import annotations

import numpy as np

from edgesolve.device.errors import BackendError

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


class OnnxGraph:
    """One CPU session with a fixed number of threads and no memory arena.

    The arena keeps the largest block it ever needed (onnxruntime issue 11627), which a small board can't afford.
    """

    def __init__(self, model: bytes, threads: int = 1):
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError(
                f"onnxruntime cannot be imported ({error}): pip install 'edgesolve[onnx]'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise BackendError(f"onnxruntime refuses this model: {_first_line(error)}") from error
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self.inputs = [
            (
                i.name,
                tuple(s if isinstance(s, int) else None for s in i.shape),
                np.dtype(_DTYPES.get(i.type, np.float32)),
            )
            for i in self._session.get_inputs()
        ]
        self._names = [name for name, _, _ in self.inputs]

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        try:
            return self._session.run(None, dict(zip(self._names, arrays, strict=True)))
        except Exception as error:
            raise BackendError(
                f"onnxruntime cannot run this model: {_first_line(error)}"
            ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
