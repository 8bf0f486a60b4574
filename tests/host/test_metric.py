"""The quadratic form, against the rows that it was taken of."""

from __future__ import annotations

import numpy as np
import pytest

from edgesolve.host.metric import Metric
from edgesolve.kernels.moments import Moments

T, D, N = 3, 7, 200


@pytest.fixture(scope="module")
def data():
    """Rows x (N, D), which the targets t were not made of exactly, and a weight W (T, D)."""
    g = np.random.default_rng(0)
    clean = (
        g.standard_normal((N, D)) @ (g.standard_normal((D, D)) * 0.7 ** np.arange(D)[:, None]) + 2.0
    )
    W = g.standard_normal((T, D))
    return clean + 0.2 * g.standard_normal((N, D)), clean @ W.T - 1.0, W


@pytest.fixture(scope="module")
def metric(data):
    return Metric.of(Moments.of(*data[:2]))


def mean_square(rows):
    return float(np.mean(np.sum(rows**2, axis=1)))


def fitted(x, t):
    """Least squares with an intercept: (weight (T, D), bias (T,))."""
    z = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), t, rcond=1e-12)[0]
    return z[:-1].T, z[-1]


def test_the_distortion_is_the_error_on_the_rows(data, metric, accepts_only):
    x, t, W = data

    def measured(weight):
        found = mean_square(t - x @ weight.T - metric.bias(W))
        assert found == pytest.approx(metric.distortion(W), rel=1e-10)

    accepts_only(measured, W)


def test_the_bias_is_the_best_one(data, metric):
    x, t, W = data
    np.testing.assert_allclose(metric.bias(W), np.mean(t - x @ W.T, axis=0), atol=1e-10)


def test_a_convolution_weight_is_taken_as_its_rows(metric, data):
    weight = data[2].reshape(T, D, 1, 1)
    assert metric.distortion(weight) == metric.distortion(data[2])
    np.testing.assert_array_equal(metric.bias(weight), metric.bias(data[2]))


def test_least_squares_is_that_of_the_rows(data, metric, accepts_only):
    expected, bias = fitted(*data[:2])

    def equal(weight):
        np.testing.assert_allclose(weight, expected, atol=1e-8)

    accepts_only(equal, metric.least_squares())
    np.testing.assert_allclose(metric.bias(expected), bias, atol=1e-8)


def test_whitening_splits_the_distortion(data, metric):
    R, P, M = metric.whitened()
    np.testing.assert_allclose(R @ R.T, metric.S, atol=1e-12)
    np.testing.assert_allclose(P @ R, np.eye(D), atol=1e-10)
    W = data[2]
    split = metric.v - np.vdot(M, M) + np.vdot(M - W @ R, M - W @ R)
    assert split == pytest.approx(metric.distortion(W), rel=1e-9)


def test_a_rank_deficient_input_has_a_thin_root(data):
    x, t, _ = data
    x = np.column_stack([x[:, :-2], x[:, 0] + x[:, 1], np.full(N, 3.0)])
    metric = Metric.of(Moments.of(x, t))
    R, P = metric.root()
    assert R.shape == (D, D - 2)
    np.testing.assert_allclose(R @ R.T, metric.S, atol=1e-9)
    np.testing.assert_allclose(P, np.linalg.pinv(R), atol=1e-8)
    weight, bias = fitted(x, t)
    least = mean_square(t - x @ weight.T - bias)
    assert metric.distortion(metric.least_squares()) == pytest.approx(least, rel=1e-8)
    np.testing.assert_allclose(
        metric.solve(metric.S), np.linalg.pinv(metric.S, rcond=1e-10) @ metric.S, atol=1e-8
    )


def test_an_input_that_never_changes(data):
    metric = Metric.of(Moments.of(np.ones((5, D)), data[1][:5]))
    assert not np.any(metric.least_squares())
    assert metric.distortion(metric.least_squares()) == pytest.approx(metric.v)


def test_the_symmetric_form_is_the_layers_own_output(data):
    x, _, W = data
    metric = Metric.symmetric(W, np.cov(x.T, bias=True))
    other = W + 0.1
    expected = mean_square((x - x.mean(axis=0)) @ (W - other).T)
    assert metric.distortion(other) == pytest.approx(expected, rel=1e-9)
    assert metric.distortion(W) < 1e-12 * metric.v
    np.testing.assert_allclose(metric.least_squares(), W, atol=1e-8)


def test_the_weight_space_is_the_frobenius_norm():
    W, other = np.random.default_rng(1).standard_normal((2, 4, 3, 2, 2))
    assert Metric.weight_space(W).distortion(other) == pytest.approx(np.sum((W - other) ** 2))


def test_a_ridge_is_rows_that_pull_toward_the_weight(data, metric):
    x, t, W = data
    lam = 1e-2 * np.trace(metric.S) / D
    ridged = metric.ridged(W, 1e-2)
    for other in (W, 0.0 * W, metric.least_squares()):
        expected = metric.distortion(other) + lam * np.sum((other - W) ** 2)
        assert ridged.distortion(other) == pytest.approx(expected, rel=1e-10)
    centred = np.vstack([x - x.mean(axis=0), np.sqrt(lam * N) * np.eye(D)])
    targets = np.vstack([t - t.mean(axis=0), np.sqrt(lam * N) * W.T])
    expected = np.linalg.lstsq(centred, targets, rcond=None)[0].T
    np.testing.assert_allclose(ridged.least_squares(), expected, atol=1e-8)
    scaled = Metric(4.0 * metric.S, 4.0 * metric.C, 4.0 * metric.v, metric.mu_x, metric.mu_t)
    np.testing.assert_allclose(scaled.ridged(W, 1e-2).least_squares(), expected, atol=1e-8)


def test_an_output_weight_is_that_of_the_rows_up_to_a_constant(data, metric):
    x, t, W = data
    root = np.random.default_rng(2).standard_normal((T, T))
    seen = metric.weighted(root)
    weight, bias = fitted(x, t)
    unexplained = mean_square((t - x @ weight.T - bias) @ root.T)
    for other in (W, 0.5 * W):
        expected = mean_square((t - x @ other.T - metric.bias(other)) @ root.T)
        assert seen.distortion(root @ other) + unexplained == pytest.approx(expected, rel=1e-9)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"for C of shape \(3, 7\), S, mu_x, mu_t must be \(7, 7\)"
    ):
        Metric(np.eye(6), np.zeros((3, 7)), 1.0, np.zeros(7), np.zeros(3))
