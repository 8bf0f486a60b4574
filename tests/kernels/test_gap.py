"""gap >= P(U) - P* >= 0 everywhere and small at the optimum; mutants of it are caught."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels import fista as fista_module
from edgesolve.kernels import gap as gap_module
from edgesolve.kernels.designs import Pooled
from edgesolve.kernels.fista import fista
from edgesolve.kernels.gap import duality_gap, relative_gap
from edgesolve.kernels.gated import gated_pool
from edgesolve.kernels.losses import SquaredMoments, SquaredRows
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.penalties import GroupL2, lam_max

N, R, M, C = 120, 6, 10, 3
EVEN = np.arange(M + 1) * R


def gates(lam, m, r):
    return GroupL2(lam, EVEN)


def problem(rng, ridge, make=gates, rows=False):
    """A loss with an intercept, and the penalty at a tenth of its lam_max."""
    z = rng.standard_normal((N, 1, R))
    D = np.einsum("npr,mr->npm", z, rng.standard_normal((M, R))) >= 0
    A = gated_pool(z, D)
    t = A @ rng.standard_normal((M * R, C)) / 3 + rng.standard_normal((N, C)) + 2.0
    loss = SquaredMoments.of(Moments.of(A, t), ridge)
    if rows:
        loss = SquaredRows.of(Pooled(z, D), t, ridge)
    return loss, make(0.1 * lam_max(loss, make(1.0, M, R)), M, R)


def visited(loss, penalty, monkeypatch):
    """The best objective, and each of the first 100 points on the way to it."""
    points = []
    with monkeypatch.context() as patch:
        patch.setattr(fista_module, "CHECK_EVERY", 1)
        some = fista(
            loss, penalty, tol=0.0, max_iter=100, callback=lambda k, U, P, kkt: points.append(U)
        )
    return fista(loss, penalty, some.weights, tol=1e-13, max_iter=1500), points


def assert_certifies(loss, penalty, best, points):
    """`loss` is what the certificate is given, best.objective and `points` are the truth's."""
    assert duality_gap(loss, penalty, best.weights)[0] <= 1e-10 * best.objective
    for U in points:
        gap, objective = duality_gap(loss, penalty, U)
        assert gap >= objective - best.objective - 1e-12
        assert objective - best.objective >= -1e-12


class Mutant:
    """A loss whose `residual` is wrong, as a slip in gap.py would make it."""

    def __init__(self, loss, residual):
        self.residual, self.ridge, self.value = residual, loss.ridge, loss.value


def slip(change):
    return lambda loss: Mutant(loss, lambda U: change(*loss.residual(U)))


def not_projected(loss):
    mean_x, mean_t = loss.mean_x, loss.mean_t
    raw = replace(
        loss,
        Q=loss.Q + np.outer(mean_x, mean_x),
        q=loss.q + np.outer(mean_x, mean_t),
        y2=loss.y2 + mean_t @ mean_t,
    )
    return Mutant(loss, raw.residual)


MUTANTS = {
    "n c for n": slip(lambda V, rr, ry: (V / C, rr / C, ry / C)),
    "V not divided by n": slip(lambda V, rr, ry: (V * N, rr, ry)),
    "sign of V": slip(lambda V, rr, ry: (-V, rr, ry)),
    "permuted V": slip(lambda V, rr, ry: (np.roll(V, 1, axis=0), rr, ry)),
    "zero V": slip(lambda V, rr, ry: (0 * V, rr, ry)),
    "half the residual": slip(lambda V, rr, ry: (V, rr / 2, ry)),
    "intercept not projected out": not_projected,
}


@pytest.mark.parametrize("ridge", [0.0, 1e-5, 0.05])
def test_the_gap_bounds_the_error_everywhere(rng, monkeypatch, make_penalty, ridge):
    loss, penalty = problem(rng, ridge, make_penalty)
    best, points = visited(loss, penalty, monkeypatch)
    assert len(points) > 90
    anywhere = [s * rng.standard_normal(loss.shape) for s in np.geomspace(1e-3, 10, 20)]
    points += anywhere
    assert_certifies(loss, penalty, best, points)
    assert all(duality_gap(loss, penalty, U)[0] > 0 for U in anywhere)
    for mutant in MUTANTS.values():
        with pytest.raises(AssertionError):
            assert_certifies(mutant(loss), penalty, best, points)


@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("name", ["gates", "ragged ranks"])
def test_the_gap_from_rows_is_that_from_moments(rng, penalties, name, ridge):
    twin_rng = copy.deepcopy(rng)
    a, penalty = problem(rng, ridge, penalties[name])
    b, _ = problem(twin_rng, ridge, penalties[name], rows=True)
    for scale in np.geomspace(1e-3, 10, 10):
        U, W = scale * rng.standard_normal((2, *a.shape))
        found = [duality_gap(loss, penalty, U, dual) for loss in (a, b) for dual in (None, W)]
        assert_allclose(found[:2], found[2:], rtol=1e-9)


class Confused:
    """A penalty that takes another's for its dual norm, and for the prox that follows from it."""

    def __init__(self, right, wrong):
        self.lam, self.limit, self.value = right.lam, right.limit, right.value
        self.norms, self.inner = right.norms, right.inner
        self.dual_norms, self.prox = wrong.dual_norms, wrong.prox


@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize(
    "right, wrong",
    [("gates", "ranks"), ("ranks", "gates"), ("outputs", "gates"), ("gates", "outputs")],
)
def test_the_wrong_dual_norm_is_caught(rng, monkeypatch, penalties, right, wrong, ridge):
    loss, penalty = problem(rng, ridge, penalties[right])
    best, points = visited(loss, penalty, monkeypatch)
    confused = Confused(penalty, penalties[wrong](penalty.lam, M, R))
    with pytest.raises(AssertionError):
        assert_certifies(loss, confused, best, points)


def best_dual_value(loss, penalty, W):
    """The largest D(s R_W/n) on a fine grid of s, by the definition of D and a subtraction."""
    V, rr, ry = loss.residual(W)
    top = float(np.min(penalty.limit / penalty.dual_norms(V)))
    if loss.ridge == 0:
        s = np.linspace(-top, top, 20_001)
        return np.max(s * ry - 0.5 * s * s * rr)
    values = []
    for s in (1.0, min(1.0, np.min(penalty.limit / penalty.dual_norms(V - loss.ridge * W)))):
        E = penalty.prox(s * V, 1.0)
        values.append(s * ry - 0.5 * s * s * rr - np.vdot(E, E) / (2 * loss.ridge))
    return max(values)


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_any_weights_give_a_dual_point(rng, make_penalty, ridge):
    loss, penalty = problem(rng, ridge, make_penalty)
    best = fista(loss, penalty, tol=1e-13, max_iter=1500)
    near = best.weights + 1e-3 * rng.standard_normal(loss.shape)
    for U in (near, *(s * rng.standard_normal(loss.shape) for s in (1e-3, 0.1, 10.0))):
        own, objective = duality_gap(loss, penalty, U)
        error = objective - best.objective
        duals = [s * rng.standard_normal(loss.shape) for s in (1e-3, 0.1, 10.0)]
        for W in (U, near, best.weights, 0.9 * best.weights, 0 * U, *duals):
            gap, same = duality_gap(loss, penalty, U, W)
            assert error - 1e-12 * max(1.0, error) <= gap <= own and same == objective
            exact = min(own, objective - best_dual_value(loss, penalty, W))
            assert_allclose(gap, exact, rtol=1e-6, atol=1e-12)
        assert_allclose(duality_gap(loss, penalty, U, best.weights)[0], error, rtol=1e-5)
        assert duality_gap(loss, penalty, U, np.nan * U)[0] == own


def test_the_dual_point_is_the_best_on_its_ray(rng):
    loss, _ = problem(rng, 0.0)
    top = lam_max(loss, GroupL2(1.0, EVEN))
    for lam, scale in ((0.1, 1e-2), (0.1, 1.0), (30.0, 1e-2), (30.0, 0.3)):
        penalty, U = GroupL2(lam * top, EVEN), scale * rng.standard_normal(loss.shape)
        gap, objective = duality_gap(loss, penalty, U)
        V, rr, ry = loss.residual(U)
        s_max = penalty.lam / max(np.linalg.norm(part) for part in np.split(V, EVEN[1:-1]))
        s = np.linspace(-s_max, s_max, 200_001)
        assert_allclose(gap, objective - np.max(s * ry - s * s * rr / 2), rtol=1e-5)


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


@pytest.mark.parametrize("tile", [1 << 18, 7 * N])
def test_rows_without_penalty_are_certified_as_well(rng, monkeypatch, accepts_only, tile):
    monkeypatch.setattr(gap_module, "TILE_FLOATS", tile)
    loss, _ = problem(rng, 0.0, rows=True)
    A = gated_pool(loss.design.z, loss.design.D)
    A = A - A.mean(axis=0)
    best = np.linalg.lstsq(A, loss.Y)[0]
    errors, gaps = [], []
    for scale in np.geomspace(1e-5, 1, 10):
        U = best + scale * rng.standard_normal(loss.shape)
        gap, objective = duality_gap(loss, None, U)
        gaps.append(gap / objective)
        errors.append(0.5 * np.sum((A @ (U - best)) ** 2) / N / objective)
    accepts_only(lambda got: assert_allclose(got, errors, rtol=1e-3, atol=1e-13), gaps)
    # Fewer rows than weights, or more weights than a Gram may have: the trivial bound.
    few = SquaredRows.of(Pooled(loss.design.z[:40], loss.design.D[:40]), loss.Y[:40], 0.0)
    monkeypatch.setattr(gap_module, "GRAM_WEIGHTS", M * R - 1)
    for trivial in (few, loss):
        assert duality_gap(trivial, None, U) == (trivial.value(U), trivial.value(U))


def test_a_perfect_fit_is_not_spoilt_by_rounding(rng):
    x = rng.standard_normal((50, 4))
    U = rng.standard_normal((4, 2))
    loss = SquaredMoments.of(Moments.of(x, x @ U), 0.0)
    assert abs(relative_gap(loss, None, U)) < 1e-9
    assert relative_gap(loss, None, 1.001 * U) > 1e-9
