"""gap >= P(U) - P* >= 0 everywhere and small at the optimum; mutants of it are caught."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels import gap as gap_module
from edgesolve.kernels.fista import fista
from edgesolve.kernels.gap import duality_gap, relative_gap
from edgesolve.kernels.gated import gated_pool
from edgesolve.kernels.losses import SquaredGated, SquaredMoments
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.penalties import GroupL2, lam_max

N, R, M, C = 120, 6, 10, 3
EVEN, RAGGED = np.arange(M + 1) * R, np.array([0, 1, 4, 20, 21, 40, 60])
WEIGHTS = np.array([1.0, 0.5, 3.0, 1.0, 2.0, 1.0])


def problem(rng, ridge, starts=EVEN, weights=None, rows=False):
    z = rng.standard_normal((N, 1, R))
    D = np.einsum("npr,mr->npm", z, rng.standard_normal((M, R))) >= 0
    A = gated_pool(z, D)
    t = A @ rng.standard_normal((M * R, C)) / 3 + rng.standard_normal((N, C)) + 2.0
    loss = SquaredMoments.of(Moments.of(A, t), ridge)
    if rows:
        loss = SquaredGated.of(z, D, t, ridge)
    return loss, GroupL2(0.1 * lam_max(loss, starts, weights), starts, weights)


def visited(loss, penalty):
    """The best objective, and the points on the way to it."""
    points = []
    best = fista(
        loss, penalty, tol=1e-13, max_iter=1500, callback=lambda k, U, P, kkt: points.append(U)
    )
    return best, points


def assert_certifies(loss, penalty, best, points):
    """`loss` is what the certificate is given, best.objective and `points` are the truth's."""
    for U in points:
        gap, objective = duality_gap(loss, penalty, U)
        assert gap >= objective - best.objective - 1e-12
        assert objective - best.objective >= -1e-12
    assert duality_gap(loss, penalty, best.weights)[0] <= 1e-10 * best.objective


GROUPS = [(EVEN, None), (RAGGED, None), (RAGGED, WEIGHTS)]


@pytest.mark.parametrize("rows", [False, True], ids=["moments", "rows"])
@pytest.mark.parametrize("starts, weights", GROUPS, ids=["even", "ragged", "weighted"])
@pytest.mark.parametrize("ridge", [0.0, 1e-5, 0.05])
def test_the_gap_bounds_the_error_everywhere(rng, ridge, starts, weights, rows):
    twin_rng = copy.deepcopy(rng)
    loss, penalty = problem(rng, ridge, starts, weights)
    best, points = visited(loss, penalty)
    if rows:
        loss, penalty = problem(twin_rng, ridge, starts, weights, rows)
    assert len(points) > 5
    anywhere = [s * rng.standard_normal(loss.shape) for s in np.geomspace(1e-3, 10, 50)]
    assert_certifies(loss, penalty, best, points + anywhere)
    assert all(duality_gap(loss, penalty, U)[0] > 0 for U in anywhere)


def test_the_dual_point_is_the_best_on_its_ray(rng):
    loss, _ = problem(rng, 0.0)
    top = lam_max(loss, EVEN)
    for lam, scale in ((0.1, 1e-2), (0.1, 1.0), (30.0, 1e-2), (30.0, 0.3)):
        penalty, U = GroupL2(lam * top, EVEN), scale * rng.standard_normal(loss.shape)
        gap, objective = duality_gap(loss, penalty, U)
        V, rr, ry = loss.residual(U)
        s_max = penalty.lam / max(np.linalg.norm(part) for part in np.split(V, EVEN[1:-1]))
        s = np.linspace(-s_max, s_max, 200_001)
        assert_allclose(gap, objective - np.max(s * ry - s * s * rr / 2), rtol=1e-5)


def spectral_norms(v, starts):
    return np.array([np.linalg.norm(part, 2) for part in np.split(v, starts[1:-1])])


class Mutant:
    """A loss whose `residual` is wrong, as a slip in gap.py would make it."""

    def __init__(self, loss, change):
        self.loss, self.change, self.ridge = loss, change, loss.ridge
        self.value = loss.value

    def residual(self, U):
        return self.change(*self.loss.residual(U))


MUTANTS = {
    "n c for n": lambda V, rr, ry: (V / C, rr / C, ry / C),
    "V not divided by n": lambda V, rr, ry: (V * N, rr, ry),
    "sign of V": lambda V, rr, ry: (-V, rr, ry),
    "permuted V": lambda V, rr, ry: (np.roll(V, 1, axis=0), rr, ry),
    "zero V": lambda V, rr, ry: (0 * V, rr, ry),
    "half the residual": lambda V, rr, ry: (V, rr / 2, ry),
}


@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_residual_are_caught(rng, name, ridge):
    loss, penalty = problem(rng, ridge)
    best, points = visited(loss, penalty)
    assert_certifies(loss, penalty, best, points)
    with pytest.raises(AssertionError):
        assert_certifies(Mutant(loss, MUTANTS[name]), penalty, best, points)


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_the_wrong_dual_norm_is_caught(rng, monkeypatch, ridge):
    loss, penalty = problem(rng, ridge)
    best, points = visited(loss, penalty)
    monkeypatch.setattr(gap_module, "group_norms", spectral_norms)
    with pytest.raises(AssertionError):
        assert_certifies(loss, penalty, best, points)


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_an_intercept_that_is_not_projected_out_is_caught(rng, ridge):
    loss, penalty = problem(rng, ridge)
    best, points = visited(loss, penalty)
    mean_x, mean_t = loss.mean_x, loss.mean_t
    raw = replace(
        loss,
        Q=loss.Q + np.outer(mean_x, mean_x),
        q=loss.q + np.outer(mean_x, mean_t),
        y2=loss.y2 + mean_t @ mean_t,
    )

    class NotProjected(Mutant):
        def residual(self, U):
            return raw.residual(U)

    with pytest.raises(AssertionError):
        assert_certifies(NotProjected(loss, None), penalty, best, points)


def test_without_penalty_the_gap_is_the_error(rng):
    for ridge in (0.0, 0.05):
        loss, _ = problem(rng, ridge)
        best = np.linalg.solve(loss.Q + ridge * np.eye(len(loss.Q)), loss.q)
        for scale in np.geomspace(1e-5, 1, 10):
            U = best + scale * rng.standard_normal(loss.shape)
            gap, objective = duality_gap(loss, None, U)
            error = objective - loss.value(best)
            if ridge == 0.0:
                assert_allclose(gap, error, rtol=1e-3, atol=1e-13)
            assert gap >= error - 1e-13
            assert duality_gap(loss, GroupL2(0.0, EVEN), U) == (gap, objective)
        assert 0 <= relative_gap(loss, None, best) < 1e-13


def test_the_ridge_gap_is_the_closed_form(rng):
    loss, _ = problem(rng, 0.05)
    U = rng.standard_normal(loss.shape)
    gap, _ = duality_gap(loss, None, U)
    assert_allclose(gap, np.sum(loss.grad(U) ** 2) / (2 * 0.05))
    near = np.linalg.solve(loss.Q + 0.05 * np.eye(len(loss.Q)), loss.q) + 1e-4
    almost, closed = (duality_gap(loss, p, near)[0] for p in (GroupL2(1e-12, EVEN), None))
    assert_allclose(almost, closed, rtol=1e-5)


def test_a_tiny_ridge_does_not_spoil_the_gap(rng):
    """s = 1 alone would be useless: V's excess over lam is divided by the ridge."""
    loss, penalty = problem(rng, 1e-8)
    rough = fista(loss, penalty, max_iter=60, tol=0.0)
    assert rough.relative_gap < 1e-3
    V, _, _ = loss.residual(rough.weights)
    norms = np.array([np.linalg.norm(part) for part in np.split(V, EVEN[1:-1])])
    at_one = np.sum(np.maximum(norms - penalty.lam, 0) ** 2) / 2e-8
    assert at_one > 100 * rough.relative_gap * rough.objective


def test_rows_without_penalty_get_the_trivial_bound(rng):
    loss, _ = problem(rng, 0.0, rows=True)
    U = rng.standard_normal(loss.shape)
    assert duality_gap(loss, None, U) == (loss.value(U), loss.value(U))


def test_a_perfect_fit_is_not_spoilt_by_rounding(rng):
    x = rng.standard_normal((50, 4))
    U = rng.standard_normal((4, 2))
    loss = SquaredMoments.of(Moments.of(x, x @ U), 0.0)
    assert abs(relative_gap(loss, None, U)) < 1e-9
    assert relative_gap(loss, None, 1.001 * U) > 1e-9
