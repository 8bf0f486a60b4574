"""Layers as ONNX files of their own, against torch; each form's time measured once for all layers alike."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import small_nets as small
import torch
from onnx import numpy_helper
from torch.nn import functional as F

from edgesolve.host import latency
from edgesolve.host.latency import seconds, survey_seconds
from edgesolve.host.layer_file import ZERO, blank, to_int8_onnx, to_onnx
from edgesolve.host.plan import Candidate, Harm, Survey, dense_candidate
from edgesolve.host.rounding import PAIRWISE_LEVELS
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


@pytest.mark.parametrize(("form", "ranks"), FORMS)
@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_the_int8_file_computes_the_same_layer_on_integers(name, layer, form, ranks):
    """Against the float file, given the weights and biases that the integers stand for."""
    site = site_of(name, layer)
    if site.kind == "linear" and form in ("tucker2", "cp"):
        pytest.skip("a linear layer is low rank")
    chain = blank(site, Candidate(form, ranks, 0, 0, 0.0))
    model = onnx.load_from_string(to_int8_onnx(site, chain))
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    x = np.random.default_rng(0).integers(
        90, 166, (1, site.weight.shape[1] * site.groups, *site.at.before)
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.astype(np.uint8)})
    y = torch.from_numpy((x - float(ZERO)) * stored["s"])
    for i, factor in enumerate(chain.factors):
        assert np.abs(stored[f"w{i}"]).max() == PAIRWISE_LEVELS
        scale = stored[f"ws{i}"][:, None, None, None].astype(float)
        stride, padding, dilation = site.along(factor.axes)
        y = F.conv2d(
            y,
            torch.from_numpy(stored[f"w{i}"] * scale),
            torch.from_numpy(stored[f"b{i}"] * scale.ravel() * float(stored["s"])),
            stride,
            padding,
            dilation,
            factor.groups,
        )
        y = ((y / float(stored["s"])).round().clamp(-ZERO, 255 - ZERO)) * float(stored["s"])
    steps = (found.astype(float) - ZERO) - y.numpy() / float(stored["s"])
    assert found.shape[2:] == site.at.after and found.std() > 2
    assert np.abs(steps).max() <= len(chain.factors)  # ties round either way


@pytest.mark.parametrize("int8", [False, True])
def test_every_candidate_gets_its_seconds(int8):
    site = site_of("small", "one")
    options = [dense_candidate(site)] + [
        Candidate("tucker2", (a, b), 8 * (a + b) + 9 * a * b, 80 * (8 * (a + b) + 9 * a * b), 0.1)
        for a in range(1, 8, 2)
        for b in range(1, 8, 2)
    ]
    found = seconds(site, options, int8)
    assert len(found) == len(options) and all(np.isfinite(t) and t > 0 for t in found)


def test_layers_alike_are_measured_once(monkeypatch):
    """Seconds made up, from the form: each layer's candidates get those of their form, in their own order."""
    one, other = site_of("small", "one"), site_of("small", "last")
    dense, a, b = (
        Candidate("dense", (), 9, 9, 0.0),
        *(Candidate("tucker2", (r, r), 5, 5, 0.1) for r in (2, 3)),
    )
    still = Harm((0.0,), (0.0,))
    surveys = [
        Survey(one, (dense, a), still),
        Survey(one, (b, dense), still),
        Survey(other, (dense,), still),
    ]
    calls = []

    def measured(site, options, int8):
        calls.append((site.name, len(options), int8))
        return [float(sum(c.ranks)) + site.weight.size for c in options]

    monkeypatch.setattr(latency, "seconds", measured)
    own, last = one.weight.size, other.weight.size
    assert survey_seconds(surveys, True) == [[own, own + 4.0], [own + 6.0, own], [last]]
    assert calls == [("one", 3, True), ("last", 1, True)]


def test_blank_weights_are_neither_zero_nor_denormal():
    site = site_of("small", "one")
    for form, ranks in FORMS:
        for factor in blank(site, Candidate(form, ranks, 0, 0, 0.0)).factors:
            assert np.median(np.abs(factor.weight)) > 1e-3
