"""The first pass: moments against torch's own patches, measured harm against plain runs, and what is left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import small_nets as small
import torch
from torch.nn import functional as F

from edgesolve.host import survey as module
from edgesolve.host.metric import Metric
from edgesolve.host.network import trace
from edgesolve.host.sensitivity import divergence
from edgesolve.host.sites import sites
from edgesolve.host.splice import Dense
from edgesolve.host.survey import approximate, layer_moments, obstacle, survey
from edgesolve.kernels.moments import Moments


@pytest.fixture(scope="module")
def walked():
    """(walk that is used up, surveys) of the small network."""
    network = small.made("small")[1]
    return small.walk(network, 40), survey(small.walk(network, 40), sites(network)[1], n_probe=40)


def site_of(walk, name):
    return next(s for s in walk.found if s.name == name)


@pytest.mark.parametrize(
    ("name", "layer"), [("small", "left"), ("dilation", "odd"), ("groups", "odd")]
)
def test_moments_are_those_of_torchs_patches(name, layer, accepts_only):
    """Few frames, so every position counts: torch's unfold gives the same rows."""
    model, network = small.made(name)
    walk = small.walk(network, 12)
    site, seen = site_of(walk, layer), []
    hook = model.get_submodule(layer).register_forward_hook(lambda m, a, y: seen.append((a[0], y)))
    with torch.no_grad():
        model(small.PLAIN(torch.from_numpy(walk.x)))
    hook.remove()
    (x, y), kernel = seen[0], site.weight.shape[2:]
    rows = F.unfold(x, kernel, site.dilation, site.padding, site.stride).transpose(1, 2)
    rows = rows.reshape(-1, site.groups, site.weight[0].size).numpy()
    t = y.flatten(2).transpose(1, 2).reshape(-1, site.groups, site.shape[0]).numpy()
    found = layer_moments(walk, site, 0)
    assert len(found) == site.groups and found[0].n == len(rows)
    for g, m in enumerate(found):
        expected = Moments.of(rows[:, g], t[:, g])
        accepts_only(
            lambda a, e=expected: np.testing.assert_allclose(a, e.stx, rtol=1e-4, atol=1e-3), m.stx
        )
        np.testing.assert_allclose(m.sxx, expected.sxx, rtol=1e-4, atol=1e-3)
        assert m.stt == pytest.approx(expected.stt, rel=1e-5)


def test_every_layer_is_surveyed_in_order(walked):
    walk, surveys = walked
    assert [s.site.name for s in surveys] == [s.name for s in walk.found]
    for s in surveys:
        assert s.candidates[0].format == "dense" and len(s.candidates) > 1 and not s.reason
        worst = max(c.distortion for c in s.candidates)
        assert s.harm.distortion[0] == s.harm.divergence[0] == 0.0
        assert s.harm.distortion[-1] >= worst and np.isfinite(s.harm(np.array(worst)))
        assert list(s.harm.distortion) == sorted(s.harm.distortion)


def test_harm_is_what_a_run_with_that_layer_loses(walked):
    """At the worst candidate, put into the network by hand."""
    walk, surveys = walked
    x = small.PLAIN(torch.from_numpy(walk.x))
    with torch.no_grad():
        before = walk.network.run(x, norm=walk.norm, layers=walk.original)
        for s in surveys:
            metrics = [Metric.of(m) for m in layer_moments(small.walk(walk.network, 40), s.site, 0)]
            worst = max(s.candidates, key=lambda c: c.distortion)
            weight, bias = approximate(s.site, metrics, worst)
            lost = (
                sum(m.distortion(w) for m, w in zip(metrics, [weight], strict=True)) / metrics[0].v
            )
            layers = {**walk.original, s.site.node: Dense(s.site, weight, bias)}
            found = divergence(before, walk.network.run(x, norm=walk.norm, layers=layers))
            pairs = list(zip(s.harm.distortion, s.harm.divergence, strict=True))
            assert any(
                d == pytest.approx(max(lost, worst.distortion), rel=1e-6)
                and kl == pytest.approx(found, rel=1e-3)
                for d, kl in pairs
            ), (s.site.name, lost, found, pairs)
            assert found > 1e-6


def test_formats_and_identity_blocks_are_as_asked():
    network = small.made("small")[1]
    found = survey(small.walk(network, 20), {}, formats=("tucker2",), n_probe=20)
    assert {c.format for s in found for c in s.candidates} == {"dense", "lowrank", "tucker2"}
    whole = survey(small.walk(network, 20), {}, formats=("tucker2",), pivots=False, n_probe=20)
    with_block, without = (
        {c.ranks: c.params for s in run for c in s.candidates if s.site.name == "left"}
        for run in (found, whole)
    )
    assert all(with_block[r] < without[r] for r in set(with_block) & set(without) if r)


def test_a_refused_layer_keeps_its_reason():
    network = small.made("small")[1]
    (_, one, *_) = survey(small.walk(network, 16), {"one": "because; left dense"}, n_probe=16)
    assert one.reason == "because; left dense" and len(one.candidates) == 1
    np.testing.assert_array_equal(one.harm(np.array([0.0])), [0.0])


def test_fewer_rows_than_inputs_are_refused():
    network = small.made("perceptron")[1]
    one, two = survey(small.walk(network, 8), {}, n_probe=8)
    assert (
        one.reason == "8 rows for 240 inputs, 2400 advised; give 300 times the images; left dense"
    )
    assert two.reason.startswith("8 rows for 12 inputs") and len(two.candidates) == 1
    one, two = survey(small.walk(network, 250), {}, n_probe=64)
    assert not one.reason and not two.reason and len(one.candidates) > 1
    assert not obstacle(one.site, 240) and obstacle(one.site, 239)


def test_moments_beyond_the_memory_bound_are_refused(monkeypatch):
    walk = small.walk(small.made("perceptron")[1], 250)
    flattened = replace(walk.found[0], weight=np.zeros((4096, 25088, 1, 1)))  # VGG-16's
    expected = "its moments need 14 GiB, the bound is 4 GiB; left dense"
    assert obstacle(flattened, 100_000) == expected
    monkeypatch.setattr(module, "MOMENT_BYTES", 1 << 20)
    monkeypatch.setattr(module, "layer_moments", lambda *a: pytest.fail("they were collected"))
    with pytest.raises(pytest.fail.Exception):
        survey(walk, {"one": ""}, n_probe=64)  # the second layer is small enough
    assert obstacle(walk.found[0], 250) and not obstacle(walk.found[1], 250)


def test_a_layer_of_low_rank_is_found_to_be_free():
    model = small.seeded(small.Small)
    model.one.weight.data[:] = model.one.weight.data[:, :1, 1:2, 1:2]  # rank one
    found = survey(small.walk(trace(model, small.IMAGE), 20), {}, n_probe=20)[1]
    free = [c for c in found.candidates if c.format != "dense" and c.distortion < 1e-9]
    assert free and np.all(found.harm(np.array([c.distortion for c in free])) < 1e-6)
    model.two.weight.data.zero_()
    found = survey(small.walk(trace(model, small.IMAGE), 20), {}, n_probe=20)[2]
    assert found.reason == "its output never changes; left dense" and len(found.candidates) == 1
