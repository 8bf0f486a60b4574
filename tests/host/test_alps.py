"""ALPS against closed forms, all supports of tiny problems, and greedy elimination."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from edgesolve.host import alps as module
from edgesolve.host.alps import alps, polish
from edgesolve.host.metric import Metric
from edgesolve.host.obs import obs
from edgesolve.host.prune import NofM, PerLayer, PerRow, refit, wanda

PATTERNS = [PerLayer(0.5), PerLayer(0.8), PerRow(0.7), NofM(), NofM(1, 4)]


def problem(seed, T=8, D=48, mix=0.7):
    """Inputs that are correlated and of unlike scale, an output that they explain in full."""
    rng = np.random.default_rng(seed)
    root = (np.eye(D) + mix * rng.normal(size=(D, D)) / np.sqrt(D)) * np.geomspace(0.3, 3.0, D)
    return Metric.symmetric(rng.normal(size=(T, D)), root.T @ root)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_uncorrelated_inputs_have_a_closed_form(pattern, accepts_only):
    rng = np.random.default_rng(0)
    W, S = rng.normal(size=(6, 16)), np.diag(rng.uniform(0.1, 5.0, 16))
    expected = W * pattern.top(W * W * np.diag(S))
    found = alps(Metric.symmetric(W, S), pattern)
    accepts_only(lambda a: np.testing.assert_allclose(a, expected, rtol=1e-9, atol=1e-12), found)


def test_it_is_near_the_best_of_all_supports():
    excess, by_score = [], []
    for seed in range(20):
        metric = problem(seed, T=1, D=9)
        best = min(
            metric.distortion(refit(metric, np.isin(np.arange(9), kept)[None]))
            for kept in combinations(range(9), 4)
        )
        score = wanda(metric, metric.least_squares(), PerRow(5 / 9))
        excess.append(metric.distortion(alps(metric, PerRow(5 / 9))) / best - 1)
        by_score.append(metric.distortion(refit(metric, score)) / best - 1)
    assert min(excess) > -1e-9
    assert np.mean(np.array(excess) < 1e-9) > 0.8
    assert np.mean(excess) < np.mean(by_score) / 4


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_it_is_level_with_elimination_or_better(pattern, accepts_only):
    ratios = []
    for seed in range(4):
        metric = problem(seed)
        found = alps(metric, pattern)
        assert np.count_nonzero(found) == found.size - pattern.removed(*found.shape)
        assert np.array_equal(pattern.top(np.abs(found)), found != 0)
        by_score = refit(metric, wanda(metric, metric.least_squares(), pattern))
        assert metric.distortion(found) < metric.distortion(by_score)
        ratios.append(metric.distortion(found) / metric.distortion(obs(metric, pattern)))
    assert np.mean(ratios) < 1.01, ratios
    bound = metric.distortion(found) * (1 + 1e-9)

    def check(W):
        assert metric.distortion(W) <= bound

    accepts_only(check, found)


def test_it_ends_with_the_least_squares_weight_of_its_support():
    metric = problem(5)
    found = alps(metric, PerLayer(0.6))
    slope = found @ metric.S - metric.C
    assert np.abs(slope[found != 0]).max() < 1e-10 * np.abs(metric.C).max()


def test_the_best_support_that_it_met_is_kept(monkeypatch):
    metric = problem(1)
    good = alps(metric, PerLayer(0.7))
    poor = np.roll(good, 1, axis=1)
    for order in ([poor, good], [good, poor]):
        monkeypatch.setattr(module, "_iterates", lambda *a, order=order: iter(order))
        np.testing.assert_allclose(alps(metric, PerLayer(0.7)), good, rtol=1e-9)


def test_conjugate_gradients_end_at_the_refit(accepts_only):
    metric = problem(2, T=4, D=12)
    mask = np.random.default_rng(0).random((4, 12)) < 0.5
    found = polish(metric.S, metric.C, np.where(mask, 1.0, 0.0), 40)
    expected = refit(metric, mask)
    accepts_only(lambda a: np.testing.assert_allclose(a, expected, rtol=1e-7, atol=1e-10), found)


def test_no_iteration_is_the_largest_scaled_weights():
    metric = problem(3)
    expected = refit(metric, wanda(metric, metric.least_squares(), NofM()))
    found = alps(metric, NofM(), iterations=0)
    assert np.mean((found != 0) == (expected != 0)) > 0.99  # the ridge moves the scales a little
    assert metric.distortion(alps(metric, NofM())) < metric.distortion(found)


def test_dead_and_repeated_inputs_cost_nothing():
    metric = problem(4, D=24)
    x_twice = np.hstack([np.eye(24), np.eye(24)[:, :6], np.zeros((24, 2))])
    wide = Metric.symmetric(metric.least_squares() @ x_twice, x_twice.T @ metric.S @ x_twice)
    found = alps(wide, PerRow(8 / 32))
    assert not found[:, 30:].any()
    assert wide.distortion(found) < 1e-3 * wide.v
    empty = Metric.symmetric(np.ones((2, 8)), np.zeros((8, 8)))
    assert not alps(empty, NofM()).any()


def test_units_dont_matter_and_bytes_are_the_same():
    metric = problem(6)
    other = Metric.symmetric(metric.least_squares(), 1e8 * metric.S)
    found = alps(metric, PerLayer(0.5))
    np.testing.assert_allclose(alps(other, PerLayer(0.5)), found, rtol=1e-7)
    assert alps(metric, PerLayer(0.5)).tobytes() == found.tobytes()
