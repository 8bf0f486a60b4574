"""Candidates against the chains that they stand for, and the choice under a budget."""

from __future__ import annotations

import numpy as np
import pytest
import small_nets as small

from edgesolve.host import survey as surveying
from edgesolve.host.chain import grouped, pivoted
from edgesolve.host.layer_file import blank
from edgesolve.host.metric import Metric
from edgesolve.host.plan import (
    STEPS,
    Candidate,
    Harm,
    Survey,
    candidates,
    choose,
    dense_candidate,
    grid,
)
from edgesolve.host.survey import factorise, layer_moments

LAYERS = [("small", name) for name in ("stem", "one", "left", "right", "last", "fc")]
LAYERS += [("sequence", name) for name in ("a", "b", "token")]
LAYERS += [(name, "odd") for name in ("stride", "groups", "pointwise", "rectangular")]


@pytest.fixture(scope="module", params=LAYERS, ids=".".join)
def layer(request):
    """(site, metrics of its own inputs and outputs)."""
    name, layer = request.param
    walk = small.walk(small.made(name)[1], 40)
    site = next(s for s in walk.found if s.name == layer)
    return site, [Metric.of(m) for m in layer_moments(walk, site, 0)]


def built(site, metrics, candidate, pivots=True):
    chains = [factorise(m, site.shape, candidate, sweeps=0) for m in metrics]
    return pivoted(grouped(chains)) if pivots else grouped(chains)


@pytest.mark.parametrize("pivots", [True, False])
def test_costs_are_those_of_the_chain_that_is_built(layer, pivots):
    site, metrics = layer
    first, *rest = candidates(site, metrics, pivots=pivots)
    assert first == dense_candidate(site) == Candidate("dense", (), site.weight.size, site.macs, 0)
    for c in rest:
        chain = built(site, metrics, c, pivots)
        assert (c.params, c.macs) == (chain.n_params, chain.macs(site.at)), c
        shapes = [(f.weight.shape, f.axes, f.groups) for f in chain.factors]
        assert [(f.weight.shape, f.axes, f.groups) for f in blank(site, c).factors] == shapes


def test_forms_of_one_channel_count(layer):
    """Ranks 1 and full on either side, where factors fall away."""
    site, metrics = layer
    T, c, kh, kw = site.shape
    if kh * kw == 1:
        return
    from edgesolve.host.plan import _tucker2

    for ranks in ((1, 1), (T, 1), (1, c), (T - 1, c), (T, c - 1)):
        candidate = _tucker2(site, *ranks, 0.0, True)
        chain = built(site, metrics, candidate)
        assert (candidate.params, candidate.macs) == (chain.n_params, chain.macs(site.at))


@pytest.mark.parametrize("align", [2, 4])
def test_ranks_are_whole_blocks_of_channels(layer, align):
    site, metrics = layer
    T, c, _, _ = site.shape
    for candidate in candidates(site, metrics, align=align)[1:]:
        full = {"tucker2": (T, c), "lowrank": (min(T, c),), "cp": (0,)}[candidate.format]
        for rank, most in zip(candidate.ranks, full, strict=True):
            assert rank % align == 0 or rank == most


@pytest.mark.parametrize(("full", "align"), [(16, 8), (64, 8), (12, 8), (5, 8), (256, 8), (40, 1)])
def test_a_grid_of_ranks_ends_with_the_full_one(full, align):
    found = grid(full, align)
    assert found == sorted(set(found)) and found[-1] == full and len(found) <= 2 * STEPS
    assert all(r % align == 0 for r in found[:-1]) and (full <= align or len(found) > 1)


@pytest.mark.parametrize("formats", [("tucker2",), ("cp",)])
def test_only_the_formats_asked_for_are_tried(layer, formats):
    site, metrics = layer
    found = {c.format for c in candidates(site, metrics, formats)[1:]}
    assert found <= {"lowrank" if site.shape[2:] == (1, 1) else formats[0]}
    assert found or site.weight.size < 60 or "cp" in formats


def test_distortions_are_those_of_the_factorisation(layer):
    site, metrics = layer
    scale = sum(m.v for m in metrics)
    tested = [c for c in candidates(site, metrics) if c.format not in ("dense", "cp")]
    assert tested or site.weight.size < 60
    for c in tested:
        parts = [factorise(m, site.shape, c, sweeps=0).full() for m in metrics]
        lost = sum(m.distortion(p) for m, p in zip(metrics, parts, strict=True)) / scale
        assert c.distortion == pytest.approx(lost, rel=1e-7, abs=1e-8)
    assert all(a.distortion != pytest.approx(0.0, abs=1e-6) for a in tested[-1:])


def test_distortions_of_cp_are_near_those_of_the_fit(layer):
    """Between the ranks where it is fitted they are interpolated."""
    site, metrics = layer
    scale = sum(m.v for m in metrics)
    for c in candidates(site, metrics, ("cp",)):
        if c.format == "cp":
            parts = [factorise(m, site.shape, c, sweeps=4).full() for m in metrics]
            lost = sum(m.distortion(p) for m, p in zip(metrics, parts, strict=True)) / scale
            assert 0.3 * lost - 0.02 < c.distortion < 1.5 * lost + 0.02, c


def test_every_candidate_pays_in_weights_or_in_multiply_adds(layer):
    site, metrics = layer
    first, *rest = candidates(site, metrics)
    assert all(c.params < first.params for c in rest)
    for c in rest:
        others = [o for o in (first, *rest) if o is not c and o.distortion <= c.distortion]
        assert not any(o.params < c.params and o.macs < c.macs for o in others)


def test_a_layer_that_never_changes_stays_dense(layer):
    site, _ = layer
    D, T = site.weight[0].size, site.shape[0]
    still = Metric(np.eye(D), np.zeros((T, D)), 0.0, np.zeros(D), np.zeros(T))
    assert candidates(site, [still] * site.groups) == [dense_candidate(site)]


def test_the_grid_has_both_ends():
    assert grid(1) == [1] and grid(5) == [1, 2, 3, 4, 5]
    assert grid(64) == [1, *range(4, 65, 4)]
    for full in (16, 17, 24, 100, 512):
        ranks = grid(full)
        assert ranks[0] == 1 and ranks[-1] == full and 16 <= len(ranks) <= 32


def test_harm_never_falls_and_has_no_guess_beyond_its_probes():
    harm = Harm((0.0, 0.1, 0.2, 0.4), (0.0, 0.5, 0.3, 2.0))
    np.testing.assert_allclose(
        harm(np.array([0.0, 0.05, 0.1, 0.2, 0.3, 0.4])), [0, 0.25, 0.5, 0.5, 1.25, 2.0]
    )
    assert np.all(np.diff(harm(np.linspace(0, 0.4, 99))) >= 0)
    assert np.isinf(harm(np.array([0.41, 1.0]))).all()
    np.testing.assert_array_equal(Harm((0.0,), (0.0,))(np.array([0.0, 0.1])), [0.0, np.inf])


@pytest.fixture(scope="module")
def surveys():
    """Three layers of made-up candidates."""
    sites = small.walk(small.made("small")[1], 1).found[:3]
    found = []
    for i, site in enumerate(sites):
        forms = [
            Candidate("lowrank", (r,), 10 * r, 100 * (5 - r), (5 - r) / 10) for r in (1, 2, 3, 4)
        ]
        harm = Harm((0.0, 0.2, 0.4), (0.0, 0.1 * (i + 1), 0.5 * (i + 1)))
        found.append(Survey(site, (Candidate("dense", (), 50, 500, 0.0), *forms), harm))
    return found


def brute(surveys, kind, budget):
    """Least total loss by trying every choice."""
    from itertools import product

    from edgesolve.host.plan import ENERGY

    best = np.inf
    for choice in product(*(s.candidates for s in surveys)):
        if sum(getattr(c, kind) for c in choice) <= budget:
            lost = [
                float(s.harm(np.array(c.distortion))) + ENERGY * c.distortion
                for s, c in zip(surveys, choice, strict=True)
            ]
            best = min(best, sum(lost))
    return best


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("share", [0.35, 0.5, 0.7, 1.0])
def test_the_choice_is_the_best_of_all(surveys, kind, share):
    budget = share * sum(getattr(s.candidates[0], kind) for s in surveys)
    plan = choose(surveys, kind, budget)
    assert plan.allocation.cost <= budget and plan.allocation.exact
    assert plan.allocation.loss == pytest.approx(brute(surveys, kind, budget), abs=1e-12)
    assert plan.allocation.cost == sum(getattr(c, kind) for c in plan.chosen.values())
    assert set(plan.chosen) == {s.site.node for s in surveys} and plan.budget == budget


def test_a_full_budget_keeps_every_layer(surveys):
    plan = choose(surveys, "params", 150)
    assert all(c.format == "dense" for c in plan.chosen.values()) and plan.allocation.loss == 0


def test_what_was_not_measured_is_not_chosen(surveys):
    """The candidate of distortion 0.5 or more lies beyond the last probe."""
    far = [
        Survey(s.site, (*s.candidates, Candidate("cp", (1,), 1, 1, 0.5)), s.harm) for s in surveys
    ]
    assert choose(far, "params", 30).allocation.cost == 30


def test_another_cost_takes_the_place_of_weights(surveys):
    plan = choose(surveys, "seconds", 3.0, lambda site, c: 1.0 if c.format == "dense" else 2.0)
    assert all(c.format == "dense" for c in plan.chosen.values()) and plan.kind == "seconds"


def test_a_budget_too_small_names_the_closest(surveys):
    with pytest.raises(
        ValueError, match="the budget is 20, but the cheapest candidates of all 3 layers cost 30"
    ) as e:
        choose(surveys, "params", 20)
    assert str(e.value).count(".") == 1


def test_the_probes_are_spread_and_dense_is_none_of_them(layer):
    site, metrics = layer
    options = candidates(site, metrics)
    if len(options) == 1:
        return
    found = surveying._spread(site, options)
    assert 1 <= len(found) <= len(surveying.PROBES) + 1 and options[0] not in found
    assert max(c.distortion for c in found) == max(c.distortion for c in options)
