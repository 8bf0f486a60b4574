"""The published rank search: planted ranks, its objective written out, and what it must refuse."""

import numpy as np
import pytest
import torch

from edgesolve.host import rank_search
from edgesolve.host.rank_search import CP3, TUCKER2, SearchOptions, cp3, hosvd, search

QUICK = SearchOptions(warmup=2, iterations=8, divide=2)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def noisy(W, seed):
    E = normal(seed + 100)(*W.shape)
    return W + 0.02 * E * W.norm() / E.norm()


def tucker_planted(T, c, rank, seed):
    n = normal(seed)
    U, V = (torch.linalg.qr(n(size, rank))[0] for size in (T, c))
    return noisy(torch.einsum("oa,abhw,cb->ochw", U, n(rank, rank, 3, 3), V), seed)


def cp_planted(T, c, rank, seed):
    n = normal(seed)
    return noisy(torch.einsum("or,cr,hwr->ochw", n(T, rank), n(c, rank), n(3, 3, rank)), seed)


@pytest.mark.parametrize(
    ("planted", "format"), [(tucker_planted, TUCKER2), (cp_planted, CP3)], ids=["tucker2", "cp3"]
)
def test_finds_planted_ranks(planted, format):
    weights = {"a": planted(16, 12, 4, 0), "b": planted(12, 14, 7, 1)}
    before = {name: w.clone() for name, w in weights.items()}
    assert search(weights, range(1, 12, 2), format=format, options=QUICK) == {"a": 4, "b": 7}
    assert all(torch.equal(weights[name], w) for name, w in before.items())


def test_ranges_of_each_layer():
    weights = {"a": tucker_planted(16, 12, 4, 0), "b": tucker_planted(12, 14, 7, 1)}
    ranges = {"a": range(3, 6), "b": range(9, 12)}
    assert search(weights, ranges, options=QUICK) == {"a": 4, "b": 9}


def test_loss_decides():
    """A layer that the loss doesn't see gets the smallest rank, one that is all there is to see keeps its rank."""
    weights = {"a": tucker_planted(12, 12, 4, 0), "b": tucker_planted(12, 12, 4, 1)}
    seen = []

    def only_a(mixed):
        seen.append({name: tuple(w.shape) for name, w in mixed.items()})
        return (mixed["a"] - weights["a"]).square().sum()

    found = search(weights, range(1, 8), only_a, options=QUICK)
    assert found == {"a": 4, "b": 1}
    assert seen == [{"a": (12, 12, 3, 3), "b": (12, 12, 3, 3)}] * QUICK.iterations


def test_seed_decides():
    """The same seed gives the same answer; with a spread, another one may not."""
    weights = {"a": tucker_planted(6, 6, 4, 0)}

    def ranks(seed):
        options = SearchOptions(warmup=0, iterations=1, spread=0.1, seed=seed)
        return search(weights, range(1, 7), options=options)["a"]

    found = [ranks(seed) for seed in range(5)]
    assert found == [ranks(seed) for seed in range(5)]
    assert len(set(found)) > 1


def test_objective_is_the_published_product():
    weights = {"a": tucker_planted(9, 8, 3, 0).double(), "b": tucker_planted(8, 7, 3, 1).double()}
    ranges = {"a": range(2, 6, 2), "b": range(1, 4)}
    options = SearchOptions(spread=1.0)
    generator = torch.Generator().manual_seed(0)
    mixtures = {
        name: rank_search._Mixture(w, ranges[name], TUCKER2, generator, 1.0)
        for name, w in weights.items()
    }
    error, R = 0.0, 0.0
    for name, w in weights.items():
        W = w.numpy().reshape(*w.shape[:2], 9)
        alpha = mixtures[name].logits.detach().numpy()
        p = np.exp(alpha) / np.exp(alpha).sum()
        hats = []
        for rank in ranges[name]:
            U = np.linalg.svd(W.reshape(len(W), -1))[0][:, :rank]
            V = np.linalg.svd(W.transpose(1, 0, 2).reshape(W.shape[1], -1))[0][:, :rank]
            hats.append(np.einsum("ot,sc,tck->osk", U @ U.T, V @ V.T, W))
        mixed = sum(share * hat for share, hat in zip(p, hats, strict=True))
        error += np.sum((W - mixed) ** 2) / np.sum(W**2) / 2
        R += 0.4 * (p @ np.array(ranges[name]) / max(ranges[name])) ** 0.8
    found = rank_search._objective(mixtures, None, options).item()
    assert np.isclose(found, error * R, rtol=1e-10)
    for wrong in (0.0, error, 1.01 * error * R, error * R / 0.4):
        assert not np.isclose(found, wrong, rtol=1e-3)
    task = rank_search._objective(mixtures, lambda mixed: mixed["a"].sum() * 0 + 3.0, options)
    assert np.isclose(task.item(), 3.0 * R, rtol=1e-10)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_loss_is_an_error(bad):
    weights = {"a": tucker_planted(12, 12, 4, 0)}
    with pytest.raises(ValueError, match="rank search: the objective is"):
        search(weights, range(1, 8), lambda mixed: mixed["a"].sum() * bad, options=QUICK)


def test_not_finite_gradient_is_an_error():
    """A finite loss whose slope is infinite: argmax of the NaN softmax would be the smallest rank."""
    weights = {"a": tucker_planted(12, 12, 4, 0)}
    assert int(torch.full((5,), torch.nan).argmax()) == 0
    last = SearchOptions(warmup=0, iterations=1)  # no later step would notice
    with pytest.raises(ValueError, match="not finite"):
        search(weights, range(1, 8), lambda m: 1 + (0 * m["a"].sum()).abs().sqrt(), options=last)


def test_large_gradients_are_clipped():
    weights = {"a": tucker_planted(12, 12, 4, 0)}

    def loss(mixed):
        return 1e20 * (mixed["a"] - weights["a"]).square().mean()

    assert search(weights, range(1, 8), loss, options=QUICK)["a"] in range(1, 8)
    with pytest.raises(ValueError, match="not finite"):
        search(weights, range(1, 8), lambda m: 1e25 * loss(m), options=QUICK)


def test_rounds_as_published():
    finer = rank_search._finer(60, range(10, 101, 10), 10, 128)
    assert list(finer) == list(range(55, 66))
    assert list(rank_search._finer(350, range(50, 851, 100), 10, 512)) == list(range(300, 401, 10))
    assert list(rank_search._finer(10, range(10, 101, 10), 10, 12)) == list(range(5, 13))
    assert list(rank_search._finer(7, range(1, 12), 10, 12)) == [7]


def test_unfit_input_is_refused():
    W = tucker_planted(12, 12, 4, 0)
    spoiled = W.clone()
    spoiled[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"conv1: .* 1 numbers not finite"):
        search({"conv1": spoiled}, range(1, 8))
    with pytest.raises(ValueError, match=r"conv1: .*\(12, 12, 3\)"):
        search({"conv1": W[..., 0]}, range(1, 8))
    with pytest.raises(ValueError, match="conv1: no candidate"):
        search({"conv1": W}, {"conv1": range(200, 300)}, format=CP3)
    for ranks in (range(13, 20), range(8), range(8, 1, -1)):
        with pytest.raises(ValueError, match=r"conv1: no candidate .* 1\.\.12"):
            search({"conv1": W}, ranks)


def test_hosvd():
    W = np.random.default_rng(0).standard_normal((8, 6, 9))
    assert np.allclose(TUCKER2.product(*map(torch.tensor, hosvd(W, 8))), W, atol=1e-12)
    tails = [
        np.linalg.svd(np.moveaxis(W, mode, 0).reshape(n, -1), compute_uv=False)[4:]
        for mode, n in ((0, 8), (1, 6))
    ]
    u_out, core, u_in = hosvd(W, 4)
    error = np.sum((W - TUCKER2.product(*map(torch.tensor, (u_out, core, u_in))).numpy()) ** 2)
    assert max(np.sum(t**2) for t in tails) <= error <= sum(np.sum(t**2) for t in tails)
    for U in (u_out, u_in):
        assert np.allclose(U.T @ U, np.eye(4))
        assert (U[np.abs(U).argmax(0), np.arange(4)] > 0).all()


@pytest.mark.parametrize("start", [hosvd, cp3])
def test_nothing_stays_nothing(start):
    assert all(np.isfinite(f).all() for f in start(np.zeros((4, 5, 9)), 3))


def test_cp3_recovers_a_planted_sum():
    rng = np.random.default_rng(0)
    factors = [rng.standard_normal((n, 3)) for n in (8, 7, 9)]
    W = np.einsum("or,cr,kr->ock", *factors)
    found = CP3.product(*map(torch.tensor, cp3(W, 3))).numpy()
    assert np.linalg.norm(found - W) < 1e-4 * np.linalg.norm(W)
    two = CP3.product(*map(torch.tensor, cp3(W, 2))).numpy()
    assert np.linalg.norm(two - W) > 0.05 * np.linalg.norm(W)
