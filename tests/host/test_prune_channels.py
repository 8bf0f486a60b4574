"""Input channels against regression on explicit rows, each channel left out once."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from edgesolve.host.metric import Metric
from edgesolve.host.obs import eliminate
from edgesolve.host.prune_channels import eliminate_channels, remove_channels
from edgesolve.kernels.moments import Moments

SHAPES = [(3, 5, 2, 2), (2, 6, 1, 3), (4, 7, 1, 1)]


def problem(shape, seed=0, n=200):
    """Rows x (n, c kh kw), correlated, targets t (n, T) that x explains only in part."""
    T, c, kh, kw = shape
    D = c * kh * kw
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D)) @ (np.eye(D) + rng.normal(size=(D, D)) / np.sqrt(D)) + 2.0
    t = x @ rng.normal(size=(D, T)) + rng.normal(size=(n, T))
    return x, t, Metric.of(Moments.of(x, t))


def inputs(channels, shape):
    K = shape[2] * shape[3]
    return [k * K + i for k in channels for i in range(K)]


def regression(x, t, channels, shape):
    """(weight (T, k, kh, kw), bias (T,), error) of t on these channels and a constant."""
    A = np.column_stack([x[:, inputs(channels, shape)], np.ones(len(x))])
    solved = np.linalg.lstsq(A, t, rcond=None)[0]
    error = np.mean(np.sum((t - A @ solved) ** 2, axis=1))
    return solved[:-1].T.reshape(shape[0], len(channels), *shape[2:]), solved[-1], error


def by_regression(x, t, shape):
    left, order, losses = list(range(shape[1])), [], []
    now = regression(x, t, left, shape)[2]
    while left:
        then, b = min((regression(x, t, [q for q in left if q != b], shape)[2], b) for b in left)
        order.append(b)
        losses.append(then - now)
        left.remove(b)
        now = then
    return order, losses


@pytest.mark.parametrize("shape", SHAPES)
def test_each_channel_that_leaves_is_the_cheapest(shape, accepts_only):
    x, t, metric = problem(shape)
    trace = eliminate_channels(metric, shape)
    order, losses = by_regression(x, t, shape)
    np.testing.assert_array_equal(trace.order[0], order)
    accepts_only(lambda a: np.testing.assert_allclose(a, losses, rtol=1e-7), trace.loss[0])
    assert trace.curve()[-1] == pytest.approx(metric.v)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_left_is_the_regression_on_it(shape, accepts_only):
    x, t, metric = problem(shape, 1)
    trace = eliminate_channels(metric, shape)
    for keep in range(1, shape[1] + 1):
        kept, weight, bias, distortion = remove_channels(metric, shape, keep)
        assert list(kept) == sorted(trace.order[0, shape[1] - keep :])
        expected, offset, error = regression(x, t, kept, shape)

        def same(a, b=expected):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)

        accepts_only(same, weight, blind=("flipped",) if weight.shape[-1] == 1 else ())
        np.testing.assert_allclose(bias, offset, rtol=1e-7, atol=1e-9)
        assert distortion == pytest.approx(error, rel=1e-8)
        assert distortion == pytest.approx(trace.curve()[shape[1] - keep], rel=1e-8)


def test_named_channels_are_taken_as_they_are():
    shape = SHAPES[0]
    x, t, metric = problem(shape, 2)
    found = remove_channels(metric, shape, [4, 1])
    weight, bias, error = regression(x, t, [1, 4], shape)
    np.testing.assert_array_equal(found.kept, [1, 4])
    np.testing.assert_allclose(found.weight, weight, rtol=1e-7)
    np.testing.assert_allclose(found.bias, bias, rtol=1e-7)
    assert found.distortion == pytest.approx(error, rel=1e-8)


def test_among_all_sets_one_removal_is_optimal_and_more_are_near_it():
    shape = (3, 7, 1, 2)
    excess, by_norm = [], []
    for seed in range(4):
        x, t, metric = problem(shape, seed)
        norms = np.sum(metric.least_squares().reshape(3, 7, 2) ** 2, axis=(0, 2))
        for keep in range(1, 7):
            sets = combinations(range(7), keep)
            best = min(regression(x, t, channels, shape)[2] for channels in sets)
            choices = keep, np.argsort(-norms)[:keep]
            found, plain = (remove_channels(metric, shape, k).distortion for k in choices)
            assert found > best * (1 - 1e-9)
            assert keep < 6 or found < best * (1 + 1e-9)
            excess.append(found / best - 1)
            by_norm.append(plain / best - 1)
    assert np.mean(np.array(excess) < 1e-9) > 0.6
    assert np.mean(excess) < np.mean(by_norm) / 2


def test_the_channels_that_matter_are_found():
    shape = (4, 8, 2, 2)
    x, _, _ = problem(shape, 3)
    weight = np.zeros((4, 8, 4))
    weight[:, [1, 4, 6]] = np.random.default_rng(0).normal(size=(4, 3, 4))
    t = x @ weight.reshape(4, -1).T + 5.0
    found = remove_channels(Metric.of(Moments.of(x, t)), shape, 3)
    np.testing.assert_array_equal(found.kept, [1, 4, 6])
    np.testing.assert_allclose(found.weight.reshape(4, 3, 4), weight[:, [1, 4, 6]], rtol=1e-7)
    np.testing.assert_allclose(found.bias, 5.0, rtol=1e-7)


def test_constant_and_repeated_channels_leave_first_and_free():
    shape = (3, 6, 1, 2)
    x, t, _ = problem(shape, 4)
    x[:, inputs([2], shape)] = 7.0
    x[:, inputs([5], shape)] = x[:, inputs([0], shape)]
    metric = Metric.of(Moments.of(x, t))
    trace = eliminate_channels(metric, shape)
    assert trace.order[0, 0] == 2
    assert trace.order[0, 1] in (0, 5)
    assert (trace.loss[0, :2] < 1e-6 * metric.v).all()
    assert (trace.loss[0, 2:] > 1e-3 * metric.v).all()


def test_single_inputs_of_one_output_are_plain_elimination():
    shape = (1, 9, 1, 1)
    _, _, metric = problem(shape, 5)
    blocks, plain = eliminate_channels(metric, shape), eliminate(metric)
    np.testing.assert_array_equal(blocks.order, plain.order)
    np.testing.assert_allclose(blocks.loss, plain.loss, rtol=1e-9)


@pytest.mark.parametrize(
    "shape, keep, message",
    [
        ((3, 5, 2, 2), 0, r"1\.\.5 channels, got 0"),
        ((3, 5, 2, 2), 6, r"1\.\.5 channels, got 6"),
        ((3, 5, 2, 2), [], r"0\.\.4, got \[\]"),
        ((3, 5, 2, 2), [1, 5], r"0\.\.4, got \[1, 5\]"),
        ((3, 5, 3, 3), 2, "has 3 and 45"),
    ],
)
def test_bad_input_is_named(shape, keep, message):
    metric = problem((3, 5, 2, 2))[2]
    with pytest.raises(ValueError, match=message):
        remove_channels(metric, shape, keep)
