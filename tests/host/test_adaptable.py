"""The teacher with open statistics, against torch's own batch normalisation in both modes."""

from __future__ import annotations

import copy

import pytest
import torch

from edgesolve.host.adaptable import Preprocess, Teacher, window_statistics, with_virtual_norms
from edgesolve.host.network import cuts, trace
from edgesolve.host.rows import Rows, grid_pool

PLAIN = Preprocess(1.0, (0.0,) * 3, (1.0,) * 3)


def teacher_of(network):
    cut = cuts(network)[-1]
    d, *side = cut.shape if len(cut.shape) == 3 else (*cut.shape, 1, 1)
    rows = Rows(
        *(torch.ones(2, d, 1, 1), torch.zeros(2), torch.ones(1, d), torch.zeros(1)),
        *(torch.zeros(d), torch.ones(d), grid_pool(*side, 1)),
    )
    return Teacher(network, cut.node, rows, PLAIN).eval()


def source(network):
    return tuple(torch.cat([getattr(n, k) for n in network.norms]) for k in ("mean", "var"))


def run(teacher, x, mix, mean, var, weight=None):
    weight = torch.full((len(x),), 1.0 / len(x)) if weight is None else weight
    with torch.no_grad():
        return teacher(x, weight, torch.tensor([mix]), mean, var)


@pytest.fixture
def x(frames):
    return torch.from_numpy(1.5 * frames(6, (12, 12, 3)) + 0.3)


def close(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=2e-4, atol=2e-5)


def test_without_mixing_it_is_the_original_network(front, x, accepts_only):
    model, network = front
    found = run(teacher_of(network), x, 0.0, *source(network))
    with torch.no_grad():
        expected = model(x.permute(0, 3, 1, 2))
    accepts_only(lambda answer: close(answer, expected), found[0].numpy())


def test_with_the_window_alone_it_is_torch_in_training_mode(front, x, accepts_only):
    model, network = front
    live = copy.deepcopy(model).train()
    norms = [m for m in live.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    counts, order = [], []

    def before(module, inputs):
        counts.append(inputs[0].numel() / inputs[0].shape[1])
        order.append(module)

    for module in norms:
        module.momentum = 1.0
        module.register_forward_pre_hook(before)
    with torch.no_grad():
        expected = live(x.permute(0, 3, 1, 2))
    logits, _, mean, var = run(teacher_of(network), x, 1.0, *source(network))
    accepts_only(lambda answer: close(answer, expected), logits.numpy())
    close(mean, torch.cat([m.running_mean for m in order]))
    biased = [m.running_var * (n - 1) / n for m, n in zip(order, counts, strict=True)]
    close(var, torch.cat(biased))


@pytest.mark.parametrize("mix", [0.25, 0.5, 0.8])
def test_the_mixture_is_matched_in_both_moments(traced, x, mix):
    """One normalisation right after a convolution, written out."""
    model, network = traced("plain")
    mean, var = source(network)
    conv, bn = model.front
    with torch.no_grad():
        y = conv(x.permute(0, 3, 1, 2))
        m, v = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
        used_mean = (1 - mix) * mean + mix * m
        used_var = (1 - mix) * var + mix * v + mix * (1 - mix) * (m - mean) ** 2
        at = (None, slice(None), None, None)
        z = (y - used_mean[at]) / torch.sqrt(used_var[at] + bn.eps) * bn.weight[at] + bn.bias[at]
        expected = model.tail(torch.relu(z).mean((2, 3)))
    logits, _, window_mean, window_var = run(teacher_of(network), x, mix, mean, var)
    close(logits, expected)
    close(window_mean, m)
    close(window_var, v)


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_padding_of_weight_zero_is_not_seen(front, x, mix):
    _, network = front
    teacher, statistics = teacher_of(network), source(network)
    alone = run(teacher, x[:3], mix, *statistics)
    weight = torch.tensor([1 / 3] * 3 + [0.0] * 3)
    for padding in (x[3:], 50 * x[3:], x[:1].expand(3, -1, -1, -1)):
        padded = run(teacher, torch.cat([x[:3], padding]), mix, *statistics, weight)
        close(padded[0][:3], alone[0])
        close(padded[1][:3], alone[1])
        close(padded[2], alone[2])
        close(padded[3], alone[3])


def test_weights_are_weights():
    y = torch.randn(3, 4, 5, 5)
    mean, var = window_statistics(y, torch.tensor([0.5, 0.25, 0.25]))
    twice = torch.cat([y, y[:1]])
    close(mean, twice.mean((0, 2, 3)))
    close(var, twice.var((0, 2, 3), unbiased=False))
    mean, var = window_statistics(y[:, :, 0, 0], torch.full((3,), 1 / 3))
    close(mean, y[:, :, 0, 0].mean(0))
    close(var, y[:, :, 0, 0].var(0, unbiased=False))


def test_the_variance_of_large_numbers_is_not_cancelled_away():
    y = torch.randn(8, 2, 16, 16) + 1000.0
    _, var = window_statistics(y, torch.full((8,), 1 / 8))
    torch.testing.assert_close(
        var, y.double().var((0, 2, 3), unbiased=False).float(), rtol=1e-2, atol=0
    )


# -- networks that have no normalisation ------------------------------------------------------------


def test_virtual_normalisations_leave_the_outputs_alone(nets, x):
    model = nets.plain_cnn().eval()
    network = trace(model, (3, 12, 12))
    assert not network.norms
    batches = [x[:3].permute(0, 3, 1, 2), x[3:].permute(0, 3, 1, 2)]
    virtual = with_virtual_norms(network, batches)
    assert [n.virtual for n in virtual.norms] == [True, True], "the classifier is left out"
    statistics = source(virtual)
    with torch.no_grad():
        close(virtual.run(x.permute(0, 3, 1, 2)), model(x.permute(0, 3, 1, 2)))
        expected = model[0](x.permute(0, 3, 1, 2))
        close(run(teacher_of(virtual), x, 0.0, *statistics)[0], model(x.permute(0, 3, 1, 2)))
    close(statistics[0][:8], expected.mean((0, 2, 3)))
    close(statistics[1][:8], expected.var((0, 2, 3), unbiased=False))
    shifted = run(teacher_of(virtual), 0.5 * x + 1.0, 1.0, *statistics)[0]
    clean = run(teacher_of(virtual), x, 1.0, *statistics)[0]
    assert (shifted - clean).abs().max() < 0.05
    with torch.no_grad():
        assert (model((0.5 * x + 1.0).permute(0, 3, 1, 2)) - clean).abs().max() > 0.05


def test_a_network_that_is_normalised_gets_no_virtual_ones(traced, x):
    for name in ("plain", "shared"):
        _, network = traced(name)
        again = with_virtual_norms(network, [x.permute(0, 3, 1, 2)])
        assert len(again.norms) == len(network.norms), name
