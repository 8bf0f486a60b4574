"""Orthogonal regularisation: its value and gradient, what truncation leaves, and that it makes layers easier to cut."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgesolve.host.orthogonal import (
    factors,
    orthonormalise,
    over_parameterise,
    penalty,
    train,
    truncate,
    vbmf_ranks,
)

RANKS = {"0": 3, "3": 6, "5": 3}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 4)
    )


def data(n, seed=0):
    """Frames (n, 1, 6, 6) of four kinds: a bright quarter in noise."""
    draw = np.random.default_rng(seed)
    y = draw.integers(0, 4, n)
    x = 0.7 * draw.standard_normal((n, 1, 6, 6)).astype(np.float32)
    for i, k in enumerate(y):
        x[i, 0, 3 * (k // 2) :][:3, 3 * (k % 2) :][:, :3] += 0.8
    return torch.from_numpy(x), torch.from_numpy(y)


def disturbed(model, seed=1):
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def test_factors_start_as_the_weight_itself():
    model, x = network(), data(5)[0]
    before = model(x).detach()
    names = over_parameterise(model)
    assert names == ["0", "3", "5"]
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert float(penalty(model).detach()) < 1e-8
    for name, (U, s, V) in factors(model).items():
        T, D = model.get_submodule(name).weight.flatten(1).shape
        assert (U.shape, s.shape, V.shape) == ((T, min(T, D)), (min(T, D),), (D, min(T, D)))


def test_the_penalty_is_the_distance_from_orthonormal(accepts_only):
    model = network()
    over_parameterise(model)
    disturbed(model)
    expected = [
        np.linalg.norm(A.T @ A - np.eye(A.shape[1])) ** 2
        for U, _, V in factors(model).values()
        for A in (U.detach().double().numpy(), V.detach().double().numpy())
    ]
    accepts_only(
        lambda v: np.testing.assert_allclose(v.sum(), sum(expected), rtol=1e-5),
        np.array([float(penalty(model).detach())]),
        blind=("permuted", "flipped"),
    )
    U = factors(model)["0"][0]
    (gradient,) = torch.autograd.grad(penalty(model), [U])
    A = U.detach()
    torch.testing.assert_close(gradient, 4.0 * A @ (A.T @ A - torch.eye(6)), rtol=1e-4, atol=1e-5)


def test_the_hard_form_is_the_nearest_orthonormal_matrix():
    model = network()
    over_parameterise(model)
    disturbed(model)
    before = {n: U.detach().clone() for n, (U, _, _) in factors(model).items()}
    orthonormalise(model)
    assert float(penalty(model).detach()) < 1e-8
    generator = torch.Generator().manual_seed(0)
    for name, (U, _, _) in factors(model).items():
        own = float(torch.norm(U.detach() - before[name]))
        for _ in range(20):
            other = torch.linalg.qr(U.detach() + 0.05 * torch.randn(U.shape, generator=generator))
            turned = other.Q * torch.sign(torch.diagonal(other.R))
            assert own <= float(torch.norm(turned - before[name])) + 1e-6


@pytest.mark.parametrize("orthonormal", [True, False])
def test_what_is_left_is_the_truncated_svd(orthonormal, accepts_only):
    model = network()
    over_parameterise(model)
    if not orthonormal:
        disturbed(model)
    weights = {n: model.get_submodule(n).weight.detach().numpy() for n in ("0", "3", "5")}
    sizes = truncate(model, {"0": 2, "3": 5, "5": 1})
    assert sizes == {"0": 2 * (6 + 9), "3": 5 * (20 + 96), "5": 4 + 20}
    for (name, W), r in zip(weights.items(), (2, 5, 1), strict=True):
        U, s, Vt = np.linalg.svd(W.reshape(len(W), -1), full_matrices=False)
        expected = ((U[:, :r] * s[:r]) @ Vt[:r]).reshape(W.shape)
        accepts_only(
            lambda a, e=expected: np.testing.assert_allclose(a, e, atol=1e-5),
            model.get_submodule(name).weight.detach().numpy(),
        )
    assert all(type(m) in (nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten) for m in model)


def test_the_strongest_terms_stay_whatever_carries_the_strength():
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    over_parameterise(model)
    U, s, V = factors(model)["0"]
    with torch.no_grad():
        U.copy_(torch.eye(3) * torch.tensor([1.0, 10.0, 1.0]))
        V.copy_(torch.eye(4)[:, :3] * torch.tensor([1.0, 1.0, 3.0]))
        s.copy_(torch.tensor([2.0, -1.0, 1.0]))
    truncate(model, {"0": 1}, by="terms")
    expected = torch.zeros(3, 4)
    expected[1, 1] = -10.0
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_a_copy_is_cut_alone():
    model, x = network(), data(5)[0]
    over_parameterise(model)
    before = model(x).detach()
    truncate(copy.deepcopy(model), {"0": 1, "3": 1, "5": 1})
    torch.testing.assert_close(model(x).detach(), before)


def test_vbmf_finds_a_planted_rank():
    model = nn.Sequential(nn.Linear(200, 60, bias=False), nn.Linear(60, 1))
    draw = np.random.default_rng(0)
    W = draw.standard_normal((60, 7)) @ draw.standard_normal((7, 200))
    with torch.no_grad():
        noise = 0.3 * draw.standard_normal((60, 200))
        model[0].weight.copy_(torch.from_numpy(W + noise))
    assert over_parameterise(model) == ["0"]  # one output row has no rank to remove
    assert vbmf_ranks(model) == {"0": 7}
    assert vbmf_ranks(model, least=9) == {"0": 9}


def trained(seed, lam):
    x, y = data(400, seed)
    model = disturbed(network(seed), seed)
    over_parameterise(model)
    disturbed(model, seed + 10)  # factors of an over-parameterised network don't start orthonormal

    def batches(epoch):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        return order.split(50)

    loss = lambda m, pick: F.cross_entropy(m(x[pick]), y[pick])  # noqa: E731
    trace = train(model, batches, loss, epochs=8, lam=lam, shrink=1e-3, lr=1e-2)
    return model, trace


def accuracy(model):
    x, y = data(1000, 99)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def test_it_trains_and_is_orthogonal_where_asked():
    lost = {"free": [], "bound": []}
    for seed in range(3):
        free, _ = trained(seed, 0.0)
        bound, trace = trained(seed, 0.01)
        assert len(trace) == 8 and trace[-1][0] < trace[0][0]
        assert trace[-1][1] == pytest.approx(float(penalty(bound).detach()))
        assert trace[-1][1] < 0.1 * float(penalty(free).detach())
        for name, model in (("free", free), ("bound", bound)):
            whole = accuracy(model)
            assert whole > 0.8
            truncate(model, RANKS, by="terms")
            lost[name].append(whole - accuracy(model))
    assert sum(lost["bound"]) < 0.7 * sum(lost["free"])


def test_the_same_bytes_twice():
    a, b = (trained(0, 0.1)[0].state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no convolution or linear layer with a rank"):
        over_parameterise(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Linear(5, 1)))
    with pytest.raises(ValueError, match="call over_parameterise first"):
        penalty(network())
    model = network()
    over_parameterise(model)
    with pytest.raises(ValueError, match="ranks must name the layers 0, 3, 5, got 0"):
        truncate(model, {"0": 1})
    with pytest.raises(ValueError, match=r"3: rank must lie in 1\.\.20, got 0"):
        truncate(model, {"0": 1, "3": 0, "5": 1})
    with pytest.raises(ValueError, match="by must be svd or terms"):
        truncate(model, RANKS, by="size")
    with pytest.raises(ValueError, match="lam and shrink must be 0 or more"):
        train(model, lambda e: [], lambda m, b: 0, epochs=1, lam=-1.0)
