"""Open an exported graph with whatever runtime reads it: `graph(*arrays) -> [arrays]`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from edgesolve.device.errors import BackendError

BACKENDS = {"onnx": ".onnx", "litert": ".tflite"}


class Graph(Protocol):
    """`inputs`: (name, shape with None for a free batch, dtype) per input. Results are copies."""

    inputs: list[tuple[str, tuple[int | None, ...], np.dtype]]
    runtime: str

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]: ...


def open_graph(model: str | Path | bytes, *, backend: str | None = None, threads: int = 1) -> Graph:
    """Load `model` (a path, or bytes with `backend` "onnx" or "litert") with `threads` threads.

    Raises BackendError naming the package to install, or why the file was refused.
    """
    if backend is None:
        suffix = Path(str(model)).suffix.lower()
        backend = next((name for name, ends in BACKENDS.items() if ends == suffix), None)
        if backend is None:
            raise BackendError(f"{model}: expected a file ending in .onnx or .tflite.")
    if isinstance(model, (str, Path)):
        try:
            model = Path(model).read_bytes()
        except OSError as error:
            raise BackendError(f"{model}: cannot be read ({error.strerror}).") from error
    if backend == "onnx":
        from edgesolve.device.graph_onnx import OnnxGraph

        return OnnxGraph(model, threads)
    if backend == "litert":
        from edgesolve.device.graph_tflite import TfliteGraph

        return TfliteGraph(model, threads)
    raise BackendError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}.")
