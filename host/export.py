"""Modules to ONNX and TFLite bytes. The exporters are imported here, and silenced: they print pages."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

from edgesolve.host.errors import ModelError

OPSET = 18  # read by every onnxruntime since 1.14
_FREE = torch.export.Dim("n", min=1, max=4096)


def to_onnx(
    module: nn.Module, example: tuple, names: tuple[str, ...], *, free_batch: bool
) -> bytes:
    """One self-contained ONNX file; the first axis of the only input is free if `free_batch`."""
    with tempfile.TemporaryDirectory() as folder, _quiet(), torch.no_grad():
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
        return path.read_bytes()


def to_tflite(module: nn.Module, example: tuple) -> bytes:
    """One TFLite file with the shapes of `example`."""
    with tempfile.TemporaryDirectory() as folder, _quiet(), torch.no_grad():
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


@contextlib.contextmanager
def _quiet():
    """Silence the exporters, which also write to the file descriptors from C++."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for target, old in zip((1, 2), saved, strict=True):
            os.dup2(old, target)
            os.close(old)
        os.close(sink)
