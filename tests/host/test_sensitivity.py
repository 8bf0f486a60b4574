"""What an error costs the whole network: against torch's own divergence and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import small_nets as small
import torch
from torch import nn
from torch.nn import functional as F

from edgesolve.host.network import trace
from edgesolve.host.sensitivity import damped, divergence, fisher, probe, roots
from edgesolve.host.splice import Dense


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr("edgesolve.host.walk.BATCH", 16)


def logits_of(walk, layers):
    with torch.no_grad():
        x = small.PLAIN(torch.from_numpy(walk.x))
        return walk.network.run(x, norm=walk.norm, layers={**walk.original, **layers})


def test_divergence_is_torchs():
    g = torch.Generator().manual_seed(0)
    a, b = (5.0 * torch.randn(20, 6, generator=g) for _ in range(2))
    expected = F.kl_div(b.log_softmax(1), a.softmax(1), reduction="batchmean")
    assert divergence(a, b) == pytest.approx(expected.item(), rel=1e-5)
    assert divergence(a, a) == 0.0 and divergence(a, a + 3.0) == pytest.approx(0.0, abs=1e-6)
    assert divergence(a, b) != pytest.approx(divergence(b, a), rel=1e-2)


def test_a_probe_is_a_run_with_one_layer_changed(accepts_only):
    walk = small.walk(small.made("small")[1], 40)
    site = walk.found[2]
    expected = logits_of(walk, {})
    logits = {k: expected[16 * k : 16 * k + 16] for k in range(2)}  # the last batch is left out
    forms = [(s * site.weight, site.bias + d) for s, d in ((1.0, 0.0), (0.5, 0.0), (0.9, 0.3))]
    found = probe(walk, logits, site, forms)
    wanted = [
        divergence(expected[:32], logits_of(walk, {site.node: Dense(site, w, b)})[:32])
        for w, b in forms
    ]
    assert wanted[0] < 1e-10 < min(wanted[1:])
    accepts_only(
        lambda a: np.testing.assert_allclose(a, wanted, rtol=1e-4, atol=1e-9), np.array(found)
    )


def test_a_probe_leaves_the_walk_as_it_was():
    network = small.made("small")[1]
    walk, other = small.walk(network, 20), small.walk(network, 20)
    logits = {k: teacher for k, (teacher, _) in enumerate(other.finish())}
    for site in walk.found:
        probe(walk, logits, site, [(0.0 * site.weight, site.bias)])
        assert not walk.layers
    for (a, b), (c, _) in zip(walk.finish(), other.finish(), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


class Classifier(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.fc = nn.Linear(3, classes)

    def forward(self, x):
        return self.fc(x[:, :, 0, 0])


def test_gamma_of_a_classifier_is_the_covariance_of_its_answers():
    """Before a softmax the gradient of log p(y) is e_y - p, so its second moment is diag(p) - pp'."""
    walk = small.walk(trace(small.seeded(Classifier), small.IMAGE), 8000)
    p = logits_of(walk, {}).double().softmax(1).numpy()
    expected = np.diag(p.mean(0)) - p.T @ p / len(p)

    def enumerated():
        """Every answer, weighted by its probability."""
        e = np.eye(4)[None] - p[:, None, :]
        return np.einsum("ny,nyi,nyj->ij", p, e, e) / len(p)

    np.testing.assert_allclose(enumerated(), expected, atol=1e-12)
    found = fisher(walk, 8000)["linear"]
    np.testing.assert_allclose(found, expected, atol=5.0 / np.sqrt(8000))
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert np.abs(expected).max() > 0.1
    assert not np.allclose(0.9 * found, expected, atol=0.01)


def test_the_divergence_is_half_the_quadratic_form():
    """KL(original || with a small error e in one layer's output) = 1/2 e' Gamma e at a single position."""
    walk = small.walk(small.made("small")[1], 1600)
    site = walk.found[-1]
    assert site.at.after == (1, 1)
    gamma = fisher(walk, 1600)[site.node]
    error = np.random.default_rng(0).standard_normal(len(gamma))
    error *= np.sqrt(2e-4 / (error @ gamma @ error))
    changed = Dense(site, site.weight, site.bias + error)
    found = divergence(logits_of(walk, {}), logits_of(walk, {site.node: changed}))
    assert found == pytest.approx(1e-4, rel=0.1)


def test_one_position_in_error_costs_its_share():
    """Errors at single positions, of independent sign, so that their mean form is that of Gamma."""
    walk = small.walk(small.made("small")[1], 960)
    site = walk.found[-2]
    gamma = fisher(walk, 960)[site.node]
    g = torch.Generator().manual_seed(0)
    e = 2e-2 * torch.randn(960, *(8, *site.at.after), generator=g)
    dense = Dense(site)
    changed = {site.node: lambda x: dense(x) + e}
    found = divergence(logits_of(walk, {}), logits_of(walk, changed))
    positions = site.at.after[0] * site.at.after[1]
    expected = 0.5 * positions * 4e-4 * np.trace(gamma)
    assert found == pytest.approx(expected, rel=0.15)


def test_fisher_is_the_same_for_the_same_seed():
    walk = small.walk(small.made("sequence")[1], 40)
    first, again, other = fisher(walk, 20), fisher(walk, 20), fisher(walk, 20, seed=1)
    assert {n: len(g) for n, g in first.items()} == {s.node: len(s.weight) for s in walk.found}
    for node, gamma in first.items():
        assert gamma.tobytes() == again[node].tobytes() and gamma.shape == other[node].shape
        np.testing.assert_allclose(gamma, gamma.T)
        assert np.linalg.eigvalsh(gamma)[0] > -1e-7 * np.trace(gamma)  # products in float32
    assert any(not np.array_equal(first[n], other[n]) for n in first)


def test_damping_mixes_with_the_identity_at_one_size():
    gamma = np.diag([4.0, 0.0])
    np.testing.assert_allclose(damped(gamma, 0.25), np.diag([0.75 * 2.0 + 0.25, 0.25]))
    np.testing.assert_allclose(damped(1e-9 * gamma, 0.25), damped(gamma, 0.25))
    np.testing.assert_array_equal(damped(0.0 * gamma, 0.25), np.eye(2))


def test_roots_are_inverse_to_each_other(accepts_only):
    half = np.random.default_rng(0).standard_normal((5, 7))
    gamma = half @ half.T
    root, inverse = roots(gamma)
    accepts_only(
        lambda r: np.testing.assert_allclose(r @ r.T, gamma, atol=1e-10),
        root,
        ["permuted", "flipped"],
    )
    np.testing.assert_allclose(root @ inverse, np.eye(5), atol=1e-9)
    np.testing.assert_allclose(root, root.T, atol=1e-12)
