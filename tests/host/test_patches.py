"""Rows of a layer, against torch running it; and what is found behind it."""

from __future__ import annotations

import numpy as np
import pytest
import small_nets as small
import torch
from torch import nn
from torch.nn import functional as F

from edgesolve.host import patches as module
from edgesolve.host.errors import DataError
from edgesolve.host.network import trace
from edgesolve.host.patches import following, n_positions, n_rows, positions, rows
from edgesolve.host.sites import sites
from edgesolve.host.splice import Dense

LAYERS = [(name, "odd") for name in small.ODD] + [
    *(("sequence", name) for name in ("a", "b", "token", "fc")),
    *(("small", name) for name in ("stem", "two", "left", "right", "last", "fc")),
]


@pytest.fixture
def few_rows(monkeypatch):
    """So few rows per image that positions are left out."""
    monkeypatch.setattr(module, "ROWS", 150)
    monkeypatch.setattr(module, "ROWS_PER_INPUT", 1)


def site_of(walk, name):
    return next(s for s in walk.found if s.name == name)


def outputs_of(model, layer, x):
    """What the module `layer` of `model` gives, as (n, positions, T)."""
    found = []
    hook = model.get_submodule(layer).register_forward_hook(lambda m, a, y: found.append(y))
    with torch.no_grad():
        model(small.PLAIN(torch.from_numpy(x)))
    hook.remove()
    y = found[0]
    if isinstance(model.get_submodule(layer), nn.Linear):
        return y.reshape(len(y), -1, y.shape[-1])
    return y.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_rows_times_the_weight_are_the_layers_outputs(name, layer, few_rows, accepts_only):
    model, network = small.made(name)
    walk = small.walk(network, 10)
    site = site_of(walk, layer)
    (batch,) = rows(walk, site, seed=3)
    pick = positions(site, 10, 3, 0)
    total = site.at.after[0] * site.at.after[1]
    D = site.weight[0].size
    assert len(pick) == min(total, -(-max(150, D) // 10))
    assert batch.x.shape == (10 * len(pick), site.groups, D)
    expected = outputs_of(model, layer, walk.x)[:, pick].reshape(-1, len(site.weight)).numpy()
    if site.norm is not None:  # rows are those behind the normalisation, checked in test_sites
        expected = batch.t.numpy()

    def same(weight):
        groups = weight.reshape(site.groups, -1, D)
        y = np.einsum("ngd,gtd->ngt", batch.x.double().numpy(), groups).reshape(expected.shape)
        np.testing.assert_allclose(y + site.bias, expected, atol=1e-5)
        np.testing.assert_allclose(batch.t.numpy(), expected, atol=1e-5)

    accepts_only(same, site.weight.reshape(len(site.weight), D))
    np.testing.assert_array_equal(batch.image, np.repeat(np.arange(10), len(pick)))


def test_the_same_rows_on_every_call(few_rows, monkeypatch):
    monkeypatch.setattr("edgesolve.host.walk.BATCH", 4)
    network = small.made("small")[1]
    walk, again = small.walk(network, 10), small.walk(network, 10, bound=0)
    site = site_of(walk, "two")
    first = list(rows(walk, site, 0))
    assert (
        len(first) == 3 and len({tuple(positions(site, 10, 0, k).tolist()) for k in range(3)}) == 3
    )
    for other in (rows(walk, site, 0), rows(again, site, 0)):
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a.x, b.x) and torch.equal(a.t, b.t) and torch.equal(a.image, b.image)
    others = [b.x for b in rows(walk, site, 1)]
    assert not all(torch.equal(a.x, b) for a, b in zip(first, others, strict=True))


def test_positions_are_all_of_them_or_drawn_evenly(few_rows):
    site = site_of(small.walk(small.made("small")[1], 1), "stem")
    assert n_positions(site, 1) == 80 and n_rows(site, 1) == 80
    assert torch.equal(positions(site, 1, 0, 0), torch.arange(80))
    assert n_positions(site, 10) == 15 and n_rows(site, 10) == 150
    drawn = torch.cat([positions(site, 10, 0, k) for k in range(400)])
    counts = torch.bincount(drawn, minlength=80).numpy()
    assert np.all(np.abs(counts - 75.0) < 5 * np.sqrt(75.0))
    assert all(torch.equal(p, p.unique()) for p in (positions(site, 10, 0, k) for k in range(5)))


def test_targets_make_up_for_what_the_shortcut_lacks(few_rows):
    """t + skip is the original's sum, whatever the compressed network has in its shortcut."""
    network = small.made("small")[1]
    walk = small.walk(network, 10)
    stem, two = site_of(walk, "stem"), site_of(walk, "two")
    walk.layers[stem.node] = Dense(stem, 0.7 * stem.weight)
    (batch,) = rows(walk, two, 0)
    pick = positions(two, 10, 0, 0)
    seen = {}

    def watch(node, value, args):
        seen[node.name] = value

    def shortcut(layers):
        with torch.no_grad():
            network.run(
                small.PLAIN(torch.from_numpy(walk.x)), norm=walk.norm, layers=layers, watch=watch
            )
        return [
            seen[n].flatten(2)[:, :, pick].transpose(1, 2).reshape(-1, 8)
            for n in (following(network, two).skip, two.node)
        ]

    skip, y = shortcut(walk.original)
    lacking, _ = shortcut({**walk.original, **walk.layers})
    assert not torch.allclose(skip, lacking, atol=0.1)
    torch.testing.assert_close(batch.skip, lacking)
    torch.testing.assert_close(batch.t, y + skip - lacking)


class Clamps(nn.Module):
    BEHIND = (
        (F.relu, 0.0, np.inf),
        (F.relu6, 0.0, 6.0),
        (F.hardtanh, -1.0, 1.0),
        (lambda x: F.hardtanh(x, -2.0, 3.0), -2.0, 3.0),
        (lambda x: x.clamp(-1, 2), -1.0, 2.0),
        (lambda x: x.clamp(max=3.0), -np.inf, 3.0),
        (lambda x: x.clamp(min=0.5), 0.5, np.inf),
        (lambda x: torch.clamp_min(x, 0.1), 0.1, np.inf),
        (lambda x: torch.clamp_max(x, 4.0), -np.inf, 4.0),
        (lambda x: F.relu(x, inplace=True), 0.0, np.inf),
        (F.gelu, -np.inf, np.inf),
        (lambda x: F.relu(x) + x, -np.inf, np.inf),  # it has another reader
    )

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1, bias=False) for _ in self.BEHIND)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in self.BEHIND)

    def forward(self, x):
        for i, (layer, (clamp, *_)) in enumerate(zip(self.layers, self.BEHIND, strict=True)):
            y = layer(x)
            x = clamp(self.norms[i](y) if i % 2 else y)
        return x.mean((2, 3))


def test_the_range_of_the_clamp_behind_a_layer():
    network = trace(small.seeded(Clamps), small.IMAGE)
    found, _ = sites(network)
    ranges = [(f.low, f.high) for f in (following(network, s) for s in found)]
    assert ranges == [(low, high) for _, low, high in Clamps.BEHIND]
    assert all(following(network, s).skip is None for s in found)


def test_the_clamp_behind_a_sum():
    network = small.made("small")[1]
    found = {s.name: following(network, s) for s in sites(network)[0]}
    assert (found["two"].skip, found["two"].low, found["two"].high) == ("relu", 0.0, np.inf)
    assert (found["one"].skip, found["one"].low) == (None, 0.0)
    assert (found["right"].skip, found["right"].low) == (None, -np.inf)
    assert (found["last"].low, found["last"].high) == (0.0, 6.0)


def test_a_sum_with_what_is_not_known_yet_says_nothing():
    """The clamp acts on the sum: without the other part it can't be told what passes it."""
    network = small.made("downsampled")[1]
    found = {s.name: following(network, s) for s in sites(network)[0]}
    assert (found["conv2"].skip, found["conv2"].low) == (None, -np.inf)  # the shortcut comes later
    assert (found["gate"].skip, found["gate"].low) == (None, -np.inf)  # it is broadcast
    assert found["short"].skip is not None and found["short"].low == 0.0
    walk = small.walk(network, 6)
    assert all(b.x.isfinite().all() for s in walk.found for b in rows(walk, s, 0))


def test_a_frame_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setattr("edgesolve.host.walk.BATCH", 4)
    walk = small.walk(small.made("small")[1], 10)
    walk.x[6, 2, 3, 0] = np.nan
    message = r"stem: NaN or inf in its activations on calibration batch 1 \(items 4\.\.7\)"
    with pytest.raises(DataError, match=message):
        list(rows(walk, walk.found[0], 0))


def test_an_overflow_inside_is_named_by_its_layer():
    model = small.seeded(small.Small)
    for layer in (model.stem, model.one):
        layer.weight.data.mul_(1e20)
    walk = small.walk(trace(model, small.IMAGE), 4)
    list(rows(walk, site_of(walk, "stem"), 0))
    with pytest.raises(DataError, match="one: NaN or inf"):
        list(rows(walk, site_of(walk, "one"), 0))
