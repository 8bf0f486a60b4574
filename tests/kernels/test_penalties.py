import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels.losses import SquaredMoments
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.penalties import GroupL2, lam_max

STARTS = np.array([0, 2, 3, 6])
WEIGHTS = np.array([1.0, 2.0, 0.5])


def test_value_is_the_weighted_sum_of_norms(rng):
    U = rng.standard_normal((6, 2))
    parts = [np.linalg.norm(part) for part in np.split(U, STARTS[1:-1])]
    assert_allclose(GroupL2(0.3, STARTS, WEIGHTS).value(U), 0.3 * WEIGHTS @ parts)
    assert_allclose(GroupL2(0.3, STARTS).value(U), 0.3 * sum(parts))


def test_prox_minimises_its_definition(rng, twin, accepts_only):
    penalty, step = GroupL2(0.4, STARTS, WEIGHTS), 0.7
    V = rng.standard_normal((6, 2))

    def objective(flat):
        U = flat.reshape(V.shape)
        return penalty.value(U) + np.vdot(U - V, U - V) / (2 * step)

    optimize = pytest.importorskip("scipy.optimize", reason="no SciPy on a device")
    slow = optimize.minimize(
        objective, V.ravel(), method="Powell", options={"xtol": 1e-9, "ftol": 1e-14}
    )
    answer = penalty.prox(V, step)
    assert answer is not V and objective(answer.ravel()) <= slow.fun + 1e-12
    accepts_only(
        lambda got: assert_allclose(got, slow.x.reshape(V.shape), rtol=1e-3, atol=1e-4), answer
    )


def test_kkt_is_zero_exactly_at_an_optimum(rng, twin):
    """U = prox(V) minimises penalty + ||U - V||^2/2, whose smooth gradient is U - V."""
    penalty, V = GroupL2(0.9, STARTS, WEIGHTS), rng.standard_normal((6, 2))
    U = penalty.prox(V, 1.0)
    assert penalty.kkt(U, U - V) < 1e-14
    for other in (1.01 * U, U + 0.01, np.zeros_like(U)):
        assert penalty.kkt(other, other - V) > 1e-3


def test_kkt_is_a_distance(rng):
    """No subgradient that we can sample comes closer to -grad."""
    penalty = GroupL2(0.9, STARTS)
    U, grad = rng.standard_normal((6, 2)), rng.standard_normal((6, 2))
    U[2:] = 0
    distance = penalty.kkt(U, grad)
    on = 0.9 * U[:2] / np.linalg.norm(U[:2])
    nearest = np.inf
    for _ in range(500):
        off = [rng.standard_normal(s) for s in ((1, 2), (3, 2))]
        off = [0.9 * rng.random() ** 0.2 * o / np.linalg.norm(o) for o in off]
        nearest = min(nearest, np.linalg.norm(grad + np.vstack([on, *off])))
    assert distance <= nearest < 1.5 * distance


def test_zero_is_optimal_from_lam_max_on(rng):
    x = rng.standard_normal((50, 6))
    loss = SquaredMoments.of(Moments.of(x, x[:, :2] + rng.standard_normal((50, 2))), 0.1)
    zero = np.zeros((6, 2))
    for weights in (WEIGHTS, np.roll(WEIGHTS, 1), np.roll(WEIGHTS, 2)):
        top = lam_max(loss, STARTS, weights)
        assert GroupL2(top * (1 + 1e-12), STARTS, weights).kkt(zero, loss.grad(zero)) == 0
        assert GroupL2(top * 0.99, STARTS, weights).kkt(zero, loss.grad(zero)) > 0


def test_errors():
    for lam in (-1.0, np.nan):
        with pytest.raises(ValueError, match="lam"):
            GroupL2(lam, STARTS)
    for starts in ([1, 2], [0, 2, 2], [0], [[0, 1]]):
        with pytest.raises(ValueError, match="starts"):
            GroupL2(1.0, np.array(starts))
    for weights in ([1.0, 1.0], [1.0, 0.0, 1.0]):
        with pytest.raises(ValueError, match="weights"):
            GroupL2(1.0, STARTS, np.array(weights))
