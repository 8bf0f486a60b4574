"""Whole networks compressed layer by layer, against runs of the network that comes out."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import small_nets as small
import torch
from torch.nn import functional as F

from edgesolve.host import compress as module
from edgesolve.host.compress import as_rows, compress, refittable
from edgesolve.host.errors import DataError
from edgesolve.host.fit import FitOptions
from edgesolve.host.metric import Metric
from edgesolve.host.network import trace
from edgesolve.host.plan import Plan, choose
from edgesolve.host.sensitivity import fisher
from edgesolve.host.sites import sites
from edgesolve.host.splice import Compressed, Dense
from edgesolve.host.survey import approximate, layer_moments, survey

FRAMES = 64
QUICK = FitOptions(sweeps=1)


@pytest.fixture(scope="module")
def surveyed():
    """surveyed(seed) -> (network, surveys) of the small network with that seed's weights, made once."""
    made = {}

    def get(seed=0):
        if seed not in made:
            network = trace(small.seeded(small.Small, seed), small.IMAGE)
            walk = small.walk(network, FRAMES)
            made[seed] = network, survey(walk, sites(network)[1], n_probe=FRAMES)
        return made[seed]

    return get


def total(surveys):
    return sum(s.site.weight.size for s in surveys)


def planned(surveys, share):
    return choose(surveys, "params", share * total(surveys))


def run(network, surveys, share, *, gammas=None, options=QUICK, **more):
    plan = planned(surveys, share)
    reasons = {s.site.name: s.reason for s in surveys}
    return compress(small.walk(network, FRAMES), plan, reasons, gammas, options, **more)


@pytest.fixture(scope="module")
def halved(surveyed):
    network, surveys = surveyed()
    gammas = fisher(small.walk(network, FRAMES), FRAMES)
    return run(network, surveys, 0.5, gammas=gammas, options=FitOptions())


def logits_of(network, x):
    with torch.no_grad():
        return network(small.PLAIN(torch.from_numpy(x)))


def torchs_divergence(a, b):
    return float(F.kl_div(b.double().log_softmax(1), a.double().softmax(1), reduction="batchmean"))


def test_a_full_budget_gives_back_the_network(surveyed):
    network, surveys = surveyed()
    found = run(network, surveys, 1.0)
    x = small.images(50, seed=9)
    a, b = logits_of(small.made("small")[0], x), logits_of(found.module, x)
    assert torchs_divergence(a, b) < 1e-8 and found.divergence < 1e-8
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not found.fitted and {s.decision for s in found.steps} == {"kept"}
    assert {s.reason for s in found.steps} == {"nothing changed before it"}


def test_refitting_what_nothing_changed_gives_back_the_network(surveyed, monkeypatch):
    """Every layer through patches, moments and least squares, and yet the same answers."""
    network, surveys = surveyed()
    plan = choose(surveys, "params", total(surveys))
    walk = small.walk(network, FRAMES)
    layers = {}
    for site in walk.found:
        options = FitOptions(clamp_steps=0)
        found = module.fit(walk, site, plan.chosen[site.node], None, options)
        layers[site.node] = walk.layers[site.node] = found.module(site)
        # Nothing is lost but what single precision makes of t.
        assert found.measured < 1e-3
    made = Compressed(network, walk.found, layers)
    x = small.images(50, seed=9)
    assert torchs_divergence(logits_of(small.made("small")[0], x), logits_of(made, x)) < 1e-6


def test_predicted_is_measured_in_every_layer(halved):
    assert sum(s.decision == "replaced" for s in halved.steps) >= 3
    for step in halved.steps:
        if step.error is not None:
            assert step.error["predicted"] == pytest.approx(step.error["measured"], rel=1e-6)
            assert step.error["held_out"] > 0


def test_the_divergence_is_that_of_the_network_that_comes_out(halved, accepts_only):
    x = small.images(FRAMES)
    a = logits_of(small.made("small")[0], x)
    b = logits_of(halved.module, x)
    assert halved.divergence == pytest.approx(torchs_divergence(a, b), rel=1e-3)
    assert 1e-5 < halved.divergence < torchs_divergence(a, 0.0 * a)

    def close(answer):
        """The whole is near the original: a tenth of what is lost with no answer at all."""
        limit = 0.1 * torchs_divergence(a, 0.0 * a)
        assert torchs_divergence(a, torch.from_numpy(np.ascontiguousarray(answer))) < limit

    accepts_only(close, b.numpy(), blind=["scaled"])


def test_the_report_counts_what_is_stored(surveyed, halved):
    _, surveys = surveyed()
    plan, again = planned(surveys, 0.5), trace(halved.module, small.IMAGE)
    by_name = {}
    for site in sites(again)[0]:
        by_name.setdefault(site.name, []).append(site)
    pivots = {n: sum(len(f.pivots) ** 2 for f in v.chain.factors) for n, v in halved.fitted.items()}
    for step, s in zip(halved.steps, surveys, strict=True):
        stored, block = by_name[step.layer], pivots.get(s.site.node, 0)
        weights = sum(p.weight.size for p in stored) - block
        assert step.params == {
            "before": s.site.weight.size + len(s.site.bias),
            "after": weights + len(s.site.bias),
        }
        assert step.bytes == {k: 4 * v for k, v in step.params.items()}
        candidate = plan.chosen[s.site.node]
        assert step.macs == {"before": s.site.macs, "after": candidate.macs}
        assert weights == candidate.params and step.ranks == candidate.ranks
    assert plan.allocation.cost <= 0.5 * total(surveys)
    assert as_rows(halved.steps)[0] == asdict(halved.steps[0])


def independent(network, surveys, plan):
    """The published way: each layer on its own, on the original network's inputs and its own outputs."""
    walk, layers = small.walk(network, FRAMES), {}
    for site in walk.found:
        candidate = plan.chosen[site.node]
        if candidate.format != "dense":
            metrics = [Metric.of(m) for m in layer_moments(walk, site, 0)]
            layers[site.node] = Dense(site, *approximate(site, metrics, candidate))
    return Compressed(network, walk.found, layers)


@pytest.mark.parametrize("seed", [0, 1])
def test_one_behind_the_other_beats_each_on_its_own(surveyed, seed):
    network, surveys = surveyed(seed)
    found = run(network, surveys, 0.4)
    alone = independent(network, surveys, planned(surveys, 0.4))
    held_out = small.images(400, seed=7)
    original = network.run(small.PLAIN(torch.from_numpy(held_out)))
    lost, published = (
        torchs_divergence(original, logits_of(m, held_out)) for m in (found.module, alone)
    )
    assert lost < 0.9 * published


def test_dense_layers_behind_a_change_are_refitted_for_the_better(surveyed, monkeypatch):
    network, surveys = surveyed()
    # Only the stem and the layer behind it become smaller.
    chosen = {}
    for i, s in enumerate(surveys):
        least = [c for c in s.candidates if c.params < 0.5 * s.site.weight.size]
        chosen[s.site.node] = max(least, key=lambda c: c.params) if i < 2 else s.candidates[0]
    plan = Plan(chosen, "params", 0.0, None)
    refitted = compress(small.walk(network, FRAMES), plan, {})
    assert [s.reason for s in refitted.steps] == ["smaller"] * 2 + ["refitted"] * 5
    assert all(s.params["before"] == s.params["after"] for s in refitted.steps[2:])
    smaller = {s.node for s in small.walk(network, 1).found[:2]}
    monkeypatch.setattr(module, "refittable", lambda site, n: site.node in smaller)
    left = compress(small.walk(network, FRAMES), plan, {})
    assert refitted.divergence < 0.8 * left.divergence


def test_equal_input_gives_equal_bytes(surveyed, halved):
    network, surveys = surveyed()
    gammas = fisher(small.walk(network, FRAMES), FRAMES)
    again = run(network, surveys, 0.5, gammas=gammas, options=FitOptions())
    assert again.divergence == halved.divergence
    for (name, a), (other, b) in zip(
        halved.module.named_buffers(), again.module.named_buffers(), strict=True
    ):
        assert name == other and a.numpy().tobytes() == b.numpy().tobytes()


def test_a_smaller_budget_loses_more(surveyed, halved):
    network, surveys = surveyed()
    least = run(network, surveys, 0.2)
    assert halved.divergence < least.divergence


def test_layers_that_the_plan_does_not_name_are_left_alone(surveyed):
    network, surveys = surveyed()
    plan = choose(surveys[:3], "params", 0.5 * total(surveys[:3]))
    found = compress(small.walk(network, FRAMES), plan, {}, options=FitOptions(sweeps=0))
    assert [s.layer for s in found.steps] == ["stem", "one", "two"]
    for site in sites(network)[0][3:]:
        kept = found.module.get_submodule(site.name)
        torch.testing.assert_close(kept.weight, site.tensors()[0])


@pytest.mark.parametrize("name", ["sequence", "groups", "downsampled"])
def test_other_networks_come_out_whole(name):
    model, network = small.made(name)
    walk, refused = small.walk(network, FRAMES), sites(network)[1]
    surveys = survey(walk, refused, n_probe=FRAMES)
    plan = choose(surveys, "params", 0.7 * total(surveys))
    found = compress(small.walk(network, FRAMES), plan, {}, options=FitOptions(sweeps=1))
    again = trace(found.module, small.IMAGE)
    x = small.PLAIN(torch.from_numpy(small.images(30, seed=5)))
    with torch.no_grad():
        torch.testing.assert_close(again.run(x), found.module(x), rtol=1e-4, atol=1e-5)
        original = model(x)
    level = torchs_divergence(original, original.mean(0, keepdim=True).expand_as(original))
    assert found.divergence < level
    for step in found.steps:
        if step.error is not None and step.error["predicted"] > 1e-5:
            assert step.error["predicted"] == pytest.approx(step.error["measured"], rel=1e-6)


def test_dead_channels_give_finite_answers():
    model = small.seeded(small.Small)
    model.bn.weight.data[:3], model.bn.bias.data[:3] = 0.0, -1.0
    model.one.weight.data[0] = 0.0
    network = trace(model, small.IMAGE)
    surveys = survey(small.walk(network, 20), {}, n_probe=20)
    gammas = fisher(small.walk(network, 20), 20)
    plan = choose(surveys, "params", 0.5 * total(surveys))
    found = compress(small.walk(network, 20), plan, {}, gammas, FitOptions(sweeps=1))
    assert all(b.isfinite().all() for b in found.module.buffers()) and np.isfinite(found.divergence)
    for step in found.steps:
        if step.error is not None:
            expected = pytest.approx(step.error["measured"], rel=1e-6, abs=1e-7)
            assert step.error["predicted"] == expected


def test_layers_with_fewer_rows_than_inputs_are_not_refitted_either():
    """On 8 frames the perceptron's layers have 8 rows each: they stay as they are, whatever came before."""
    network = small.made("perceptron")[1]
    walk = small.walk(network, 8)
    surveys = survey(small.walk(network, 8), {}, n_probe=8)
    reasons = {s.site.name: s.reason for s in surveys}
    found = compress(walk, choose(surveys, "params", total(surveys)), reasons)
    assert not found.fitted and found.divergence < 1e-8
    assert all("8 rows for" in s.reason for s in found.steps)
    assert not any(refittable(s, 8) for s in walk.found) and refittable(walk.found[0], 240)
    with pytest.raises(ValueError, match="the budget is 100, but the cheapest"):
        choose(surveys, "params", 100)


def test_depthwise_layers_are_left_alone():
    model = small.seeded(lambda: small.Odd(c=8, out=8, groups=8))
    walk = small.walk(trace(model, small.IMAGE), 1)
    assert [refittable(s, 1000) for s in walk.found] == [True, False, True]


def test_nothing_but_zeros_is_refused_or_finite(surveyed):
    network, surveys = surveyed()
    plan = choose(surveys, "params", 0.5 * total(surveys))
    walk = small.walk(network, FRAMES)
    walk.x[:] = 0.0
    found = compress(walk, plan, {}, options=FitOptions(sweeps=1))
    assert all(b.isfinite().all() for b in found.module.buffers())
    walk = small.walk(network, FRAMES)
    walk.x[5] = np.nan
    with pytest.raises(DataError, match="stem: NaN or inf"):
        compress(walk, plan, {})


class Kept:
    """What was fitted before an interruption."""

    def __init__(self):
        self.layers, self.loaded = {}, []

    def load(self, i):
        self.loaded.append(i) if i in self.layers else None
        return self.layers.get(i)

    def save(self, i, fitted):
        self.layers[i] = fitted


def test_an_interrupted_run_goes_on_where_it_was(surveyed):
    network, surveys = surveyed()
    store = Kept()
    first = run(network, surveys, 0.5, store=store)
    assert len(store.layers) == len(first.fitted) and not store.loaded
    for i in list(store.layers)[3:]:
        del store.layers[i]
    again = run(network, surveys, 0.5, store=store)
    assert len(store.loaded) == 3 and again.divergence == first.divergence
