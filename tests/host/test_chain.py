"""Chains of convolutions, against torch running them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgesolve.host.chain import Chain, Factor, Positions, dense, grouped, pivoted

g = np.random.default_rng(0)


def factor(o, i, kh=1, kw=1, axes="", groups=1):
    return Factor(g.standard_normal((o, i, kh, kw)), axes, groups)


CHAINS = {
    "dense": (factor(4, 3, 3, 2, "hw"),),
    "low rank": (factor(2, 3, 3, 2, "hw"), factor(4, 2)),
    "tucker2": (factor(2, 5), factor(3, 2, 3, 2, "hw"), factor(6, 3)),
    "input only": (factor(2, 5), factor(6, 2, 3, 2, "hw")),
    "1x1": (factor(2, 5, axes="hw"), factor(6, 2)),
    "train": (factor(3, 5), factor(4, 3, 3, 1, "h"), factor(3, 4, 1, 2, "w"), factor(6, 3)),
    "separable": (factor(4, 5, 3, 1, "h"), factor(6, 4, 1, 2, "w")),
    "cp": (factor(3, 5), factor(3, 1, 3, 1, "h", 3), factor(3, 1, 1, 2, "w", 3), factor(6, 3)),
    "grouped": (factor(4, 3, axes="", groups=2), factor(6, 2, 3, 2, "hw", 2)),
}


@pytest.fixture(params=list(CHAINS))
def chain(request):
    return Chain(request.param, (1,), CHAINS[request.param])


def run(chain, x, stride=(1, 1), padding=(0, 0), dilation=(1, 1)):
    """Factor by factor: an axis that a factor doesn't work along keeps torch's defaults."""
    for f in chain.factors:
        works = [axis in f.axes for axis in "hw"]

        def along(values, other, works=works):
            return tuple(v if w else other for v, w in zip(values, works, strict=True))

        options = along(stride, 1), along(padding, 0), along(dilation, 1), f.groups
        x = functional.conv2d(x, torch.from_numpy(f.weight), None, *options)
    return x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (2, 1)},
        {"padding": (1, 2)},
        {"stride": (3, 2), "padding": (2, 1), "dilation": (2, 3)},
    ],
)
def test_the_full_weight_runs_like_the_chain(chain, options, accepts_only):
    x = torch.from_numpy(
        np.random.default_rng(1).standard_normal((2, chain.factors[0].c_in, 9, 10))
    )
    expected = run(chain, x, **options).numpy()

    def equal(weight):
        weight = torch.from_numpy(np.ascontiguousarray(weight))
        np.testing.assert_allclose(
            functional.conv2d(x, weight, None, **options), expected, atol=1e-12
        )

    shape = chain.full().shape
    accepts_only(lambda answer: equal(answer.reshape(shape)), chain.full().reshape(shape[0], -1))


def test_parameters_and_multiply_adds_are_those_of_the_layers(chain):
    x = torch.zeros(1, chain.factors[0].c_in, 8, 9, dtype=torch.float64)
    total = macs = 0
    for f in chain.factors:
        strides = tuple(2 if axis in f.axes else 1 for axis in "hw")
        x = functional.conv2d(x, torch.from_numpy(f.weight), None, strides, 0, 1, f.groups)
        total += f.weight.size
        macs += x[0, 0].numel() * f.weight.size
    assert chain.n_params == total
    assert chain.macs(Positions((8, 9), tuple(x.shape[2:]))) == macs


def test_pivoting_keeps_the_layer(chain, accepts_only):
    thin = pivoted(chain)

    def equal(weight):
        np.testing.assert_allclose(weight, chain.full(), atol=1e-12)

    shape = chain.full().shape
    accepts_only(lambda answer: equal(answer.reshape(shape)), thin.full().reshape(shape[0], -1))
    assert thin.format == chain.format and thin.n_params <= chain.n_params


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("low rank", 4),
        ("tucker2", 4 + 9),
        ("input only", 4),
        ("1x1", 4),
        ("train", 9 + 9),
        ("cp", 0),
    ],
)
def test_pivoting_saves_one_square_per_outer_factor(name, saved):
    chain = Chain(name, (), CHAINS[name])
    thin = pivoted(chain)
    assert chain.n_params - thin.n_params == saved
    at = Positions((4, 4), (4, 4))
    assert chain.macs(at) - thin.macs(at) == 16 * saved
    for f in thin.factors:
        if f.pivots:
            block = f.weight[..., 0, 0]
            block = block[:, f.pivots] if f.narrows else block[f.pivots, :]
            np.testing.assert_array_equal(block, np.eye(len(f.pivots)))
    again = pivoted(thin)
    assert [f.weight.tobytes() for f in again.factors] == [f.weight.tobytes() for f in thin.factors]


def test_a_pivoted_low_rank_layer_never_stores_more_than_the_dense_one():
    for r in range(1, 5):
        chain = Chain("low rank", (r,), (factor(r, 3, 2, 2, "hw"), factor(4, r)))
        assert pivoted(chain).n_params <= 4 * 12


def test_a_grouped_chain_runs_its_groups_side_by_side(chain):
    other = Chain(
        chain.format,
        chain.ranks,
        tuple(Factor(2 * f.weight, f.axes, f.groups) for f in chain.factors),
    )
    both = grouped([chain, other])
    x = torch.from_numpy(
        np.random.default_rng(2).standard_normal((2, 2 * chain.factors[0].c_in, 6, 7))
    )
    halves = x.chunk(2, dim=1)
    expected = torch.cat([run(chain, halves[0]), run(other, halves[1])], dim=1)
    torch.testing.assert_close(run(both, x), expected)
    assert both.n_params == 2 * chain.n_params and grouped([chain]) is chain


def test_dense_is_the_weight():
    W = g.standard_normal((4, 3, 3, 3)).astype(np.float32)
    chain = dense(W)
    np.testing.assert_array_equal(chain.full(), W)
    assert chain.full().dtype == np.float64 and chain.n_params == W.size


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: factor(2, 2, 3, 1, "w"), "a 3x1 factor must work along its axes, got 'w'"),
        (lambda: factor(2, 2, axes="wh"), "axes must be one of"),
        (lambda: factor(3, 2, axes="", groups=2), "3 output channels don't split into 2 groups"),
        (lambda: Factor(np.ones((2, 3, 1, 1)), pivots=(0, 1)), "must be the identity"),
        (lambda: Factor(np.ones((2, 3, 1, 1)), "hw", pivots=(0, 1)), "without stride or groups"),
        (
            lambda: Chain("x", (), (factor(2, 3, axes="hw"), factor(4, 3))),
            "makes 2 channels, the next one takes 3",
        ),
        (lambda: Chain("x", (), (factor(2, 3, axes="h"),)), "each spatial axis"),
        (
            lambda: Chain("x", (), (factor(2, 3, axes="hw"), factor(2, 2, axes="w"))),
            "each spatial axis",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
