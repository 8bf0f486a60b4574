"""The import rule: kernels <- device, kernels <- host; host sees only the device's contract."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "host", "device")

ALLOWED = {
    "kernels": {"numpy", "edgesolve.kernels"},
    "device": {
        *("numpy", "safetensors", "PIL", "onnxruntime", "ai_edge_litert", "tflite_runtime"),
        *("cv2", "picamera2", "prometheus_client", "paho", "nacl"),  # extras, inside functions
        *("edgesolve.kernels", "edgesolve.device"),
    },
}
# `graph` runs an int8 file: its head has to be solved on what the integer kernels give.
# The vendor signs what the device checks: `signature` is one contract, `atomic` how both write it.
CONTRACT = {
    f"edgesolve.device.{name}"
    for name in ("bundle", "errors", "frames", "graph", "head", "patch", "atomic", "signature")
}


def imports(path: Path):
    """(line, dotted name) of each import; `from a import b` is `a.b`, a relative one has a dot."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, "." * node.level + f"{node.module or ''}.{alias.name}"


def within(name: str, allowed: set[str]) -> bool:
    return any(name == one or name.startswith(one + ".") for one in allowed)


def is_allowed(folder: str, stem: str, name: str) -> bool:
    top = name.split(".")[0]
    if not top or top in FOLDERS:  # relative, or a second copy of the module
        return False
    if folder == "host":
        return top != "edgesolve" or within(
            name, CONTRACT | {"edgesolve.kernels", "edgesolve.host"}
        )
    if folder in ALLOWED:
        numba = folder == "kernels" and stem == "compiled" and top == "numba"
        return numba or top in sys.stdlib_module_names or within(name, ALLOWED[folder])
    return True


def violations(root: Path) -> list[str]:
    """`folder/file:line imports name`, for each import that the rule forbids."""
    return [
        f"{path.relative_to(root)}:{line} imports {name}"
        for folder in (*FOLDERS, "benchmarks", "deploy", "tests")
        for path in sorted((root / folder).rglob("*.py"))
        for line, name in imports(path)
        if not is_allowed(folder, path.stem, name)
    ]


def test_import_rule():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("kernels/prox.py", "import numba"),
        ("kernels/compiled.py", "import scipy.linalg"),
        ("kernels/gap.py", "from edgesolve.device import bundle"),
        ("device/adapt.py", "import torch"),
        ("device/adapt.py", "def late():\n    from edgesolve.host.network import Network"),
        ("device/adapt.py", "from edgesolve import host"),
        ("device/adapt.py", "from . import bundle"),
        ("device/head.py", "import numba"),
        ("host/report.py", "from edgesolve.device import service"),
        ("host/report.py", "from edgesolve import device"),
        ("host/report.py", "import kernels.moments"),
        ("tests/host/test_load.py", "from host import load"),
        ("benchmarks/run.py", "import device"),
    ],
)
def test_planted_mistake_is_found(tmp_path, path, line):
    planted = tmp_path / path
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    found = violations(tmp_path)
    assert len(found) == 1 and found[0].startswith(f"{path}:")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("kernels/compiled.py", "from numba import njit"),
        ("kernels/ridge.py", "from edgesolve.kernels import accel"),
        ("device/graph_onnx.py", "import onnxruntime"),
        ("host/report.py", "import scipy, torch\nfrom edgesolve.device.bundle import open_bundle"),
    ],
)
def test_ordinary_import_passes(tmp_path, path, line):
    planted = tmp_path / path
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    assert violations(tmp_path) == []
