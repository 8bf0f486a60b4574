"""Rounding weights to the int8 grid: exactness, error feedback, bias and error predicted from moments."""

import numpy as np
import pytest

from edgesolve.host.metric import Metric
from edgesolve.host.rounding import (
    LEVELS,
    PAIRWISE_LEVELS,
    corrected_bias,
    grid,
    predicted_error,
    round_nearest,
    round_with_feedback,
)
from edgesolve.kernels.moments import Moments

T, D, N = 12, 36, 6000


@pytest.fixture(scope="module")
def rows():
    """Correlated inputs after a ReLU (n, D), one of them dead, and targets (n, T) of a linear map."""
    rng = np.random.default_rng(3)
    mix = rng.standard_normal((D, D)) * rng.uniform(0.2, 2.0, D)
    x = np.maximum(rng.standard_normal((N, D)) @ mix + rng.uniform(-1, 2, D), 0.0)
    x[:, 7] = 0.0
    W = rng.standard_normal((T, D)) * rng.uniform(0.1, 3.0, (T, 1))
    t = x @ W.T + 0.3 + 0.2 * rng.standard_normal((N, T))
    return x, t, W


@pytest.fixture(scope="module")
def metric(rows):
    return Metric.of(Moments.of(rows[0], rows[1]))


def quantiser(weight, levels):
    """What every symmetric per-channel quantiser does, in its own float32: integers (T, D)."""
    weight = weight.astype(np.float32)
    largest = np.abs(weight).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest, 1).astype(np.float32) / np.float32(levels)
    return np.clip(np.rint(weight / scale), -levels, levels).astype(int)


@pytest.mark.parametrize("levels", [LEVELS, PAIRWISE_LEVELS, 7])
def test_a_quantiser_reproduces_what_was_rounded(rows, metric, levels):
    W = rows[2]
    scales = grid(W, levels)
    for Q in (round_nearest(W, scales), round_with_feedback(metric, W, scales)):
        steps = Q / scales[:, None]
        assert np.abs(steps - np.rint(steps)).max() < 1e-9
        assert np.array_equal(quantiser(Q, levels), np.rint(steps).astype(int))
        assert np.array_equal(np.abs(Q).max(1), np.abs(W).max(1))


def test_pairs_of_products_fit_16_bits():
    assert 2 * 255 * PAIRWISE_LEVELS < 2**15 <= 2 * 255 * (PAIRWISE_LEVELS + 1)


def test_nearest_is_nearest(rows):
    W = rows[2]
    scales = grid(W, 7)
    points = scales[:, None, None] * np.arange(-7, 8)
    brute = np.abs(W[:, :, None] - points).argmin(2)
    expected = np.take_along_axis(np.broadcast_to(points, (T, D, 15)), brute[:, :, None], 2)[..., 0]
    np.testing.assert_allclose(round_nearest(W, scales), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("levels", [LEVELS, 7])
def test_feedback_is_never_worse_and_mostly_better(rows, metric, levels):
    x, _, W = rows
    scales = grid(W, levels)
    centred = x - x.mean(0)

    def errors(Q):
        return np.square(centred @ (Q - W).T).mean(0)

    near, fed = errors(round_nearest(W, scales)), errors(round_with_feedback(metric, W, scales))
    assert (fed <= near * (1 + 1e-9)).all()
    assert fed.sum() < 0.8 * near.sum()


def test_feedback_finds_the_best_of_all_roundings():
    """Three inputs, brute force over the 2 x 2 neighbours of the free entries."""
    rng = np.random.default_rng(0)
    wins = []
    for _ in range(30):
        A = rng.standard_normal((3, 3))
        S = A @ A.T + 0.05 * np.eye(3)
        W = np.array([[1.0, *rng.uniform(-0.9, 0.9, 2)]])
        metric, scales = Metric.symmetric(W, S), grid(W, 3)
        low = np.floor(W / scales[0])
        tried = [
            scales[0] * (low + np.array([[0, a, b]])) for a in (-1, 0, 1, 2) for b in (-1, 0, 1, 2)
        ]
        best = min(metric.distortion(q) for q in tried if np.abs(q).max() <= 1.0 + 1e-9)
        found = metric.distortion(round_with_feedback(metric, W, scales))
        assert found >= best - 1e-12
        wins.append(found <= best + 1e-12)
    assert np.mean(wins) > 0.6


def test_convolution_shapes_and_order_of_inputs(rows, metric):
    W = rows[2]
    scales = grid(W)
    shaped = round_with_feedback(metric, W.reshape(T, 4, 3, 3), scales)
    assert shaped.shape == (T, 4, 3, 3)
    np.testing.assert_array_equal(shaped.reshape(T, D), round_with_feedback(metric, W, scales))
    turn = np.random.default_rng(1).permutation(D)
    turned = Metric(
        metric.S[np.ix_(turn, turn)], metric.C[:, turn], metric.v, metric.mu_x[turn], metric.mu_t
    )
    again = round_with_feedback(turned, W[:, turn], scales)
    np.testing.assert_allclose(again, shaped.reshape(T, D)[:, turn], rtol=0, atol=1e-9)


def test_error_of_rounded_weights_is_exact(rows, metric, accepts_only):
    x, t, W = rows
    Q = round_nearest(W, grid(W, 7))

    def check(b):
        measured = np.square(t - x @ Q.T - b).sum(1).mean()
        assert abs(predicted_error(metric, Q) / measured - 1) < 1e-6

    accepts_only(check, corrected_bias(metric, Q))


@pytest.mark.parametrize("levels", [255, 63])
def test_error_of_rounded_inputs(rows, metric, levels):
    x, t, W = rows
    Q = round_with_feedback(metric, W, grid(W))
    b = corrected_bias(metric, Q)
    step = x.max() / levels
    rounded = step * np.rint(x / step)
    measured = np.square(t - rounded @ Q.T - b).sum(1).mean()
    zero_share = (x == 0).mean(0)
    assert abs(predicted_error(metric, Q, step, zero_share) / measured - 1) < 0.05
    # Without the noise, and without the share of zeros, the prediction is off: the test can tell.
    assert measured > 1.1 * predicted_error(metric, Q) or levels == 255
    if levels == 63:
        assert predicted_error(metric, Q, step) > 1.05 * measured


def test_nothing_to_round():
    zero = np.zeros((2, 3))
    assert (grid(zero) == 1.0).all()
    metric = Metric.symmetric(zero, np.zeros((3, 3)))
    assert not round_with_feedback(metric, zero, grid(zero)).any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: grid(np.ones((2, 2)), 200), "levels must lie in 1..127, got 200"),
        (lambda: grid(np.full((2, 2), np.nan)), "finite"),
        (lambda: round_nearest(np.ones((2, 2)), np.ones(3)), r"scales must be \(2,\)"),
        (lambda: round_nearest(np.ones((2, 2)), np.zeros(2)), "positive"),
        (
            lambda: round_with_feedback(
                Metric.weight_space(np.ones((2, 3))), np.ones((2, 2)), np.ones(2)
            ),
            "weight has 2 inputs, the metric 3",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
