import numpy as np
import pytest

from edgesolve.kernels import accel
from edgesolve.kernels.gated import gated_forward, gated_pool
from edgesolve.kernels.penalties import GroupL2
from edgesolve.kernels.warm import warm


def test_nothing_to_compile_without_numba(monkeypatch):
    monkeypatch.setattr(accel, "compiled", lambda: None)
    assert warm() == []


def test_every_kernel_is_compiled_for_every_dtype_in_use():
    fast = accel.compiled()
    if fast is None:
        pytest.skip("no Numba")
    done = warm()
    kernels = {k: v for k, v in vars(fast).items() if hasattr(v, "py_func")}
    if not kernels:
        pytest.skip("NUMBA_DISABLE_JIT is set")
    assert {name.split()[0] for name, _ in done} == set(kernels)
    assert all(seconds >= 0 for _, seconds in done)
    before = {name: len(kernel.signatures) for name, kernel in kernels.items()}
    for dtype in (np.float32, np.float64):
        z = np.zeros((3, 2, 4), dtype)
        for gate in (bool, np.float32, np.float64):
            D = np.ones((3, 2, 5), gate)
            gated_pool(z, D)
            gated_forward(z, D, np.zeros((5, 4, 2)))
    GroupL2(0.1, [0, 2, 5]).prox(np.zeros((5, 2)), 1.0)
    assert before == {name: len(kernel.signatures) for name, kernel in kernels.items()}
