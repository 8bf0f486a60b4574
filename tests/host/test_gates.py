"""Banks of gates: what they hold, what they cost, and which of them are chosen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from edgesolve.host.adaptable import Preprocess
from edgesolve.host.capture import activations
from edgesolve.host.distill import HeadOptions, distill
from edgesolve.host.gates import (
    RowMaker,
    affordable,
    design_rows,
    gate_bank,
    greedy_order,
    teacher_filters,
)
from edgesolve.host.network import cuts, trace

PLAIN = Preprocess(1.0, (0.0,) * 3, (1.0,) * 3)
KINDS = ("auto", "teacher", "seeded", "seeded3")


@pytest.fixture(scope="module")
def place(nets, scrambled):
    """(network, a cut of 8 channels, z there (200, 8, 6, 6), logits)."""
    torch.manual_seed(0)
    model = scrambled(
        nn.Sequential(
            nets.convolution(8, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
        )
    )  # fmt: skip
    network = trace(model, (3, 12, 12))
    cut = next(c for c in cuts(network) if c.shape[0] == 8)
    x = np.random.default_rng(2).normal(size=(200, 12, 12, 3)).astype(np.float32)
    return network, cut, *activations(network, cut.node, PLAIN, x)


def bank(place, kind, n=24, seed=0):
    network, cut, z, _ = place
    return gate_bank(network, cut.node, z, kind, n, seed)


@pytest.mark.parametrize("kind, side", [("seeded", 1), ("seeded3", 3)])
def test_a_seeded_bank_is_signs_in_units_of_each_channel(place, kind, side):
    z = place[2]
    found = bank(place, kind)
    assert found.weight.shape == (24, 8, side, side) and found.source == kind
    signs = found.weight * z.std((0, 2, 3))[:, None, None]
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs))
    assert 0.3 < (signs > 0).float().mean() < 0.7
    assert len({tuple(row.flatten().tolist()) for row in signs}) == 24, "all differ"
    longer, other = bank(place, kind, n=48), bank(place, kind, seed=1)
    assert torch.equal(longer.weight[:24], found.weight) and longer.weight.shape[0] == 48
    assert not torch.equal(other.weight, found.weight)


@pytest.mark.parametrize("kind, inputs", [("seeded", 8), ("seeded3", 72)])
def test_seeded_gates_open_around_the_mean(place, kind, inputs):
    """At the mean activation a pre-activation is the drawn offset: 0.3 deviations of a sum of `inputs` signs."""
    z = place[2]
    b = bank(place, kind, n=400)
    offset = (b.bias + b.weight.sum((2, 3)) @ z.mean((0, 2, 3))) / (0.3 * inputs**0.5)
    assert abs(float(offset.mean())) < 0.15 and 0.85 < float(offset.std()) < 1.15


def test_where_there_is_one_position_3x3_gates_are_1x1_gates(place):
    network, cut, z, _ = place
    flat = z.mean((2, 3), keepdim=True)
    one, three = (gate_bank(network, cut.node, flat, k, 8, 0) for k in ("seeded", "seeded3"))
    assert torch.equal(one.weight, three.weight) and torch.equal(one.bias, three.bias)
    assert one.source == three.source == "seeded"


def test_an_unknown_kind_is_refused(place):
    with pytest.raises(ValueError, match="auto, teacher, seeded or seeded3, got 'magic'"):
        bank(place, "magic")


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_that_is_affordable_costs_what_its_rows_say(place, kind):
    network, cut, z, logits = place
    size = affordable(network, cut, 4, kind)
    assert size is not None

    def share(m, r):
        rows, _ = design_rows(network, cut.node, z, logits, kind=kind, n_gates=m, rank=r)
        length = rows.starts[-1]
        params = rows.n_params() + (length + 1) * 4
        return params / cut.params_after, (rows.macs(cut.shape) + 4 * length) / cut.macs_after

    params, macs = share(*size)
    assert params <= 0.7 and macs <= 0.9
    # Limits drawn around what this size costs: a count that is off by one takes another size.
    exact = dataclasses.replace(
        cut,
        params_after=round(params * cut.params_after / 0.7 + 0.5),
        macs_after=round(macs * cut.macs_after / 0.9 + 0.5),
    )
    assert affordable(network, exact, 4, kind) == size
    for less in ({"params_after": exact.params_after - 3}, {"macs_after": exact.macs_after - 3}):
        assert affordable(network, dataclasses.replace(exact, **less), 4, kind) != size


def test_3x3_gates_are_the_dearer_ones(place):
    network, cut = place[:2]
    tight = dataclasses.replace(cut, macs_after=100_000, params_after=8000)
    one, three = (affordable(network, tight, 4, kind) for kind in ("seeded", "seeded3"))
    assert one is not None and three is not None and one[0] > three[0]


@pytest.mark.parametrize("kind", ["seeded", "seeded3"])
def test_the_greedy_order_finds_planted_gates(place, kind):
    """Targets that five gates of 24 make: they come first, whichever way the bank is ordered."""
    _, _, z, logits = place
    make = RowMaker.of(z, logits, bank(place, kind), 24, 3)
    planted = [3, 8, 13, 17, 22]
    rows = make.rows(range(24), 1)
    size = rows.value_weight.shape[0]
    A = rows(z).detach()
    A = A - A.mean(0)
    U = torch.zeros(A.shape[1], 4)
    for i in planted:
        block = slice(i * size, (i + 1) * size)
        plain = A[:, 24 * size :]
        own = A[:, block] - plain @ torch.linalg.lstsq(plain, A[:, block]).solution
        U[block] = (
            torch.randn(size, 4, generator=torch.Generator().manual_seed(i)) / own.std(0)[:, None]
        )
    targets = A @ U

    def found(order):
        assert len(set(planted) & set(np.asarray(order).tolist())) >= 4

    order = greedy_order(rows, z, targets, 8)
    assert len(set(order)) == 8
    found(order)
    assert greedy_order(rows, z, targets, 16)[:8] == order, (
        "a larger choice begins with the smaller"
    )
    back = greedy_order(make.rows(reversed(range(24)), 1), z, targets, 8)
    assert {23 - i for i in back} == set(order)


@pytest.mark.parametrize("kind", ["seeded", "seeded3"])
def test_a_seeded_head_end_to_end(place, frames, kind):
    network, cut = place[:2]
    x, held_out = frames(240, (12, 12, 3)), np.arange(240) % 5 == 0
    options = HeadOptions(gates=kind, n_gates=8, rank=3, seed=5)
    found = distill(network, cut, PLAIN, x, held_out, options)
    side = 3 if kind == "seeded3" else 1
    assert found.gate_source == kind and found.rows.gate_weight.shape == (8, 8, side, side)
    assert found.agreement > 0.5 and found.solution.relative_gap <= 1e-6
    again = distill(network, cut, PLAIN, x, held_out, options)
    assert again.solution.weights.tobytes() == found.solution.weights.tobytes()


@pytest.mark.parametrize("kind", ["teacher", "seeded"])
def test_a_smaller_head_keeps_the_greedy_choice(place, kind):
    network, cut, z, logits = place
    found, _ = design_rows(network, cut.node, z, logits, kind=kind, n_gates=8, rank=3)
    make = RowMaker.of(z, logits, bank(place, kind, n=32), 8, 3)
    chosen = sorted(greedy_order(make.rows(range(32), 1), z, logits, 8))
    assert chosen != list(range(8))
    assert torch.equal(found.gate_weight, make.rows(chosen, 2).gate_weight)


def test_auto_takes_the_removed_blocks_filters(place):
    network, cut = place[:2]
    own = teacher_filters(network, cut.node)
    assert torch.equal(bank(place, "auto").weight, own.weight) and own.weight.shape[0] == 32
