"""Factored layers in a network, against the dense layer that each equals, in torch and in onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
import small_nets as small
import torch
from torch import nn
from torch.nn import functional as F

from edgesolve.host.chain import dense, grouped, pivoted
from edgesolve.host.cp import cp
from edgesolve.host.export import to_onnx
from edgesolve.host.lowrank import lowrank
from edgesolve.host.metric import Metric
from edgesolve.host.network import trace
from edgesolve.host.sites import sites
from edgesolve.host.splice import Compressed, Dense, Factored
from edgesolve.host.tensor_train import tensor_train
from edgesolve.host.tucker import tucker2

FORMATS = {
    "lowrank": lambda m, shape: lowrank(m, shape, 2),
    "tucker2": lambda m, shape: tucker2(m, shape, (2, 2), sweeps=0),
    "narrow": lambda m, shape: tucker2(m, shape, (shape[0], 1), sweeps=0),
    "cp": lambda m, shape: cp(m, shape, 2, sweeps=1),
    "whole kernel": lambda m, shape: cp(m, shape, 2, separable=False, sweeps=1),
    "tensor_train": lambda m, shape: tensor_train(m, shape, (2, 2, 2), sweeps=0),
}
LAYERS = [(name, "odd") for name in small.ODD]
LAYERS += [("sequence", name) for name in ("a", "b", "token")]


def site_of(network, name):
    return next(s for s in sites(network)[0] if s.name == name)


def lossy(site, name):
    """A chain of few ranks for `site`, group by group."""
    parts = np.split(site.weight, site.groups)
    chains = [FORMATS[name](Metric.weight_space(w), site.shape) for w in parts]
    return pivoted(grouped(chains))


def as_layer(site, full, x, bias):
    """torch's own ungrouped layer of weight full (T, c, kh, kw), in float64."""
    full, bias = torch.from_numpy(np.ascontiguousarray(full)), torch.from_numpy(bias)
    if site.kind == "linear":
        return F.linear(x, full[:, :, 0, 0], bias)
    if site.kind == "conv1d":
        options = site.stride[0], site.padding[0], site.dilation[0]
        return F.conv1d(x, full[..., 0], bias, *options)
    return F.conv2d(x, full, bias, site.stride, site.padding, site.dilation)


def inputs(site, n=2):
    c = site.weight.shape[1] * site.groups
    shape = {"conv2d": (n, c, *site.at.before), "conv1d": (n, c, site.at.before[0])}
    shape = shape.get(site.kind, (n, *site.at.before[:1], c))
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_a_factored_layer_is_the_dense_one_of_its_full_weight(name, layer, form, accepts_only):
    site = site_of(small.made(name)[1], layer)
    if form == "tensor_train" and site.kind == "linear":
        pytest.skip("a linear layer has no spatial axes to split")
    chain, x = lossy(site, form), inputs(site)
    assert len(chain.factors) > 1
    bias = np.linspace(-1, 1, len(site.bias))
    with torch.no_grad():
        y = Factored(site, chain, bias, torch.float64)(x)
    own = torch.from_numpy(site.weight)
    assert site.kind != "conv2d" or y.shape[2:] == site.at.after

    def same(full):
        expected = as_layer(site, full, x, bias)
        np.testing.assert_allclose(y.numpy(), expected.numpy(), atol=1e-10)

    full = chain.full()
    accepts_only(same, full, blind=["flipped"] if full.shape[3] == 1 else ())
    if site.groups == 1:  # the ranks are lossy: it isn't the layer itself that is compared
        assert not torch.allclose(torch.from_numpy(full), own, atol=1e-2)


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_a_dense_layer_is_the_one_at_its_site(name, layer):
    model, network = small.made(name)
    site = site_of(network, layer)
    x = inputs(site).float()
    given = model.get_submodule(layer)
    if site.norm is not None:
        given = nn.Sequential(given, model.bn)
    if getattr(given, "padding_mode", "zeros") != "zeros":
        given = lambda x, w=given: F.conv2d(x, w.weight, w.bias)  # noqa: E731
    with torch.no_grad():
        torch.testing.assert_close(Dense(site)(x), given(x), rtol=1e-5, atol=1e-5)
        twice = Dense(site, 2.0 * site.weight, 2.0 * site.bias)(x)
        torch.testing.assert_close(twice, 2.0 * given(x), rtol=1e-5, atol=1e-5)
        whole = Factored(site, dense(site.weight), site.bias)(x) if site.groups == 1 else given(x)
        torch.testing.assert_close(whole, given(x), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def compressed():
    """(the traced original, a module with every other layer factored)."""
    network = small.made("small")[1]
    found, _ = sites(network)
    layers = {}
    for site in found[::2]:
        chain = pivoted(FORMATS["lowrank"](Metric.weight_space(site.weight), site.shape))
        layers[site.node] = Factored(site, chain, site.bias)
    return network, Compressed(network, found, layers).eval()


def test_nothing_replaced_is_the_network():
    for name in ("small", "sequence", "downsampled"):
        model, network = small.made(name)
        x = torch.from_numpy(small.images(3).transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            found = Compressed(network, sites(network)[0], {})(x)
            torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)


def test_traced_again_it_keeps_the_names(compressed):
    network, module = compressed
    again = trace(module, small.IMAGE)
    names = [s.name for s in sites(network)[0]]
    assert [s.name for s in sites(again)[0]] == [
        n for i, n in enumerate(names) for _ in range(2 - i % 2)
    ]
    assert not again.norms
    x = torch.from_numpy(small.images(3).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        torch.testing.assert_close(again.run(x), module(x))
    # Only what stands in the graph is stored, once.
    stored = sum(v.numel() for v in again.constants.values())
    assert stored == sum(b.numel() for b in module.buffers())


def test_the_weights_are_listed_under_their_layers(compressed):
    _, module = compressed
    names = dict(module.named_buffers())
    assert {"one.weight", "one.bias", "stem.weight_0", "stem.weight_1", "stem.bias"} <= set(names)
    assert names["stem.weight_0"].dtype == torch.float32


class Nested(nn.Module):
    """Modules with the names that the replay itself has, one layer called twice, and one inside another."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.norm, self.places = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.places(self.norm(self.norm(self.network(x))).mean((2, 3)))


def test_names_that_the_replay_has_itself_are_no_obstacle():
    model = small.seeded(Nested)
    network = trace(model, small.IMAGE)
    module = Compressed(network, sites(network)[0], {})
    again = trace(module, small.IMAGE)
    names = [s.name for s in sites(again)[0]]
    assert len(set(names)) == len(names) == 5
    x = torch.from_numpy(small.images(3).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        torch.testing.assert_close(again.run(x), model(x), rtol=1e-5, atol=1e-5)
    assert names == ["network_.0", "network_.2", "norm_2", "norm_3", "places_2"]


def test_the_exported_file_gives_the_same(compressed, accepts_only):
    import onnxruntime as ort

    _, module = compressed
    x = torch.from_numpy(small.images(3).transpose(0, 3, 1, 2).copy())
    raw = to_onnx(module, (x[:2],), ("x",), free_batch=True)
    session = ort.InferenceSession(raw, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = module(x).numpy()
    accepts_only(
        lambda a: np.testing.assert_allclose(a, expected, atol=1e-5),
        session.run(None, {"x": x.numpy()})[0],
    )
