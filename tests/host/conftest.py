"""What the workstation's tests share: small networks with random statistics, traced and framed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the workstation's tests need torch")

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.host)


def _module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def nets():
    """tests/host/nets.py."""
    return _module(HERE / "nets.py")


@pytest.fixture(scope="session")
def scrambled():
    """scrambled(model, seed) -> the model in evaluation mode, its normalisations' numbers all random."""

    def run(model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                for name, low, high in (
                    ("weight", 0.5, 1.5),
                    ("bias", -0.5, 0.5),
                    ("running_mean", -0.5, 0.5),
                    ("running_var", 0.5, 2.0),
                ):
                    values = getattr(module, name)
                    if values is not None:
                        values.data.uniform_(low, high, generator=generator)
        return model.eval()

    return run


@pytest.fixture(scope="session")
def traced(nets, scrambled):
    """traced(name of a front) -> (model, network) with random statistics, made once: leave them alone."""
    from edgesolve.host.network import trace

    made = {}

    def get(name):
        if name not in made:
            model = scrambled(nets.whole(name))
            made[name] = model, trace(model, (3, 12, 12))
        return made[name]

    return get


@pytest.fixture(params=list(_module(HERE / "nets.py").FRONTS))
def front(request, traced):
    """(model, network) of every front in turn."""
    return traced(request.param)


@pytest.fixture
def frames():
    """frames(n, shape (h, w, c)) -> float32 noise."""

    def make(n, shape, seed=0):
        return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)

    return make
