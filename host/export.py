"""Modules to ONNX and TFLite bytes. The exporters are imported here, and silenced."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import torch
from torch import nn

from edgesolve.host.compact import compact
from edgesolve.host.errors import ModelError
from edgesolve.host.quiet import quiet

OPSET = 18  # read by every onnxruntime since 1.14
_FREE = torch.export.Dim("n", min=1, max=4096)


def to_onnx(
    module: nn.Module, example: tuple, names: tuple[str, ...], *, free_batch: bool
) -> bytes:
    """One self-contained ONNX file; the first axis of the only input is free if `free_batch`."""
    with tempfile.TemporaryDirectory() as folder, quiet(), torch.no_grad():
        path = Path(folder) / "model.onnx"
        try:
            torch.onnx.export(
                module.eval(),
                example,
                str(path),
                dynamo=True,
                verbose=False,
                external_data=False,
                opset_version=OPSET,
                input_names=list(names),
                dynamic_shapes=({0: _FREE},) if free_batch else None,
            )
        except Exception as error:
            raise ModelError(f"ONNX export failed: {_first_line(error)}") from error
        return compact(onnx.load(path))


def to_tflite(module: nn.Module, example: tuple) -> bytes:
    """One TFLite file with the shapes of `example`."""
    with tempfile.TemporaryDirectory() as folder, quiet(), torch.no_grad():
        path = Path(folder) / "model.tflite"
        try:
            import litert_torch

            litert_torch.convert(module.eval(), example).export(str(path))
        except ImportError as error:
            raise ModelError(
                f"TFLite export needs litert-torch ({error}): pip install 'edgesolve[host]'"
            ) from error
        except Exception as error:
            raise ModelError(f"TFLite export failed: {_first_line(error)}") from error
        return path.read_bytes()


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:240] if lines else type(error).__name__
