"""Normalisations folded into layers: the backbone gives what the unfolded network gives."""

from __future__ import annotations

import pytest
import torch

from edgesolve.host.adaptable import Backbone, Preprocess, fold_layer
from edgesolve.host.network import cuts, source_layer
from edgesolve.host.rows import Rows, grid_pool

PLAIN = Preprocess(1.0, (0.0,) * 3, (1.0,) * 3)


def rows_for(cut):
    d, *side = cut.shape if len(cut.shape) == 3 else (*cut.shape, 1, 1)
    g = torch.Generator().manual_seed(0)
    draws = [torch.randn(*s, generator=g) for s in ((4, d, 1, 1), (4,), (2, d), (2,), (d,))]
    return Rows(*draws, torch.ones(d), grid_pool(*side, 1))


def test_a_folded_backbone_is_the_network_up_to_the_cut(front, frames, accepts_only):
    model, network = front
    cut = cuts(network)[-1]
    x = torch.from_numpy(frames(5, (12, 12, 3)))
    backbone = Backbone(network, cut.node, rows_for(cut), PLAIN).eval()
    assert len(backbone.sites) == len(network.norms) > 0
    with torch.no_grad():
        expected = model.features(x.permute(0, 3, 1, 2))

        def equal(features):
            torch.testing.assert_close(torch.as_tensor(features), expected, rtol=1e-4, atol=1e-5)

        # A classifier's average may hide a permutation, the features don't.
        accepts_only(equal, backbone.features(x).numpy())
        torch.testing.assert_close(backbone(x), backbone.rows(expected), rtol=1e-4, atol=1e-4)


def test_no_normalisation_is_left_in_a_folded_backbone(traced, frames):
    """A convolution's own normalisation costs nothing; only those after an addition do."""
    from edgesolve.host.network import _BATCH_NORMS

    for name, affine in (
        ("plain", 0),
        ("after an addition", 1),
        ("pre-activation", 1),
        ("shared", 0),
    ):
        _, network = traced(name)
        cut = cuts(network)[-1]
        backbone = Backbone(network, cut.node, rows_for(cut), PLAIN).eval()
        assert sum(n.layer is None for n, _, _ in backbone.sites) == affine, name
        x = torch.from_numpy(frames(2, (12, 12, 3)))
        program = torch.export.export(backbone, (x,), strict=False)
        assert not any(n.target in _BATCH_NORMS for n in program.graph.nodes), name


def test_one_convolution_at_two_places_is_folded_twice(traced):
    _, network = traced("shared")
    first, second = network.norms
    assert first.layer != second.layer
    layers = [source_layer(network, n.layer) for n in (first, second)]
    assert layers[0].args[1].target == layers[1].args[1].target, "the same stored weight"
    assert not torch.allclose(fold_layer(network, first)[0], fold_layer(network, second)[0])


def test_folding_by_its_formula(traced):
    model, network = traced("plain")
    conv, bn = model.front
    s = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    weight, bias = fold_layer(network, network.norms[0])
    torch.testing.assert_close(weight, (conv.weight * s[:, None, None, None]).detach())
    expected = bn.bias + (conv.bias - bn.running_mean) * s
    torch.testing.assert_close(bias, expected.detach())


@pytest.mark.parametrize("scale, mean, std", [(1 / 255, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))])
def test_preprocessing_is_part_of_the_graph(traced, scale, mean, std):
    model, network = traced("stride")
    cut = cuts(network)[-1]
    preprocess = Preprocess(scale, mean, std)
    x = torch.randint(0, 256, (3, 12, 12, 3), dtype=torch.uint8)
    by_hand = (x.float() * scale - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(preprocess(x), by_hand.permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    backbone = Backbone(network, cut.node, rows_for(cut), preprocess).eval()
    with torch.no_grad():
        expected = model.features(by_hand.permute(0, 3, 1, 2))
        torch.testing.assert_close(backbone.features(x), expected, rtol=1e-4, atol=1e-5)
