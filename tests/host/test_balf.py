"""The baselines of the compression benchmark: BALF's factors and allocation, and truncated SVD."""

import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest

T, D = 6, 9


@pytest.fixture(scope="module")
def balf():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "balf.py"
    return runpy.run_path(str(path))


@pytest.fixture
def layer():
    """(W, rows x (n, D) with a mean, Sigma = E[x x'])."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, D)) @ rng.normal(size=(D, D)) + 2.0
    return rng.normal(size=(T, D)), x, x.T @ x / len(x)


def error(W, What, x):
    return float((((W - What) @ x.T) ** 2).sum() / len(x))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_factor_is_the_best_of_its_rank_on_the_rows(balf, layer, rank):
    W, x, Sigma = layer
    What = balf["balf_factor"](W, Sigma, rank)
    assert np.linalg.matrix_rank(What) == rank
    # Reduced-rank regression: the outputs' own truncated SVD is the bound, and it can be reached.
    U, s, _ = np.linalg.svd(W @ x.T, full_matrices=False)
    best = float((s[rank:] ** 2).sum() / len(x))
    reached = U[:, :rank] @ U[:, :rank].T @ W
    assert error(W, What, x) == pytest.approx(best, rel=1e-9)
    for wrong in (0 * What, 0.9 * What, What[::-1], balf["balf_factor"](W, np.eye(D), rank)):
        assert error(W, wrong, x) > 1.001 * best
    np.testing.assert_allclose(What, reached, atol=1e-9)


def test_spectrum_is_that_of_the_outputs(balf, layer):
    W, x, Sigma = layer
    outputs = np.linalg.svd(W @ x.T / np.sqrt(len(x)), compute_uv=False)
    np.testing.assert_allclose(balf["balf_spectrum"](W, Sigma), outputs, rtol=1e-9)


def test_moments_are_not_centred(balf, layer):
    W, x, Sigma = layer
    centred = Sigma - np.outer(x.mean(0), x.mean(0))
    rank_1 = balf["balf_factor"](W, Sigma, 1)
    assert error(W, rank_1, x) < error(W, balf["balf_factor"](W, centred, 1), x)


def test_a_direction_without_input_is_dropped(balf, layer):
    W, x, _ = layer
    x[:, 0] = 0.0
    What = balf["balf_factor"](W, x.T @ x / len(x), T)
    assert np.all(np.isfinite(What)) and error(W, What, x) < 1e-16
    spectrum = balf["balf_spectrum"](W, np.zeros((D, D)))
    assert spectrum.shape == (T,) and not spectrum.any()


def test_full_rank_and_none_are_the_layer(balf, layer):
    W, _, Sigma = layer
    np.testing.assert_allclose(balf["balf_factor"](W, Sigma, T), W, atol=1e-9)
    np.testing.assert_array_equal(balf["balf_factor"](W, Sigma, None), W)


def test_allocation_is_on_the_hull_of_brute_force(balf):
    """No assignment of the same cost or less has more energy, for every cost that a multiplier can reach."""
    rng = np.random.default_rng(1)
    shapes = [(4, 7), (5, 5), (3, 8)]
    spectra = [(np.sort(rng.exponential(size=min(s)))[::-1], *s) for s in shapes]
    energy = [np.cumsum(s**2) / np.sum(s**2) for s, _, _ in spectra]
    cost = [np.minimum(np.arange(1, len(s) + 1) * (t + d), t * d) for s, t, d in spectra]
    every = list(itertools.product(*(range(len(e)) for e in energy)))
    worth = [sum(e[j] for e, j in zip(energy, pick, strict=True)) for pick in every]
    price = [sum(int(c[j]) for c, j in zip(cost, pick, strict=True)) for pick in every]
    for budget in (40, 50, 60, 70, 77):
        ranks = balf["balf_allocate"](spectra, budget)
        # None is the layer itself, which costs and is worth what the highest rank does.
        pick = [len(e) - 1 if r is None else r - 1 for e, r in zip(energy, ranks, strict=True)]
        spent = sum(int(c[j]) for c, j in zip(cost, pick, strict=True))
        got = sum(e[j] for e, j in zip(energy, pick, strict=True))
        assert spent <= budget
        best = max(w for w, p in zip(worth, price, strict=True) if p <= spent)
        assert got == pytest.approx(best, abs=1e-12)


def test_budget_below_rank_one_is_refused(balf):
    with pytest.raises(ValueError, match="rank 1 everywhere takes 10"):
        balf["balf_allocate"]([(np.ones(4), 4, 6)], 9)


def test_allocation_leaves_dense_what_gains_nothing(balf):
    assert balf["balf_allocate"]([(np.ones(4), 4, 6)], 24) == [None]


def test_uniform_keeps_at_most_its_share_of_each_layer(balf):
    shapes = [(16, 27), (64, 576), (10, 64)]
    for share in (0.9, 0.5, 0.2):
        ranks = balf["uniform_svd"](shapes, share)
        for (t, d), r in zip(shapes, ranks, strict=True):
            assert r is None or r * (t + d) <= share * t * d < (r + 1) * (t + d)
    assert balf["uniform_svd"](shapes, 1.0) == [None] * 3
    assert balf["uniform_svd"]([(10, 10)], 0.01) == [1]
    with pytest.raises(ValueError, match="share must lie"):
        balf["uniform_svd"](shapes, 0.0)
