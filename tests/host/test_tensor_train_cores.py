from itertools import pairwise

import numpy as np
import pytest
from scipy.optimize import least_squares

from edgesolve.host.tensor_train_cores import TTCores, core_gradients, tt_als, tt_svd
from edgesolve.host.tensor_train_modes import (
    check_modes,
    full_rank,
    nearest_modes,
    separate_modes,
)

MODES, SHAPE = (3, 4, 2, 5), (12, 10)


def noise(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape)


def random_train(rank=3, seed=1):
    rng, ranks = np.random.default_rng(seed), (1, rank, rank, rank, 1)
    cores = [rng.standard_normal((ranks[k], m, ranks[k + 1])) for k, m in enumerate(MODES)]
    return TTCores(tuple(cores), SHAPE)


def squared(a):
    return float(np.sum(a**2))


def test_the_matrix_is_the_chain_of_products():
    train = random_train()
    want = np.einsum("xai,ibj,jcl,ldy->abcd", *train.cores)
    assert np.allclose(train.full(), want.reshape(SHAPE), atol=1e-12)
    assert train.n_params == 3 * 3 + 3 * 4 * 3 + 3 * 2 * 3 + 3 * 5
    assert (train.modes, train.ranks) == (MODES, (3, 3, 3))


def test_tt_svd_is_exact_at_full_rank_and_its_error_falls_with_rank():
    W = noise()
    errors = [squared(W - tt_svd(W, MODES, r).full()) for r in range(1, full_rank(MODES) + 1)]
    assert errors[-1] < 1e-24
    assert all(b < a for a, b in pairwise(errors))


def test_tt_svd_obeys_its_bounds():
    """Between the largest tail of an unfolding, which no train beats, and the sum of the tails."""
    W, rank = noise(3), 2
    sizes = np.cumprod(MODES)[:-1]
    tails = [np.sum(np.linalg.svd(W.reshape(s, -1))[1][rank:] ** 2) for s in sizes]
    error = squared(W - tt_svd(W, MODES, rank).full())
    assert max(tails) <= error <= sum(tails)


def test_tt_svd_finds_a_planted_train():
    planted = random_train(rank=2).full()
    assert np.allclose(tt_svd(planted, MODES, 2).full(), planted, atol=1e-12)
    for mutant in (0.0 * planted, 1.1 * planted, planted[::-1]):
        assert not np.allclose(tt_svd(mutant, MODES, 2).full(), planted, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_least_squares_never_moves_away_and_falls_by_what_it_moved(dtype):
    W, train = noise(5).astype(dtype), random_train()
    train = TTCores(tuple(c.astype(dtype) for c in train.cores), SHAPE)
    error, rounding = squared(W - train.full()), 1e-12 if dtype is np.float64 else 1e-4
    for _ in range(20):
        train, moved = tt_als(W, train)
        now = squared(W - train.full())
        assert now <= error * (1 + rounding)
        assert error - now == pytest.approx(moved, abs=rounding * max(error, 1.0))
        error = now
    assert train.cores[0].dtype == dtype
    assert moved < 0.05


def test_least_squares_ends_where_a_numeric_minimiser_does():
    W, train = noise(7), tt_svd(noise(7), MODES, 2)
    sizes = [c.size for c in train.cores]

    def residual(flat):
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        cores = [p.reshape(c.shape) for p, c in zip(parts, train.cores, strict=True)]
        return (TTCores(tuple(cores), SHAPE).full() - W).ravel()

    best = least_squares(residual, np.concatenate([c.ravel() for c in train.cores]))
    for _ in range(300):
        train, _ = tt_als(W, train)
    assert squared(W - train.full()) == pytest.approx(2 * best.cost, rel=1e-6)


def test_the_last_core_of_a_pass_is_its_exact_minimiser():
    """A pass ends on the first core: the gradient by it is 0 there, and not for a scaled core."""
    W, train = noise(9), tt_als(noise(9), random_train())[0]
    first = core_gradients(train, train.full() - W)[0]
    assert np.abs(first).max() < 1e-12
    worse = TTCores((1.01 * train.cores[0], *train.cores[1:]), SHAPE)
    assert np.abs(core_gradients(worse, worse.full() - W)[0]).max() > 1e-3


def test_tt_svd_alone_may_move_away_where_least_squares_does_not():
    rises, rng = {"svd": 0, "als": 0}, np.random.default_rng(0)
    W = noise(11)
    trains = {"svd": tt_svd(W, MODES, 2), "als": tt_svd(W, MODES, 2)}
    for _ in range(60):
        W = W + 0.02 * rng.standard_normal(SHAPE)
        for kind, old in trains.items():
            new = tt_svd(W, MODES, 2) if kind == "svd" else tt_als(W, old)[0]
            rises[kind] += squared(W - new.full()) > squared(W - old.full()) * (1 + 1e-12)
            trains[kind] = new
        trains["svd"] = trains["als"]
    assert rises["als"] == 0
    assert rises["svd"] > 0


def test_gradients_by_each_core_match_differences():
    train, W = random_train(), noise(13)
    grads = core_gradients(train, train.full() - W)
    for k, core in enumerate(train.cores):
        at, step = (0, core.shape[1] - 1, 0), 1e-6
        values = []
        for sign in (1.0, -1.0):
            cores = [c.copy() for c in train.cores]
            cores[k][at] += sign * step
            values.append(0.5 * squared(TTCores(tuple(cores), SHAPE).full() - W))
        assert grads[k][at] == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_modes_of_each_size_apart_run_as_two_thin_layers():
    assert separate_modes(12, 10) == (4, 3, 2, 5)
    train = tt_svd(noise(), separate_modes(12, 10), 3)
    A, B = train.factors()
    assert (A.shape, B.shape) == ((12, 3), (3, 10))
    assert np.allclose(A @ B, train.full(), atol=1e-12)
    with pytest.raises(ValueError, match="don't split between the 12 rows and the 10 columns"):
        tt_svd(noise(), (5, 8, 3), 3).factors()


def test_the_published_modes_of_the_mnist_network():
    """84,408 numbers at rank 40, 78 times fewer than the two layers have; only 4^10 splits."""
    wide, square = (26, 26, 4, 4, 4, 4, 4, 2, 2, 2), (4,) * 10

    def count(modes, cap):
        size, left, ranks = np.prod(modes), np.cumprod(modes)[:-1], [1]
        ranks += [int(min(n, size // n, cap)) for n in left] + [1]
        return sum(a * m * b for a, m, b in zip(ranks, modes, ranks[1:], strict=False))

    assert count(wide, 40) + count(square, 40) == 84_408
    assert count(wide, 220) + count(square, 220) == 1_175_304
    check_modes((1024, 5408), wide, 220)


def test_modes_and_ranks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="The nearest that do"):
        tt_svd(noise(), (3, 4, 2, 4), 2)
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.10"):
        tt_svd(noise(), MODES, 13)
    with pytest.raises(ValueError, match="rank must lie"):
        tt_svd(noise(), MODES, 0)
    with pytest.raises(ValueError, match="core 1 must be"):
        TTCores((np.ones((1, 2, 2)), np.ones((3, 2, 1))), (2, 2))


@pytest.mark.parametrize(("shape", "modes"), [((12, 10), (3, 4, 2, 4)), ((7, 11), (8, 9, 1))])
def test_the_nearest_modes_do_factor_the_shape(shape, modes):
    found = nearest_modes(shape, modes)
    assert len(found) == len(modes)
    assert np.prod(found) == np.prod(shape)
    check_modes(shape, found, 1)
