"""Layers as ONNX files of their own, against torch; how unmeasured ones are judged."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import small_nets as small
import torch

from edgesolve.host import latency
from edgesolve.host.latency import blank, seconds, to_onnx
from edgesolve.host.plan import Candidate, dense_candidate
from edgesolve.host.splice import Factored

FORMS = [("dense", ()), ("lowrank", (2,)), ("tucker2", (2, 1)), ("tucker2", (2, 3)), ("cp", (3,))]
LAYERS = [(name, "odd") for name in ("stride", "dilation", "groups", "rectangular")]
LAYERS += [("sequence", "a"), ("sequence", "b"), ("sequence", "token"), ("small", "last")]


def site_of(name, layer):
    return next(s for s in small.walk(small.made(name)[1], 1).found if s.name == layer)


@pytest.mark.parametrize(("form", "ranks"), FORMS)
@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_the_file_gives_what_torch_gives(name, layer, form, ranks, accepts_only):
    site = site_of(name, layer)
    if site.kind == "linear" and form in ("tucker2", "cp"):
        pytest.skip("a linear layer is low rank")
    chain = blank(site, Candidate(form, ranks, 0, 0, 0.0))
    session = ort.InferenceSession(to_onnx(site, chain), providers=["CPUExecutionProvider"])
    c = site.weight.shape[1] * site.groups
    x = np.random.default_rng(0).standard_normal((1, c, *site.at.before)).astype(np.float32)
    (found,) = session.run(None, {"x": x})
    given = {"conv2d": x, "conv1d": x[..., 0], "linear": x[..., 0].transpose(0, 2, 1)}[site.kind]
    with torch.no_grad():
        y = Factored(site, chain, site.bias)(torch.from_numpy(given.copy())).relu().numpy()
    y = {"conv2d": y, "conv1d": y[..., None], "linear": y.swapaxes(1, 2)[..., None]}[site.kind]
    accepts_only(
        lambda a: np.testing.assert_allclose(a, y, rtol=1e-4, atol=1e-5),
        found,
        ["permuted", *(["flipped"] if y.shape[-1] == 1 else [])],  # there is one frame
    )
    assert found.shape[2:] == site.at.after


def test_every_candidate_gets_its_seconds():
    site = site_of("small", "one")
    options = [dense_candidate(site)] + [
        Candidate("tucker2", (a, b), 8 * (a + b) + 9 * a * b, 80 * (8 * (a + b) + 9 * a * b), 0.1)
        for a in range(1, 8)
        for b in range(1, 8)
    ]
    found = seconds(site, options)
    assert len(found) == len(options) and all(np.isfinite(t) and t > 0 for t in found)
    assert seconds(site, options[:1])[0] > 0


def test_what_is_not_measured_takes_no_less_than_a_measured_form_of_fewer_operations(monkeypatch):
    """Seconds made up, falling with the operations: the worst case for a guess."""
    site = site_of("small", "one")
    options = [Candidate("tucker2", (8, r), r, 10 * r, 0.1) for r in range(1, 60)]
    options = [dense_candidate(site), *options]
    by_run = iter(range(1, 99))
    monkeypatch.setattr(latency, "_runner", lambda site, chain: next(by_run))
    monkeypatch.setattr(latency, "blank", lambda site, candidate: candidate)
    monkeypatch.setattr(latency, "_clock", lambda run, n: 1e-3 * run)
    found = seconds(site, options)
    pick = latency._spread(options)
    assert pick[0] == 0 and len(pick) == latency.FORMS + 1
    measured = {i: 1e-3 * (k + 1) for k, i in enumerate(pick)}
    for i, took in enumerate(found):
        if i in measured:
            assert took == measured[i]
            continue
        above = [j for j in measured if j and options[j].macs >= options[i].macs]
        assert took == measured[min(above, key=lambda j: options[j].macs)]
        assert took >= max(
            measured[j] for j in measured if j and options[j].macs <= options[i].macs
        )


def test_blank_weights_are_neither_zero_nor_denormal():
    site = site_of("small", "one")
    for form, ranks in FORMS:
        for factor in blank(site, Candidate(form, ranks, 0, 0, 0.0)).factors:
            assert np.median(np.abs(factor.weight)) > 1e-3
