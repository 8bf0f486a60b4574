"""What the device tests share: frames of the tiny bundle, a shifted sensor, states adapted once."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import numpy as np
import pytest

from edgesolve.device import adapt, recalibrate
from edgesolve.device.runtime import open_runtime

RUNTIMES = {"onnx": ("onnxruntime",), "litert": ("ai_edge_litert", "tflite_runtime")}


class Frames:
    """Clean test frames, and the same through a sensor with less contrast and more light.

    `window` is what the device adapts to, `judge` what it is judged on: never the same frames.
    """

    def __init__(self, path):
        with np.load(path) as archive:
            self.x, self.y = archive["x"], archive["y"]
        self.shifted = np.clip(self.x * 0.4 + 100, 0, 255).astype(np.uint8)
        self.window, self.window_y = self.shifted[:128], self.y[:128]
        self.judge, self.judge_y = self.shifted[128:320], self.y[128:320]


@pytest.fixture(scope="session")
def frames(bundle_dir):
    return Frames(bundle_dir.parent / "test.npz")


@pytest.fixture(scope="session", params=["onnx", "litert"])
def backend(request):
    if not any(find_spec(module) for module in RUNTIMES[request.param]):
        pytest.skip(f"no runtime for {request.param} is installed")
    return request.param


@pytest.fixture(scope="session")
def both_backends():
    missing = [n for n, modules in RUNTIMES.items() if not any(map(find_spec, modules))]
    if missing:
        pytest.skip(f"no runtime for {', '.join(missing)} is installed")
    return "onnx", "litert"


@pytest.fixture(scope="session")
def adapted(bundle_dir, frames, tmp_path_factory):
    """adapted(backend, mode) -> (state folder, report), made once: copy the folder to change it."""
    made = {}

    def get(backend, mode="backbone"):
        if (backend, mode) not in made:
            state = tmp_path_factory.mktemp("adapted") / "state"
            options = adapt.Options(mode=mode)
            report = recalibrate.run(
                bundle_dir, frames.window, None, state=state, backend=backend, options=options
            )
            made[backend, mode] = state, report
        return made[backend, mode]

    return get


@pytest.fixture
def own_state(adapted, tmp_path):
    """own_state(backend, mode): a copy of the adapted state that the test may change."""

    def get(backend="auto", mode="backbone"):
        return shutil.copytree(adapted(backend, mode)[0], tmp_path / "state")

    return get


@pytest.fixture(scope="session")
def logits(bundle_dir):
    """logits(frames, backend, state) as whoever starts now would compute them."""

    def get(x, backend="auto", state=None):
        return open_runtime(bundle_dir, backend=backend, state=state).logits(x)

    return get
