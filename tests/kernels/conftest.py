"""What the kernel tests share: both paths of every kernel, and mutants for every accuracy test."""

import importlib.util

import numpy as np
import pytest

from edgesolve.kernels import accel
from edgesolve.kernels.penalties import GroupL2, GroupL2Feature, GroupL2Output, Nuclear


def _even(m, r):
    return np.arange(m + 1) * r


def _ragged(m, r):
    return np.r_[0, 1, np.arange(2, m + 1) * r]


def _weights(size):
    return np.linspace(0.5, 2.0, size)


# name: penalty of weights (m r, c) at a lam. Every law of a penalty and of its gap runs over them.
PENALTIES = {
    "gates": lambda lam, m, r: GroupL2(lam, _even(m, r)),
    "ragged gates": lambda lam, m, r: GroupL2(lam, _ragged(m, r), _weights(m)),
    "outputs": lambda lam, m, r: GroupL2Output(lam, _even(m, r)),
    "ragged outputs": lambda lam, m, r: GroupL2Output(lam, _ragged(m, r), _weights(m)),
    "inputs": lambda lam, m, r: GroupL2Feature(lam, m),
    "weighted inputs": lambda lam, m, r: GroupL2Feature(lam, m, _weights(r)),
    "ranks": lambda lam, m, r: Nuclear(lam, _even(m, r)),
    "ragged ranks": lambda lam, m, r: Nuclear(lam, _ragged(m, r), _weights(m)),
}


@pytest.fixture(params=PENALTIES)
def make_penalty(request):
    """make_penalty(lam, m, r): one of PENALTIES, for weights (m r, c)."""
    return PENALTIES[request.param]


@pytest.fixture
def penalties():
    """All of PENALTIES, by name."""
    return PENALTIES


@pytest.fixture(params=["numba", "numpy"])
def twin(request, monkeypatch):
    """Runs the test once with the compiled kernels and once with their NumPy twins."""
    if request.param == "numpy":
        monkeypatch.setenv("EDGESOLVE_NUMBA", "0")
    elif importlib.util.find_spec("numba") is None:
        pytest.skip("numba is not installed")
    else:
        monkeypatch.delenv("EDGESOLVE_NUMBA", raising=False)
    accel.compiled.cache_clear()
    yield request.param
    accel.compiled.cache_clear()


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def accepts_only(rng):
    """accepts_only(check, answer): `check` passes the answer and fails every mutant of it."""

    def run(check, answer):
        check(answer)
        for name, mutant in _mutants(np.asarray(answer), rng):
            try:
                check(mutant)
            except AssertionError:
                continue
            pytest.fail(f"the check cannot fail: it passes the {name} answer")

    return run


def _mutants(answer, rng):
    yield "zero", np.zeros_like(answer)
    yield "scaled", 1.01 * answer
    yield "permuted", np.roll(answer, 1, axis=0)
    flipped = answer[..., ::-1] if answer.shape[-1] > 1 else answer[::-1]
    yield "flipped", flipped.copy()
    yield "noisy", answer + 0.01 * np.std(answer) * rng.standard_normal(answer.shape)
    yield "noise", np.std(answer) * rng.standard_normal(answer.shape)
