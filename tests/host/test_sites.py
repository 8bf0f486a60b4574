"""Which layers can be replaced, read against torch's own modules; and why the others can't."""

from __future__ import annotations

import numpy as np
import pytest
import small_nets as small
import torch
from torch import nn
from torch.nn import functional as F

from edgesolve.host.network import trace
from edgesolve.host.sites import folded_run, sites


class Separate(nn.Module):
    """Normalisations that can't be folded: before an activation, and with another reader of the layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.before, self.beside = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        y = self.first(x)
        z = self.second(F.relu(self.before(F.relu(y))))
        return self.fc((self.beside(y) + y + z).mean((2, 3)))


class Refused(nn.Module):
    def __init__(self):
        super().__init__()
        self.same = nn.Conv2d(3, 4, 3, padding="same")
        self.even = nn.Conv2d(4, 4, (2, 3), padding="same")
        self.wise = nn.Conv2d(4, 4, 3, groups=4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.solid = nn.Conv3d(4, 4, 1)
        self.scale, self.fc = nn.Parameter(torch.ones(4, 4)), nn.Linear(4, 2)

    def forward(self, x):
        x = self.wise(self.even(self.same(x)))
        x = self.up(self.twice(F.relu(self.twice(x))))
        x = self.solid(x[:, :, None])[:, :, 0].mean((2, 3))
        return self.fc(F.linear(x, self.scale * self.scale))


@pytest.fixture(scope="module", params=list(small.ODD))
def odd(request):
    return small.made(request.param)


def by_name(network):
    return {s.name: s for s in sites(network)[0]}


def folded(network, x):
    layers, norm = folded_run(network, sites(network)[0])
    with torch.no_grad():
        return network.run(x, norm=norm, layers=layers)


def seen_by(layer, model, x):
    """(input, output) of the module `layer` while `model` runs on x."""
    found = []
    hook = layer.register_forward_hook(lambda m, args, y: found.append((args[0], y)))
    with torch.no_grad():
        model(x)
    hook.remove()
    return found[0]


def test_every_attribute_is_read(odd, accepts_only):
    """Run in float64 from what the site says, the layer gives what torch's module gives."""
    model, network = odd
    site = by_name(network)["odd"]
    x, y = seen_by(model.odd, model, torch.from_numpy(small.images(2).transpose(0, 3, 1, 2)))
    if model.odd.padding_mode == "reflect":
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")  # a call site of its own
    options = site.stride, site.padding, site.dilation, site.groups

    def same(weight):
        weight = torch.from_numpy(np.ascontiguousarray(weight))
        found = F.conv2d(x.double(), weight, torch.from_numpy(site.bias), *options)
        np.testing.assert_allclose(found.numpy(), y.numpy(), atol=1e-5)

    accepts_only(same, site.weight, blind=["flipped"] if site.weight.shape[3] == 1 else ())
    assert site.at.before == tuple(x.shape[2:]) and site.at.after == tuple(y.shape[2:])
    assert site.weight.dtype == site.bias.dtype == np.float64
    assert site.macs == y[0].numel() * site.weight[0].size
    c = model.odd.in_channels // model.odd.groups
    assert site.shape == (8 // site.groups, c, *model.odd.kernel_size)


def test_stride_padding_and_dilation_go_to_the_factor_of_their_axis():
    site = by_name(small.made("dilation")[1])["odd"]
    assert site.along("hw") == ([1, 3], [0, 2], [1, 2])
    assert site.along("w") == ([1, 3], [0, 2], [1, 2])
    assert site.along("h") == site.along("") == ([1, 1], [0, 0], [1, 1])


def test_layers_of_sequences():
    model, network = small.made("sequence")
    found = by_name(network)
    assert [s.kind for s in found.values()] == ["conv1d", "conv1d", "linear", "linear"]
    b = found["b"]
    assert (b.stride, b.padding, b.dilation, b.groups) == ((2, 1), (2, 0), (2, 1), 2)
    assert b.weight.shape == (8, 4, 3, 1) and b.at == ((80, 1), (40, 1)) and b.shape[0] == 4
    assert found["token"].at == ((40, 1), (40, 1)) and found["fc"].at == ((1, 1), (1, 1))
    np.testing.assert_array_equal(found["fc"].bias, np.zeros(4))
    np.testing.assert_array_equal(found["fc"].weight[:, :, 0, 0], model.fc.weight.detach().numpy())
    for name, layer in (("a", model.a), ("token", model.token)):
        for mine, given in zip(found[name].tensors(), (layer.weight, layer.bias), strict=True):
            torch.testing.assert_close(mine, given.detach())


def test_folding_gives_the_network(front):
    model, network = front
    x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(folded(network, x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["small", "sequence", "downsampled"])
def test_folding_gives_the_whole_network(name):
    model, network = small.made(name)
    x = torch.from_numpy(small.images(4).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        torch.testing.assert_close(folded(network, x), model(x), rtol=1e-5, atol=1e-5)


def test_only_a_normalisation_right_behind_its_layer_is_folded():
    model = small.seeded(Separate)
    network = trace(model, small.IMAGE)
    found = by_name(network)
    assert found["first"].norm is None and found["second"].norm is None
    x = torch.from_numpy(small.images(4).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        torch.testing.assert_close(folded(network, x), model(x), rtol=1e-5, atol=1e-5)
    found = by_name(small.made("small")[1])
    assert found["stem"].norm is not None and found["one"].norm is None


def test_what_cannot_be_replaced_is_named_with_the_reason():
    network = trace(small.seeded(Refused), small.IMAGE)
    found, refused = sites(network)
    assert refused == {
        "even": "padded by 'same' with more behind than before; left dense",
        "wise": "one input channel per group, no rank to remove; left dense",
        "twice": "its weight is used at several call sites; left dense",
        "up": "a transposed convolution; left dense",
        "solid": "a 3-D convolution; left dense",
        "linear": "its weight is computed by the network; left dense",
    }
    assert [s.name for s in found] == ["same", "wise", "twice", "twice", "fc"]


def test_padding_ahead_of_a_layer_stays_a_call_of_its_own(traced):
    (site, _), refused = sites(traced("asymmetric padding")[1])
    assert site.padding == (0, 0) and site.at == ((13, 13), (6, 6)) and not refused


def test_an_exported_program_reads_the_same():
    model, network = small.made("small")
    free = ({0: torch.export.Dim("n", min=1, max=64)},)
    program = torch.export.export(model, (torch.zeros(2, *small.IMAGE),), dynamic_shapes=free)
    own, given = (sites(n)[0] for n in (network, trace(program, small.IMAGE)))
    for a, b in zip(own, given, strict=True):
        assert (a.name, a.stride, a.padding, a.at) == (b.name, b.stride, b.padding, b.at)
        np.testing.assert_array_equal(a.weight, b.weight)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_batch_norm_behind_padding_by_rule_is_folded(padding, accepts_only):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    inner = [nn.Conv2d(3, 4, 3, padding=padding), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*inner, nn.Flatten(), nn.Linear(4, 2)).eval()
    network = trace(model, (3, 8, 8))
    assert by_name(network)["0"].norm is not None
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        expected = model(x).numpy()

    def same(found):
        np.testing.assert_allclose(found, expected, atol=1e-5)

    accepts_only(same, folded(network, x).numpy())
