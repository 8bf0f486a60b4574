"""The deep networks of torchvision build, and every exported file gives torch's answers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgesolve.device.bundle import open_bundle

pytestmark = pytest.mark.slow
NETS = Path(__file__).with_name("torchvision_nets.py")


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """72 blurred random 64x64 pictures."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    x = np.random.default_rng(0).normal(size=(72, 64, 64, 3))
    for axis in (1, 2):
        x = sum(np.roll(x, k, axis) for k in range(-3, 4)) / 7**0.5
    path = tmp_path_factory.mktemp("calibration") / "x.npz"
    np.savez(path, x=np.clip(128 + 60 * x, 0, 255).astype(np.uint8))
    return path


@pytest.mark.parametrize(
    "name, split, backends, params, norms",
    [
        ("resnet18", "layer4.1", "onnx,litert", 11_689_512, 20),
        ("googlenet", "inception5b", "onnx", 6_624_904, 57),
    ],
)
def test_it_builds_and_every_file_agrees(
    calibration, tmp_path, name, split, backends, params, norms
):
    out = tmp_path / name
    command = [
        *(sys.executable, "-P", "-m", "edgesolve.device.cli", "build", f"{NETS}:{name}"),
        *("--data", str(calibration), "--out", str(out), "--split", split, "--json"),
        *("--mean", ".485,.456,.406", "--std", ".229,.224,.225"),
        *("--n-gates", "16", "--rank", "4", "--backends", backends),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    report = json.loads(done.stdout)
    assert report["params"]["before"] == params > report["params"]["after"]
    assert report["split"].startswith(split)
    bundle = open_bundle(out)
    known = bundle.parity()
    assert known["teacher_logits"].std(0).mean() > 1e-3, "equal answers to everything show nothing"
    rows = max(1.0, float(np.abs(known["adapted_rows"]).max()))
    assert np.abs(known["adapted_rows"] - known["rows"]).max() > 0.01 * rows
    assert set(report["parity"]) == set(backends.split(","))
    for backend, found in report["parity"].items():
        assert found["top1"] == 1.0 and found["adapted_rows"] <= 1e-4 * rows
        for key in ("logits", "teacher", "window_mean"):
            assert found[key] <= 1e-3, key
        assert 10 < len(bundle.backends[backend]["patch"]) < norms
