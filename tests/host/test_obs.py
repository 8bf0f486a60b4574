"""Greedy elimination against greedy elimination by regression, one input left out at a time."""

from __future__ import annotations

import heapq
from itertools import combinations

import numpy as np
import pytest

from edgesolve.host import obs as module
from edgesolve.host.metric import Metric
from edgesolve.host.obs import Trace, eliminate, obs
from edgesolve.host.prune import NofM, PerLayer, PerRow, magnitude, refit, wanda
from edgesolve.kernels.moments import Moments

PATTERNS = [PerLayer(0.5), PerLayer(0.8), PerRow(0.6), NofM(), NofM(1, 3)]


def problem(seed, T=3, D=7, n=150):
    """Rows x (n, D), correlated, targets t (n, T) that x explains only in part."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D)) @ (np.eye(D) + rng.normal(size=(D, D)) / np.sqrt(D)) + 1.0
    t = x @ rng.normal(size=(D, T)) + rng.normal(size=(n, T))
    return x, t, Metric.of(Moments.of(x, t))


def error(x, t, support):
    """Mean squared residual of t (n,) regressed on these inputs and a constant."""
    A = np.column_stack([x[:, list(support)], np.ones(len(x))])
    return np.mean((t - A @ np.linalg.lstsq(A, t, rcond=None)[0]) ** 2)


def by_regression(x, t, pattern):
    """(order, losses) of one output: each time, every input that may leave is left out once."""
    group, quota = pattern.groups(x.shape[1])
    quota, left, order, losses = quota.copy(), list(range(x.shape[1])), [], []
    now = error(x, t, left)
    while may := [p for p in left if quota[group[p]]]:
        then, p = min((error(x, t, [q for q in left if q != p]), p) for p in may)
        order.append(p)
        losses.append(then - now)
        left.remove(p)
        quota[group[p]] -= 1
        now = then
    return order, losses


@pytest.mark.parametrize("block", [1, 3, 48])
@pytest.mark.parametrize("pattern", [PerLayer(1.0), PerRow(0.5), NofM(), NofM(2, 3)], ids=str)
def test_each_removal_is_the_best_single_one(pattern, block, monkeypatch, accepts_only):
    monkeypatch.setattr(module, "BLOCK", block)
    x, t, metric = problem(block)
    trace = eliminate(metric, pattern)
    expected = [by_regression(x, column, pattern) for column in t.T]
    np.testing.assert_array_equal(trace.order, [order for order, _ in expected])
    losses = np.array([loss for _, loss in expected])
    accepts_only(lambda a: np.testing.assert_allclose(a, losses, rtol=1e-7), trace.loss)


def test_the_trace_is_the_distortion_of_every_level(accepts_only):
    x, t, metric = problem(4, D=60)
    trace = eliminate(metric)
    weights = [refit(metric, trace.mask(removed)) for removed in range(181)]
    rows = [t - x @ W.T - metric.bias(W) for W in weights]
    measured = np.array([np.mean(np.sum(r * r, axis=1)) for r in rows])
    accepts_only(lambda a: np.testing.assert_allclose(a, measured, rtol=1e-8), trace.curve())
    assert (np.diff(trace.curve()) >= 0).all()
    assert [np.count_nonzero(W) for W in weights] == list(range(180, -1, -1))
    assert trace.floor == metric.distortion(metric.least_squares())
    assert trace.curve()[-1] == pytest.approx(metric.v)


def test_the_row_whose_next_removal_is_cheapest_goes_first():
    loss = np.array([[0.1, 5.0, 0.2, 6.0], [1.0, 2.0, 3.0, 4.0], [5.5, 0.0, 0.0, 9.0]])
    trace = Trace(np.tile(np.arange(4), (3, 1)), loss, 1.0, 4)
    heap, level, curve = [(loss[t, 0], t, 0) for t in range(3)], 1.0, [1.0]
    while heap:
        cost, t, i = heapq.heappop(heap)
        level += cost
        curve.append(level)
        if i < 3:
            heapq.heappush(heap, (loss[t, i + 1], t, i + 1))
    np.testing.assert_allclose(trace.curve(), curve)
    np.testing.assert_array_equal(trace.mask(5).sum(1), [3, 0, 4])


def test_among_all_supports_one_removal_is_optimal_and_more_are_near_it():
    excess, by_magnitude = [], []
    for seed in range(8):
        x, t, metric = problem(seed, T=1, D=8)
        for k in range(1, 8):
            best = min(error(x, t[:, 0], kept) for kept in combinations(range(8), 8 - k))
            masks = eliminate(metric).mask(k), magnitude(metric.least_squares(), PerRow(k / 8))
            found, plain = (metric.distortion(refit(metric, mask)) / best - 1 for mask in masks)
            assert found > -1e-9
            assert k > 1 or found < 1e-9
            excess.append(found)
            by_magnitude.append(plain)
    assert np.mean(np.array(excess) < 1e-9) > 0.5
    assert np.mean(excess) < np.mean(by_magnitude) / 2


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_elimination_beats_magnitude_with_a_refit_beats_magnitude(pattern, seed):
    _, _, metric = problem(seed, T=8, D=36)
    W = metric.least_squares()
    mask = magnitude(W, pattern)
    plain, refitted = metric.distortion(W * mask), metric.distortion(refit(metric, mask))
    scored = metric.distortion(refit(metric, wanda(metric, W, pattern)))
    found = obs(metric, pattern)
    assert metric.distortion(found) < min(refitted, scored) < plain
    assert pattern.top(np.abs(found)).sum() >= np.count_nonzero(found)
    assert np.count_nonzero(found) == found.size - pattern.removed(*found.shape)


def test_the_support_is_better_than_a_permuted_or_random_one(accepts_only):
    _, _, metric = problem(6, T=6, D=24)
    trace = eliminate(metric)
    level = trace.curve()[72]

    def check(mask):
        assert mask.sum() == 72
        assert metric.distortion(refit(metric, mask.astype(bool))) <= level * (1 + 1e-9)

    accepts_only(lambda m: check(np.asarray(m)), trace.mask(72).astype(float), blind=("scaled",))


def test_dead_and_repeated_inputs_leave_first_and_free():
    x, t, _ = problem(0, D=9)
    x[:, 2], x[:, 5], x[:, 7] = 0.0, x[:, 4], 3.0
    metric = Metric.of(Moments.of(x, t))
    trace = eliminate(metric)
    for order in trace.order:
        assert set(order[:2]) == {2, 7}
        assert order[2] in (4, 5)
    assert (trace.loss[:, :3] < 1e-6 * metric.v).all()
    assert (trace.loss[:, 3:] > 1e-4 * metric.v / 3).all()
    measured = [metric.distortion(refit(metric, trace.mask(k))) for k in range(28)]
    np.testing.assert_allclose(trace.curve(), measured, atol=1e-6 * metric.v)
    assert not obs(metric, PerLayer(0.0))[:, [2, 7]].any()


def test_a_layer_without_any_input_is_carried():
    metric = Metric.symmetric(np.ones((2, 4)), np.zeros((4, 4)))
    assert not eliminate(metric).curve().any()
    assert not obs(metric, NofM()).any()


def test_units_of_the_input_dont_matter_and_bytes_are_the_same():
    x, t, metric = problem(3, D=20)
    order = eliminate(metric).order
    scaled = eliminate(Metric.of(Moments.of(1e4 * x, t)))
    np.testing.assert_array_equal(scaled.order, order)
    assert obs(metric, PerLayer(0.5)).tobytes() == obs(metric, PerLayer(0.5)).tobytes()


def test_a_trace_has_no_more_than_its_removals():
    trace = eliminate(problem(0, D=8)[2], NofM())
    assert trace.curve().shape == (13,)
    with pytest.raises(ValueError, match=r"0\.\.12 removals, got 13"):
        trace.mask(13)
