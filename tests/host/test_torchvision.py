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
    """96 blurred random 64x64 pictures."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    x = np.random.default_rng(0).normal(size=(96, 64, 64, 3))
    for axis in (1, 2):
        x = sum(np.roll(x, k, axis) for k in range(-3, 4)) / 7**0.5
    path = tmp_path_factory.mktemp("calibration") / "x.npz"
    np.savez(path, x=np.clip(128 + 60 * x, 0, 255).astype(np.uint8))
    return path


@pytest.mark.parametrize(
    "name, split, params, norms",
    [
        ("resnet18", "layer4.1", 11_689_512, 20),
        ("resnet50", "layer4.2", 25_557_032, 53),
        ("googlenet", "inception5b", 6_624_904, 57),
    ],
)
def test_a_network_builds_and_every_file_agrees(calibration, tmp_path, name, split, params, norms):
    out = tmp_path / name
    command = [sys.executable, "-P", "-m", "edgesolve.device.cli", "build", f"{NETS}:{name}"]
    options = ["--data", str(calibration), "--out", str(out), "--split", split, "--json"]
    sizes = [
        "--mean",
        ".485,.456,.406",
        "--std",
        ".229,.224,.225",
        "--n-gates",
        "32",
        "--rank",
        "4",
    ]
    done = subprocess.run([*command, *options, *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    report = json.loads(done.stdout)
    assert report["params"]["before"] == params and report["split"].startswith(split)
    assert report["params"]["after"] < params
    bundle = open_bundle(out)
    # The classifier's rows, and with them every logit, passed `edgesolve verify` during the build.
    for backend in ("onnx", "litert"):
        found = report["parity"][backend]
        assert found["top1"] == 1.0
        for key in ("logits", "adapted_rows", "teacher", "window_mean", "window_var"):
            scale = max(1.0, float(np.abs(bundle.parity()["adapted_rows"]).max()))
            assert found[key] <= 1e-3 * scale, key
        inside = [e for e in bundle.backends[backend]["patch"]]
        assert 0 < len(inside) < norms
    spread = bundle.parity()["teacher_logits"].std(0).mean()
    assert spread > 1e-3, "a network that answers the same to everything would show nothing"
