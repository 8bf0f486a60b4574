from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels.designs import Explicit
from edgesolve.kernels.losses import SquaredMoments, SquaredRows
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.ridge import ridge_of_loss
from edgesolve.kernels.sample_space import leave_one_out, ridge_rows
from edgesolve.kernels.solution import Status


def problem(rng, design, A, ridge=0.1, intercept=True, c=2):
    t = A[:, :1] + rng.standard_normal((len(A), c)) + 3.0
    return SquaredRows.of(design, t, ridge, intercept=intercept), t


def test_it_is_the_ridge_of_the_moments(rng, make_design, accepts_only):
    design, A = make_design(rng, 25, np.float32)
    for ridge in (1e-4, 0.1, 10.0):
        loss, t = problem(rng, design, A, ridge)
        slow = ridge_of_loss(SquaredMoments.of(Moments.of(A, t), ridge))
        s = ridge_rows(loss)
        assert s.status is Status.CONVERGED and s.relative_gap < 1e-12 and s.kkt < 1e-8
        close = 1e-6 * np.abs(slow.weights).max()
        accepts_only(
            lambda got, a=slow.weights, b=close: assert_allclose(got, a, atol=b), s.weights
        )
        assert_allclose(s.intercept, slow.intercept, rtol=1e-6)
        assert_allclose(s.objective, slow.objective, rtol=1e-9)


def test_without_intercept_it_is_the_normal_equations(rng, make_design):
    design, A = make_design(rng, 25, np.float64)
    loss, t = problem(rng, design, A, intercept=False)
    slow = np.linalg.solve(A.T @ A / 25 + 0.1 * np.eye(A.shape[1]), A.T @ t / 25)
    s = ridge_rows(loss)
    assert_allclose(s.weights, slow, rtol=1e-8, atol=1e-10)
    assert not s.intercept.any()


@pytest.mark.parametrize("intercept", [True, False])
def test_leave_one_out_is_brute_force(rng, make_design, accepts_only, intercept):
    design, A = make_design(rng, 13, np.float64)
    loss, t = problem(rng, design, A, 0.2, intercept)
    slow = []
    for r in range(13):
        B, y = np.delete(A, r, axis=0), np.delete(t, r, axis=0)
        mean_b, mean_y = (B.mean(0), y.mean(0)) if intercept else (0.0, 0.0)
        B, y = B - mean_b, y - mean_y
        U = np.linalg.solve(B.T @ B + 13 * 0.2 * np.eye(A.shape[1]), B.T @ y)  # n ridge as for 13
        slow.append(t[r] - mean_y - (A[r] - mean_b) @ U)
    accepts_only(lambda got: assert_allclose(got, slow, rtol=1e-7, atol=1e-9), leave_one_out(loss))


def test_one_row_and_duplicated_rows(rng):
    one = SquaredRows.of(Explicit(np.ones((1, 3)), [0, 3]), np.array([[2.0]]), 0.1)
    s = ridge_rows(one)
    assert not s.weights.any() and s.intercept == 2.0
    x = np.repeat(rng.standard_normal((4, 6)), 3, axis=0)
    s = ridge_rows(SquaredRows.of(Explicit(x, [0, 6]), x[:, :1], 1e-6))
    assert s.status is Status.CONVERGED and s.relative_gap <= 1e-6


def test_a_ridge_below_rounding_ends_with_a_sentence(rng):
    x = rng.standard_normal((12, 3)) @ rng.standard_normal((3, 30))
    for ridge in (1e-13, 1e-30, 1e-300):
        loss = SquaredRows.of(Explicit(x, [0, 30]), rng.standard_normal((12, 1)), ridge)
        s = ridge_rows(loss)
        assert s.status in (Status.CONVERGED, Status.ILL_CONDITIONED, Status.NOT_FINITE)
        assert (s.status is Status.CONVERGED) == (s.relative_gap <= 1e-6)


def test_nearly_no_ridge_does_not_blow_up_the_direction_of_the_intercept(rng):
    """Rows span everything but the ones, which centring takes out: rounding has to stay out too."""
    x = rng.standard_normal((12, 40)) + 2.0
    t = rng.standard_normal((12, 2))
    s = ridge_rows(SquaredRows.of(Explicit(x, [0, 40]), t, 1e-10))
    assert s.status is Status.CONVERGED
    assert_allclose(x @ s.weights + s.intercept, t, atol=1e-6)


def test_what_is_not_finite_is_said(rng):
    x = rng.standard_normal((9, 4))
    loss = SquaredRows.of(Explicit(x, [0, 4]), x[:, :1], 0.1)
    Y = loss.Y.copy()
    Y[0] = np.nan
    assert ridge_rows(replace(loss, Y=Y)).status is Status.NOT_FINITE


def test_errors(rng):
    x = rng.standard_normal((9, 4))
    loss = SquaredRows.of(Explicit(x, [0, 4]), x[:, :1], 0.0)
    for call in (ridge_rows, leave_one_out):
        with pytest.raises(ValueError, match="needs ridge > 0"):
            call(loss)
