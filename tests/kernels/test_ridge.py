import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels.losses import SquaredMoments
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.ridge import ridge, ridge_absolute, ridge_path
from edgesolve.kernels.solution import Status


def rows(rng, n=200, d=6, c=3):
    x = 3.0 + rng.standard_normal((n, d)) * np.geomspace(1, 10, d)
    return x, x @ rng.standard_normal((d, c)) + rng.standard_normal((n, c)) - 2.0


def test_no_ridge_is_least_squares(rng, accepts_only):
    x, t = rows(rng)
    s = ridge(Moments.of(x, t), 0.0)
    slow = np.linalg.lstsq(np.c_[x, np.ones(len(x))], t)[0]
    accepts_only(lambda got: assert_allclose(got, slow[:-1], rtol=1e-8), s.weights)
    accepts_only(lambda got: assert_allclose(got, slow[-1], rtol=1e-8), s.intercept)
    assert s.status is Status.CONVERGED and s.kkt < 1e-12 and 0 <= s.relative_gap < 1e-12


@pytest.mark.parametrize("d", [6, 64, 65, 150])  # around the blocks of the triangular solve
def test_ridge_is_scikit_learns(rng, accepts_only, d):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, t = rows(rng, d=d)
    m = Moments.of(x, t)
    s = ridge(m, 0.02)
    slow = linear_model.Ridge(alpha=len(x) * ridge_absolute(m, 0.02), tol=1e-12).fit(x, t)
    accepts_only(lambda got: assert_allclose(got, slow.coef_.T, rtol=1e-7, atol=1e-9), s.weights)
    assert_allclose(s.intercept, slow.intercept_, rtol=1e-7)
    assert s.status is Status.CONVERGED and s.relative_gap < 1e-12


def test_ridge_is_relative_to_the_mean_variance(rng):
    x, t = rows(rng)
    assert_allclose(ridge_absolute(Moments.of(x, t), 0.3), 0.3 * x.var(axis=0).mean())


def test_units_of_the_features_do_not_matter(rng):
    x, t = rows(rng)
    a, b = ridge(Moments.of(x, t), 0.02), ridge(Moments.of(1000 * x, t), 0.02)
    assert_allclose(a.weights, 1000 * b.weights, rtol=1e-9)
    assert_allclose(a.objective, b.objective)


def test_dependent_and_constant_features_get_the_minimum_norm(rng, accepts_only):
    x, t = rows(rng)
    x[:, 1], x[:, 4] = 2 * x[:, 0], 7.0
    s = ridge(Moments.of(x, t), 0.0)
    slow = np.linalg.pinv(x - x.mean(0)) @ (t - t.mean(0))
    accepts_only(lambda got: assert_allclose(got, slow, rtol=1e-8, atol=1e-9), s.weights)
    assert s.status is Status.CONVERGED
    assert_allclose(s.weights[4], 0, atol=1e-12)
    assert_allclose(ridge(Moments.of(x, t), 1e-9).weights, slow, rtol=1e-6, atol=1e-5)


def test_dependence_is_seen_where_rounding_hides_it(rng):
    """Rounding makes half of these covariances positive definite: a plain Cholesky would go on."""
    for _ in range(20):
        x, t = rows(rng)
        x[:, 1] = 2 * x[:, 0] + x[:, 2]
        s = ridge(Moments.of(x, t), 0.0)
        slow = np.linalg.pinv(x - x.mean(0)) @ (t - t.mean(0))
        assert_allclose(s.weights, slow, rtol=1e-6, atol=1e-8)


def test_fewer_rows_than_features(rng):
    x, t = rows(rng, n=4, d=10)
    s = ridge(Moments.of(x, t), 0.0)
    assert_allclose(x @ s.weights + s.intercept, t, rtol=1e-8)
    assert s.status is Status.CONVERGED


def test_features_without_variance_leave_the_mean(rng):
    t = rng.standard_normal((20, 3))
    s = ridge(Moments.of(np.full((20, 4), 0.5), t), 0.1)
    assert s.status is Status.CONVERGED and s.relative_gap == 0
    assert not s.weights.any()
    assert_allclose(s.intercept, t.mean(0))


def test_a_record_that_no_rows_have_is_not_accepted(rng):
    """The targets move with a feature that does not: the certificate says so."""
    m = Moments.of(*rows(rng))
    sxx = m.sxx.copy()
    sxx[0], sxx[:, 0] = m.sx[0] * m.sx / m.n, m.sx[0] * m.sx / m.n
    s = ridge(Moments(m.n, m.sx, sxx, m.stx, m.st, m.stt), 0.0)
    assert s.status is Status.ILL_CONDITIONED and s.relative_gap > 1e-3


def test_what_is_not_finite_is_said(rng):
    m = Moments.of(*rows(rng))
    for at, value in (((1, 1), np.inf), ((1, 1), np.nan), ((0, 1), np.nan)):
        sxx = m.sxx.copy()
        sxx[at] = value
        s = ridge(Moments(m.n, m.sx, sxx, m.stx, m.st, m.stt), 0.1)
        assert s.status is Status.NOT_FINITE and s.weights.shape == (6, 3)


def test_objective_is_half_the_error_plus_the_ridge(rng):
    m = Moments.of(*rows(rng))
    s = ridge(m, 0.3)
    size = ridge_absolute(m, 0.3) / 2 * np.sum(s.weights**2)
    assert_allclose(s.objective, m.mean_squared_error(s.weights, s.intercept) / 2 + size)


@pytest.mark.parametrize("d", [6, 250])  # with fewer rows than features, too
def test_path_is_the_solves_one_by_one(rng, d):
    x, t = rows(rng, n=200, d=d)
    fit, held_out = Moments.of(x[:150], t[:150]), Moments.of(x[150:], t[150:])
    grid = [1.0, 0.0, 1e-4, 1e-2]
    path = ridge_path(fit, held_out, grid)
    assert [r for r, _ in path] == grid
    for relative, error in path:
        s = ridge(fit, relative)
        direct = np.mean(np.sum((t[150:] - x[150:] @ s.weights - s.intercept) ** 2, axis=1))
        assert_allclose(error, direct, rtol=1e-5)
    assert len({round(error, 3) for _, error in path}) > 2


def test_scaling_is_that_of_the_losses(rng):
    m = Moments.of(*rows(rng))
    s = ridge(m, 0.3)
    loss = SquaredMoments.of(m, ridge_absolute(m, 0.3))
    assert_allclose(loss.grad(s.weights), 0, atol=1e-12 * np.abs(loss.q).max())


def test_errors(rng):
    m = Moments.of(*rows(rng))
    for bad in (-0.1, np.nan):
        with pytest.raises(ValueError, match="ridge_relative"):
            ridge(m, bad)
        with pytest.raises(ValueError, match="grid"):
            ridge_path(m, m, [0.1, bad])
