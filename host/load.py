"""MODEL and DATA as the command line names them, read without pickle."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgesolve.host.errors import DataError, ModelError


def load_model(spec: str, weights: str | None = None) -> nn.Module | torch.export.ExportedProgram:
    """The model named by `spec`: `file.py:callable`, `package.module:callable`, or a `.pt2` file.

    The callable may carry literal arguments, `nets.py:resnet(20)`. `weights`: safetensors, or a state dict read
    with `weights_only=True`. Raises ModelError with one sentence.
    """
    if spec.endswith(".pt2"):
        if weights:
            raise ModelError("--weights doesn't apply to a .pt2 file, which carries its own.")
        return _exported(spec)
    place, _, call = spec.partition(":")
    if not call:
        raise ModelError(
            f"{spec}: expected file.py:callable, package.module:callable, or a .pt2 file."
        )
    name, args, kwargs = _parse_call(call)
    module = _file_module(place) if place.endswith(".py") else _named_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise ModelError(f"{place} has no callable {name!r}.")
    try:
        model = function(*args, **kwargs)
    except Exception as error:
        raise ModelError(f"{spec} failed: {type(error).__name__}: {_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} returned {type(model).__name__}, expected a torch.nn.Module.")
    if weights:
        _load_weights(model, weights)
    return model.eval()


def _exported(path: str) -> torch.export.ExportedProgram:
    try:
        return torch.export.load(path)
    except Exception as error:
        line = str(error).strip().splitlines()[0][:200]
        raise ModelError(f"{path}: not a readable torch.export file ({line}).") from error


def _parse_call(text: str) -> tuple[str, list, dict]:
    try:
        tree = ast.parse(text, mode="eval").body
        if isinstance(tree, ast.Name):
            return tree.id, [], {}
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
            args = [ast.literal_eval(a) for a in tree.args]
            return tree.func.id, args, {k.arg: ast.literal_eval(k.value) for k in tree.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ModelError(f"{text}: expected a name, or a call with literal arguments.")


def _file_module(path: str):
    if not Path(path).is_file():
        raise ModelError(f"{path}: no such file.")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModelError(
            f"{path}: cannot be imported ({type(error).__name__}: {_line(error)})."
        ) from error
    return module


def _named_module(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"{name}: cannot be imported ({error}).") from error


def _load_weights(model: nn.Module, path: str) -> None:
    if not Path(path).is_file():
        raise ModelError(f"{path}: no such weights file.")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
    except Exception as error:
        line = str(error).strip().splitlines()[0][:200]
        raise ModelError(f"{path}: cannot be read as weights ({line}).") from error
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a shape that differs
        line = str(error).strip().splitlines()[-1].strip()[:200]
        raise ModelError(f"{path}: the weights don't fit the model: {line}") from error
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ModelError(
            f"{path}: the weights don't fit the model: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {list(unexpected)[:3]}."
        )


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


@dataclass(frozen=True, slots=True)
class Data:
    """`x` (n, h, w, c) uint8, int8 or float32; `y` (n,) labels for reporting only, or None."""

    x: np.ndarray
    y: np.ndarray | None

    def __len__(self) -> int:
        return len(self.x)


def load_calibration(path: str, *, min_items: int = 64) -> Data:
    """Frames from a folder of images, an `.npy`, or an `.npz` with `x` and optional `y`. Raises DataError."""
    from edgesolve.device.frames import load_frames

    found = load_frames(path)
    x, y = found.frames, found.labels
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4:
        raise DataError(f"{path}: x has shape {x.shape}, expected (n, height, width, channels).")
    if x.dtype == np.float64:
        x = x.astype(np.float32)
    if len(x) < min_items:
        raise DataError(f"{path}: {len(x)} calibration items, at least {min_items} are needed.")
    if x.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))
        if len(bad):
            raise DataError(
                f"{path}: item {bad[0]} holds NaN or inf ({len(bad)} items do). "
                "Remove them: one NaN spoils every moment."
            )
    if (x == x[:1]).all():
        raise DataError(
            f"{path}: all {len(x)} items are equal; nothing can be estimated from them."
        )
    return Data(x, y)
