"""Tracing: what a network costs, where it can be cut, and which ones are refused in one sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgesolve.host.errors import ModelError
from edgesolve.host.network import costs, cuts, trace

IMAGE = (3, 12, 12)


@pytest.fixture(scope="module")
def resnet20(nets):
    torch.manual_seed(0)
    return trace(nets.resnet20(), (3, 32, 32))


def test_resnet20_has_the_papers_size(resnet20):
    table = costs(resnet20)
    assert sum(p for p, _ in table.values()) == 269_722
    assert sum(m for _, m in table.values()) == 40_551_040  # 40.55 M
    assert len(resnet20.norms) == 19 and sum(n.channels for n in resnet20.norms) == 688


def test_parameters_are_those_of_torch(front):
    model, network = front
    table = costs(network)
    assert sum(p for p, _ in table.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "name, macs",
    [
        ("plain", 6 * 27 * 100 + 30),
        ("stride", 6 * 27 * 36 + 30),
        ("groups", 6 * 9 * 100 + 30),
        ("depthwise", 3 * 9 * 144 + 15),
        ("rectangular", 6 * 9 * 72 + 30),
        ("linear", 432 * 10 + 50),
        ("transposed", 3 * 144 * 6 * 4 + 30),
    ],
)
def test_multiply_adds(traced, name, macs):
    assert sum(m for _, m in costs(traced(name)[1]).values()) == macs


def test_a_residual_network_is_cut_between_blocks_only(resnet20):
    found = cuts(resnet20)
    names = [c.name for c in found]
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1, 2)]
    assert [n.split(".conv")[0] for n in names] == ["bn1", *blocks, "linear"][-len(names) :] or [
        n.split(".conv")[0] for n in names
    ] == [*blocks, "linear"]
    shapes = {c.name.split(".conv")[0]: c.shape for c in found}
    assert shapes["layer2.0"] == (16, 32, 32) and shapes["layer3.2"] == (64, 8, 8)
    params = [c.params_after for c in found]
    assert params == sorted(params, reverse=True) and len(set(params)) == len(params)
    last_block = next(c for c in found if c.name.startswith("layer3.2"))
    assert last_block.params_after == 2 * (64 * 64 * 9 + 128) + 650
    assert last_block.macs_after == 2 * 64 * 64 * 9 * 64 + 640
    # The classifier's average belongs to what is replaced: the head must see positions.
    assert shapes["linear"] == (64, 8, 8)


def test_branches_are_cut_where_they_meet(traced):
    found = cuts(traced("concatenation")[1])
    assert [c.shape for c in found] == [(11, 12, 12)]


def test_a_view_by_size_is_no_obstacle(nets, scrambled):
    model = scrambled(nets.ViewNet())
    network = trace(model, IMAGE)
    x = torch.randn(1, *IMAGE)
    with torch.no_grad():
        torch.testing.assert_close(network.run(x), model(x))
    found = cuts(network)
    assert [c.shape for c in found] == [(4, 12, 12), (8, 5, 5), (16,)]
    fc2 = 16 * 4 + 4
    fc1 = 200 * 16 + 16
    assert [c.params_after for c in found] == [4 * 8 * 9 + 8 + 16 + fc1 + fc2, fc1 + fc2, fc2]


def test_everything_flows_through_a_cut(resnet20):
    """With its tensor zeroed nothing of the input is left in the output."""
    x = torch.randn(3, 3, 32, 32)
    found = cuts(resnet20)[::4]

    def spread(watch=None):
        with torch.no_grad():
            logits = resnet20.run(x, watch=watch)
        return float((logits - logits[:1]).abs().max())

    assert spread() > 1e-3 and len(found) >= 2
    for cut in found:

        def block(node, value, args, cut=cut):
            if node.name == cut.node:
                assert tuple(value.shape[1:]) == cut.shape
                value.zero_()

        assert spread(block) < 1e-6


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_replay_is_the_model(front, n):
    model, network = front
    x = torch.randn(n, *IMAGE)
    with torch.no_grad():
        torch.testing.assert_close(network.run(x), model(x))


def test_a_pt2_file_with_a_free_batch(nets, scrambled):
    model = scrambled(nets.whole("stride"))
    x = torch.randn(4, *IMAGE)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    with torch.no_grad():
        torch.testing.assert_close(trace(program, IMAGE).run(x[:3]), model(x[:3]))


# -- refused ----------------------------------------------------------------------------------------


def refuse(model, sentence, shape=IMAGE):
    with pytest.raises(ModelError, match=sentence) as found:
        trace(model, shape)
    assert "\n" not in str(found.value)


class Two(nn.Module):
    def forward(self, x, y=None):
        return x.mean((2, 3)) if y is None else y


class Pairs(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), x.amax((2, 3))


class Branch(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_a_normalisation_without_running_statistics(nets):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    refuse(model, "1 has no running statistics, so its output depends on the batch")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(nets, value):
    model = nets.whole("plain")
    model.tail.weight.data[1, 1] = value
    refuse(model, r"tail\.weight: the weights hold NaN or inf")
    model = nets.whole("plain")
    model.front[1].running_var[0] = value
    refuse(model, r"front\.1\.running_var: the weights hold NaN or inf")


def test_two_inputs():
    x = torch.zeros(2, *IMAGE)
    n = torch.export.Dim("n")
    program = torch.export.export(Two(), (x, torch.zeros(2, 3)), dynamic_shapes=({0: n}, {0: n}))
    refuse(program, "takes 2 inputs, expected one")


def test_a_pt2_file_with_a_fixed_batch(nets):
    model = nets.ViewNet().eval()
    program = torch.export.export(model, (torch.zeros(2, *IMAGE),))
    refuse(program, r"fixed batch size; .*dynamic_shapes=")


@pytest.mark.parametrize(
    "model, found",
    [
        (nn.Conv2d(3, 4, 3), r"\(3, 4, 10, 10\)"),
        (Pairs(), "tuple"),
    ],
)
def test_an_output_that_is_no_logits(model, found):
    refuse(model, rf"returns {found}, expected logits of shape \(n, classes\)")


def test_a_branch_on_the_data():
    refuse(Branch(), "torch.export cannot trace the model")


def test_frames_of_another_shape(nets):
    refuse(nets.whole("linear"), "torch.export cannot trace", (3, 14, 14))


def test_an_unknown_call_site(resnet20):
    with pytest.raises(ModelError, match="nowhere: no such call site"):
        resnet20.run(resnet20.example, until="nowhere")
