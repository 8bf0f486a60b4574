"""Supports, the exact refit on one, and what storing zeros costs; against lstsq on explicit rows, and counting."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.sparse import csr_array

from edgesolve.host import prune
from edgesolve.host.metric import Metric
from edgesolve.host.prune import NofM, PerLayer, PerRow, Pruned, magnitude, refit, wanda
from edgesolve.kernels.moments import Moments

PATTERNS = [PerLayer(0.6), PerRow(0.6), NofM(), NofM(1, 3), PerLayer(0.0), PerLayer(1.0)]


def problem(seed, T=4, D=10, n=200):
    """Rows x (n, D), correlated and off centre, targets t (n, T) that x explains only in part."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D)) @ (np.eye(D) + rng.normal(size=(D, D)) / 2) + 3 * rng.normal(size=D)
    t = x @ rng.normal(size=(D, T)) + rng.normal(size=(n, T)) + 1.0
    return x, t, Metric.of(Moments.of(x, t))


def by_lstsq(x, t, mask):
    """(weight, mean squared residual) of each output regressed on its own inputs and a constant."""
    W, error = np.zeros(mask.shape), 0.0
    xc, tc = x - x.mean(0), t - t.mean(0)
    for row, support in enumerate(mask):
        W[row, support] = np.linalg.lstsq(xc[:, support], tc[:, row], rcond=None)[0]
        error += np.mean((tc[:, row] - xc @ W[row]) ** 2)
    return W, error


@pytest.mark.parametrize("seed", range(3))
def test_the_refit_is_the_regression_on_the_support(seed, accepts_only):
    x, t, metric = problem(seed)
    mask = np.random.default_rng(seed).random((4, 10)) < 0.5
    expected, error = by_lstsq(x, t, mask)
    W = refit(metric, mask)
    accepts_only(lambda a: np.testing.assert_allclose(a, expected, rtol=1e-8, atol=1e-10), W)
    assert not W[~mask].any()
    rows = t - x @ W.T - metric.bias(W)
    assert metric.distortion(W) == pytest.approx(np.mean(np.sum(rows**2, axis=1)), rel=1e-9)
    assert metric.distortion(W) == pytest.approx(error, rel=1e-9)


def test_the_refit_bears_repeated_and_dead_inputs():
    x, t, _ = problem(0)
    x[:, 3], x[:, 5], x[:, 7] = x[:, 2], 4.0, x[:, 0] - x[:, 1]
    metric = Metric.of(Moments.of(x, t))
    mask = np.ones((4, 10), bool)
    mask[0, 2] = mask[1, :4] = False
    W = refit(metric, mask)
    assert metric.distortion(W) == pytest.approx(by_lstsq(x, t, mask)[1], rel=1e-7)
    np.testing.assert_allclose(W[2:, 2], W[2:, 3], rtol=1e-6)
    assert not W[:, 5].any()
    assert not refit(metric, np.zeros_like(mask)).any()
    dead = Metric.symmetric(np.ones((2, 3)), np.zeros((3, 3)))
    assert not refit(dead, np.ones((2, 3), bool)).any()


def test_inputs_that_are_nearly_the_same_get_no_huge_weights():
    x, t, _ = problem(3)
    x[:, 3] = x[:, 2] + 1e-7 * np.random.default_rng(1).normal(size=200)
    metric = Metric.of(Moments.of(x, t))
    np.linalg.cholesky(metric.S)  # which rounding lets pass
    full = np.ones((4, 10), bool)
    once = full.copy()
    once[:, 3] = False
    found, expected = refit(metric, full), refit(metric, once)
    assert np.abs(found).max() < 2 * np.abs(expected).max()
    assert metric.distortion(found) == pytest.approx(metric.distortion(expected), rel=1e-6)


def test_rows_of_one_support_share_a_factorisation(monkeypatch):
    _, _, metric = problem(1, T=6)
    mask = np.ones((6, 10), bool)
    mask[[0, 2, 4], 3:] = False
    calls = []
    solve = prune._least_squares
    monkeypatch.setattr(prune, "_least_squares", lambda *a: calls.append(a) or solve(*a))
    W = refit(metric, mask)
    assert len(calls) == 2
    for row in range(6):
        alone = np.zeros_like(mask)
        alone[row] = mask[row]
        np.testing.assert_allclose(refit(metric, alone)[row], W[row], rtol=1e-12)


def allowed(pattern, mask):
    """Is this support (T, D) in the family, by its definition?"""
    T, D = mask.shape
    if isinstance(pattern, NofM):
        return all(
            mask[t, i : i + pattern.m].sum() <= pattern.n
            for t in range(T)
            for i in range(0, D, pattern.m)
        )
    zeros = (~mask).sum(1)
    if isinstance(pattern, PerRow):
        return bool((zeros == round(pattern.sparsity * D)).all())
    return zeros.sum() == round(pattern.sparsity * T * D)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("T, D", [(2, 5), (1, 7), (2, 4)])
def test_the_top_is_the_best_of_all_supports(pattern, T, D):
    score = np.random.default_rng(T * D).random((T, D))
    mask = pattern.top(score)
    best = max(
        score.flat[list(kept)].sum()
        for k in range(T * D + 1)
        for kept in combinations(range(T * D), k)
        if allowed(pattern, np.isin(np.arange(T * D), kept).reshape(T, D))
    )
    assert allowed(pattern, mask)
    assert score[mask].sum() == pytest.approx(best)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("T, D", [(3, 27), (8, 16), (1, 1)])
def test_a_pattern_counts_what_it_removes(pattern, T, D):
    mask = pattern.top(np.random.default_rng(0).random((T, D)))
    group, quota = pattern.groups(D)
    assert (~mask).sum() == pattern.removed(T, D)
    for row in mask:
        assert (np.bincount(group, weights=~row, minlength=quota.size) <= quota).all()


def test_equal_scores_leave_from_the_end():
    expected = np.arange(6) < 3
    np.testing.assert_array_equal(PerLayer(0.5).top(np.ones((1, 6)))[0], expected)
    np.testing.assert_array_equal(PerRow(0.5).top(np.ones((2, 6)))[1], expected)


def test_wanda_knows_no_units_of_the_input():
    x, t, metric = problem(2)
    W, units = metric.least_squares(), np.geomspace(1e-3, 1e3, 10)
    other = Metric.of(Moments.of(x * units, t))
    pattern = PerLayer(0.5)
    np.testing.assert_array_equal(wanda(other, W / units, pattern), wanda(metric, W, pattern))
    assert not np.array_equal(magnitude(W / units, pattern), magnitude(W, pattern))


@pytest.mark.parametrize("pattern", PATTERNS[:4], ids=str)
def test_a_refit_never_costs(pattern):
    for seed in range(4):
        _, _, metric = problem(seed, T=5, D=24)
        W = metric.least_squares()
        for mask in (magnitude(W, pattern), wanda(metric, W, pattern)):
            assert metric.distortion(refit(metric, mask)) < metric.distortion(W * mask)


@pytest.mark.parametrize(
    "T, D, sparsity", [(8, 27, 0.5), (8, 27, 0.97), (4, 300, 0.95), (4, 8, 0.1)]
)
def test_the_bytes_are_those_of_real_containers(T, D, sparsity):
    weight = np.random.default_rng(0).normal(size=(T, D))
    layer = Pruned(weight * PerLayer(sparsity).top(np.abs(weight)))
    rows = csr_array(layer.full().astype(np.float32))
    small = np.uint8 if D <= 256 else np.uint16
    by_rows = (
        rows.data.nbytes + rows.indices.astype(small).nbytes + rows.indptr.astype(np.uint32).nbytes
    )
    by_bits = rows.data.nbytes + np.packbits(layer.mask).nbytes
    assert layer.n_params == rows.nnz
    assert layer.sparsity == pytest.approx(1 - rows.nnz / (T * D))
    assert layer.bytes_sparse() == min(by_rows, by_bits)
    assert layer.bytes_sparse(value_bytes=1) == min(by_rows, by_bits) - 3 * rows.nnz


def test_either_form_can_be_the_smaller_one():
    few = np.zeros((2, 200))
    few[0, 0] = 1.0
    assert Pruned(few).bytes_sparse() == 4 + 1 + 12  # a value, its column, three row starts
    assert Pruned(np.ones((2, 200))).bytes_sparse() == 1600 + 50


def test_a_layer_keeps_its_shape():
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 2))
    layer = Pruned(weight * magnitude(weight, NofM(1, 3)).reshape(weight.shape))
    assert layer.full().shape == (4, 3, 3, 2)
    assert layer.mask.shape == (4, 18)
    assert layer.n_params == 4 * 6


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda: PerLayer(1.5), "0..1, got 1.5"),
        (lambda: PerRow(-0.1), "0..1, got -0.1"),
        (lambda: NofM(5, 4), "got 5 of 4"),
        (
            lambda: magnitude(np.full((2, 3), np.nan), PerLayer(0.5)),
            "6 of 6 pruning scores are NaN",
        ),
        (lambda: refit(problem(0)[2], np.ones((3, 10))), r"\(4, 10\), got \(3, 10\)"),
    ],
)
def test_bad_input_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
