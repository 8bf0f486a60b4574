import importlib.util

import numpy as np
import pytest

from edgesolve.kernels import accel
from edgesolve.kernels.designs import Explicit, Masked, Pooled
from edgesolve.kernels.gated import gated_forward, gated_pool
from edgesolve.kernels.losses import SquaredMoments, SquaredRows
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.newton import newton
from edgesolve.kernels.penalties import GroupL2
from edgesolve.kernels.solve import solve
from edgesolve.kernels.warm import warm


@pytest.fixture
def fresh(monkeypatch):
    """The kernels as a new process has them: nothing compiled yet, but for what is on the disk."""
    fast = accel.compiled()
    if fast is None:
        pytest.skip("no Numba")
    spec = importlib.util.spec_from_file_location(fast.__name__, fast.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(accel, "compiled", lambda: module)
    found = {k: v for k, v in vars(module).items() if hasattr(v, "py_func")}
    if not found:
        pytest.skip("NUMBA_DISABLE_JIT is set")
    assert not any(kernel.signatures for kernel in found.values())
    return found


def compiled(kernels):
    return {name: set(map(str, kernel.signatures)) for name, kernel in kernels.items()}


def test_nothing_to_compile_without_numba(monkeypatch):
    monkeypatch.setattr(accel, "compiled", lambda: None)
    assert warm() == []


def test_every_kernel_is_compiled_for_every_dtype_in_use(fresh):
    done = warm()
    assert {name.split()[0] for name, _ in done} == set(fresh)
    assert all(seconds >= 0 for _, seconds in done)
    before = compiled(fresh)
    for dtype in (np.float32, np.float64):
        z = np.zeros((3, 2, 4), dtype)
        for gate in (bool, np.float32, np.float64):
            D = np.ones((3, 2, 5), gate)
            gated_pool(z, D)
            gated_forward(z, D, np.zeros((5, 4, 2)))
    GroupL2(0.1, [0, 2, 5]).prox(np.zeros((5, 2)), 1.0)
    GroupL2(0.1, [0, 5]).prox(np.zeros((5, 2)), 1.0)
    assert before == compiled(fresh)


def test_a_solve_after_warm_compiles_nothing(fresh, rng):
    warm()
    before = compiled(fresh)
    x, D = rng.standard_normal((30, 3)), rng.random((30, 4)) < 0.6
    D.flags.writeable = False
    for c in (1, 2):
        t = np.asfortranarray(x @ rng.standard_normal((3, c)) + rng.standard_normal((30, c)))
        for dtype in (np.float32, np.float64):
            X = np.asfortranarray(x.astype(dtype))
            designs = [Masked(X, D), Pooled(X[:, None], D[:, None]), Explicit(X, [0, 1, 3])]
            for design in designs:
                loss = SquaredRows.of(design, t, 0.1)
                penalty = GroupL2(0.02, design.starts)
                for method in ("newton", "variational", "fista"):
                    solve(loss, penalty, method=method, tol=1e-2)
                newton(loss, penalty, np.asfortranarray(np.ones(loss.shape)), max_iter=2)
        solve(SquaredMoments.of(Moments.of(x, t), 0.0), GroupL2(0.02, [0, 3]))
    assert before == compiled(fresh)
