"""What the kernel tests share: both paths of every kernel, and mutants for every accuracy test."""

import importlib.util

import numpy as np
import pytest

from edgesolve.kernels import accel
from edgesolve.kernels.designs import Explicit, Masked, Pooled
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


def _masked(rng, n, dtype, m=6, d=4):
    X = (rng.standard_normal((n, d)) + 0.3).astype(dtype)
    D = X @ rng.standard_normal((d, m)).astype(dtype) >= 0
    return Masked(X, D), (D[:, :, None] * X[:, None].astype(np.float64)).reshape(n, -1)


def _pooled(rng, n, dtype, m=5, r=4, p=3, kind=bool):
    z = (rng.standard_normal((n, p, r)) + 0.3).astype(dtype)
    D = rng.random((n, p, m)) < 0.5 if kind is bool else rng.random((n, p, m)).astype(dtype)
    A = np.einsum("npm,npr->nmr", D.astype(np.float64), z.astype(np.float64)) / p
    return Pooled(z, D), A.reshape(n, -1)


def _explicit(rng, n, dtype):
    A = rng.standard_normal((n, 17)).astype(dtype)
    return Explicit(A, np.array([0, 1, 4, 9, 12, 17])), A.astype(np.float64)


# name: (design, the dense A (n, D) float64 that it stands for) with n rows of a dtype.
DESIGNS = {
    "masked": _masked,
    "one gate": lambda rng, n, dtype: _masked(rng, n, dtype, m=1, d=7),
    "pooled": _pooled,
    "soft gates": lambda rng, n, dtype: _pooled(rng, n, dtype, kind=float),
    "explicit": _explicit,
}


@pytest.fixture(params=DESIGNS)
def make_design(request):
    """make_design(rng, n, dtype): one of DESIGNS, and its dense A."""
    return DESIGNS[request.param]


@pytest.fixture
def designs():
    """All of DESIGNS, by name."""
    return DESIGNS


class Referee:
    """P and its gap from dense rows by the definitions, sharing no code with `gap.py` or a loss."""

    def __init__(self, A, t, penalty, ridge, intercept):
        self.A, self.Y = (np.asarray(a, np.float64) for a in (A, t))
        if intercept:
            self.A, self.Y = self.A - self.A.mean(axis=0), self.Y - self.Y.mean(axis=0)
        self.n, self.ridge, self.cuts = len(self.A), ridge, penalty.starts[1:-1]
        self.limit = penalty.lam * penalty.weights

    def norms(self, U):
        return np.array([np.linalg.norm(part) for part in np.split(U, self.cuts)])

    def objective(self, U):
        R = self.Y - self.A @ U
        return (
            np.sum(R * R) / (2 * self.n)
            + self.limit @ self.norms(U)
            + self.ridge / 2 * np.sum(U * U)
        )

    def gap(self, U):
        """P(U) less the dual value at the best scaled residual."""
        R = self.Y - self.A @ U
        pull = self.A.T @ R / self.n
        if self.ridge > 0:
            high = np.max(self.norms(pull - self.ridge * U) / self.limit)
            scales = (1.0, min(1.0, 1.0 / high if high > 0 else 1.0))
        else:
            high = np.max(self.norms(pull) / self.limit)
            s = np.vdot(R, self.Y) / np.vdot(R, R) if R.any() else 1.0
            scales = (np.clip(s, -1.0 / high, 1.0 / high) if high > 0 else s,)
        return self.objective(U) - max(self.dual(s * R / self.n) for s in scales)

    def dual(self, theta):
        value = np.vdot(theta, self.Y) - self.n / 2 * np.vdot(theta, theta)
        if self.ridge > 0:
            beyond = np.maximum(self.norms(self.A.T @ theta) - self.limit, 0.0)
            value -= np.sum(beyond**2) / (2 * self.ridge)
        return value


@pytest.fixture
def referee():
    """referee(A, t, penalty, ridge, intercept), for `GroupL2`."""
    return Referee


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
