"""A pretrained ResNet-20 on CIFAR-10, from its weights to a device that saw noise and recovered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgesolve.device import adapt, recalibrate
from edgesolve.device.bundle import open_bundle
from edgesolve.device.runtime import open_runtime
from edgesolve.device.verify import verify

pytestmark = [pytest.mark.data, pytest.mark.slow]
CALIBRATION, TEST = 3000, 2000


@pytest.fixture(scope="module")
def cifar(data_dir):
    folder = data_dir / "cifar10"
    x, y = (np.load(folder / f"{k}_test.npy")[:TEST] for k in "xy")
    return np.load(folder / "x_train.npy", mmap_mode="r")[:CALIBRATION], x, y.ravel()


@pytest.fixture(scope="module")
def bundle(cifar, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    np.savez(folder / "x.npz", x=cifar[0])
    command = [
        *(sys.executable, "-P", "-m", "edgesolve.device.cli", "build"),
        f"{Path(__file__).with_name('nets.py')}:resnet20",
        *("--weights", str(data_dir / "weights" / "cifar10_resnet20.safetensors")),
        *("--data", str(folder / "x.npz"), "--out", str(folder / "r20")),
        *("--mean", ".485,.456,.406", "--std", ".229,.224,.225"),
        *("--split", "layer3.2", "--backends", "onnx", "--json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    return folder / "r20", json.loads(done.stdout)


def accuracy(logits, y):
    """In which equal logits, as of a dead head, are wrong."""
    certain = logits.max(1) > logits.min(1)
    return float(((logits.argmax(1) == y) & certain).mean())


def noisy(x):
    noise = np.random.default_rng(3).normal(0, 0.08, x.shape)
    return np.round(np.clip(x / 255 + noise, 0, 1) * 255).astype(np.uint8)


def test_the_last_block_is_replaced_at_little_loss(bundle, cifar, accepts_only):
    folder, report = bundle
    assert report["params"] == {"before": 269_722, "after": report["params"]["after"]}
    assert report["head"]["replaced_params"] == 74_634
    assert report["params"]["after"] < 269_722 - 20_000
    assert report["macs"]["after"] < report["macs"]["before"] == 40_551_040
    _, x, y = cifar

    def good(logits):
        assert accuracy(logits, y) >= 0.88

    accepts_only(good, open_runtime(folder).logits(x), blind={"scaled"})
    assert abs(report["agreement"]["after"] - 0.93) < 0.06


def test_onnx_runtime_gives_torchs_answers(bundle):
    found = verify(open_bundle(bundle[0]))["backends"]["onnx"]
    assert found["top1"] == 1.0 and found["logits"] <= 1e-4 and found["adapted_rows"] <= 1e-3


@pytest.mark.parametrize("mode, gain", [("backbone", 0.25), ("head", 0.15)])
def test_sixty_four_noisy_frames_are_enough(bundle, cifar, tmp_path, accepts_only, mode, gain):
    folder, _ = bundle
    _, x, y = cifar
    window, judge, judge_y = noisy(x[:64]), noisy(x[64:1088]), y[64:1088]
    before = accuracy(open_runtime(folder).logits(judge), judge_y)
    assert 0.2 < before < 0.5, "the noise must hurt"
    report = recalibrate.run(
        folder, window, None, state=tmp_path / "state", options=adapt.Options(mode=mode)
    )
    assert (report["decision"], report["n"]) == ("accepted", 64)
    assert report["relative_gap"] <= 1e-6
    after = open_runtime(folder, state=tmp_path / "state").logits(judge)

    def better(logits):
        assert accuracy(logits, judge_y) >= before + gain

    accepts_only(better, after, blind={"scaled"})


@pytest.mark.parametrize("n", [64, 512])
def test_clean_frames_change_nothing(bundle, cifar, tmp_path, n):
    report = recalibrate.run(bundle[0], cifar[1][:n], None, state=tmp_path / "state")
    assert (report["decision"], report["reason"]) == ("kept", "no_drift")
