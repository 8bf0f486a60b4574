"""What the kernel tests share: both paths of every kernel, and mutants for every accuracy test."""

import importlib.util

import numpy as np
import pytest

from edgesolve.kernels import accel


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
