"""One layer fitted behind others that have changed, against NumPy and SciPy on its rows."""

from __future__ import annotations

import numpy as np
import pytest
import small_nets as small
import torch
from scipy.optimize import minimize

from edgesolve.host import fit as module
from edgesolve.host.errors import DataError
from edgesolve.host.fit import FitOptions, clamped, fit
from edgesolve.host.metric import Metric
from edgesolve.host.patches import Follow, Rows, following, rows
from edgesolve.host.plan import Candidate
from edgesolve.host.sensitivity import damped, fisher
from edgesolve.host.splice import Dense
from edgesolve.host.survey import approximate, layer_moments

PLAIN = FitOptions(sweeps=1, clamp_steps=0)
LAYERS = [(name, "odd") for name in small.ODD]
LAYERS += [("sequence", name) for name in ("b", "token")] + [("small", n) for n in ("two", "fc")]


def site_of(walk, name):
    return next(s for s in walk.found if s.name == name)


def disturbed(name, n=40, seed=0, noise=0.2):
    """A walk whose first layer isn't the original one any more, so that inputs and targets differ."""
    walk = small.walk(small.made(name)[1], n, seed)
    first = walk.found[0]
    draw = np.random.default_rng(seed).standard_normal(first.weight.shape)
    weight = first.weight + noise * np.std(first.weight) * draw
    walk.layers[first.node] = Dense(first, weight)
    return walk


def lossy(site):
    T, c, kh, kw = site.shape
    if kh * kw == 1:
        return Candidate("lowrank", (2,), 0, 0, 0.0)
    return Candidate("tucker2", (max(1, T // 2), max(1, c // 2)), 0, 0, 0.0)


def columns(walk, site):
    """(x (n, groups, D), t (n, T)) of every row, float64."""
    found = list(rows(walk, site, 0))
    return tuple(torch.cat([getattr(b, k) for b in found]).double().numpy() for k in ("x", "t"))


def outputs_of(fitted, site, x):
    full = torch.from_numpy(module._per_group(fitted.chain, site)).numpy()
    return np.einsum("ngd,gtd->ngt", x, full).reshape(len(x), -1) + fitted.bias


@pytest.mark.parametrize(("name", "layer"), LAYERS)
@pytest.mark.parametrize("form", ["dense", "smaller", "cp"])
def test_what_is_predicted_is_measured(name, layer, form, accepts_only):
    """By the moments, by running the factors on the frames, and here by hand on the rows: all the same."""
    walk = disturbed(name)
    site = site_of(walk, layer)
    if form == "cp" and site.shape[2] * site.shape[3] == 1:
        pytest.skip("a 1×1 layer is low rank")
    candidate = {"dense": Candidate("dense", (), 0, 0, 0.0), "cp": Candidate("cp", (3,), 0, 0, 0.0)}
    found = fit(walk, site, candidate.get(form, lossy(site)), None, FitOptions(sweeps=1))
    assert found.predicted == pytest.approx(found.measured, rel=1e-6)
    assert 1e-3 < found.predicted < 1.0 and np.isfinite(found.held_out)
    x, t = columns(walk, site)
    spread = np.sum((t - t.mean(0)) ** 2)
    accepts_only(
        lambda y: np.testing.assert_allclose(
            np.sqrt(np.sum((t - y) ** 2) / spread), found.measured, rtol=1e-5
        ),
        outputs_of(found, site, x),
    )
    assert found.rows == len(x)


def test_patches_in_another_order_are_noticed(monkeypatch):
    """The reason why a fitted layer is run at all."""
    walk = disturbed("small")
    site = site_of(walk, "two")
    own = module.rows

    def turned(walk, site, seed):
        for b in own(walk, site, seed):
            x = b.x.reshape(*b.x.shape[:2], -1, 3, 3).transpose(3, 4).reshape(b.x.shape)
            yield Rows(x, b.t, b.skip, b.image)

    monkeypatch.setattr(module, "rows", turned)
    found = fit(walk, site, lossy(site), None, PLAIN)
    assert found.predicted != pytest.approx(found.measured, rel=1e-3)


@pytest.mark.parametrize("name", ["two", "right"])
def test_a_dense_layer_is_refitted_by_least_squares(name, accepts_only):
    """C S⁻¹ with a ridge toward the original, as augmented rows in NumPy; held_out from images that it didn't see."""
    walk = disturbed("small")
    site = site_of(walk, name)
    found = fit(walk, site, Candidate("dense", (), 0, 0, 0.0), None, PLAIN)
    x, t = columns(walk, site)
    x, W = x[:, 0], site.weight.reshape(8, -1)
    image = np.concatenate([b.image.numpy() for b in rows(walk, site, 0)])

    def least_squares(x, t):
        n, D = x.shape
        centred = x - x.mean(0)
        lam = found.ridge * np.sum(centred**2) / n / D
        a = np.vstack([centred, np.sqrt(lam * n) * np.eye(D)])
        b = np.vstack([t - t.mean(0), np.sqrt(lam * n) * W.T])
        weight = np.linalg.lstsq(a, b, rcond=None)[0].T
        return weight, t.mean(0) - weight @ x.mean(0)

    weight, bias = least_squares(x, t)
    accepts_only(
        lambda a: np.testing.assert_allclose(a, weight, atol=1e-6),
        found.chain.full().reshape(8, -1),
    )
    np.testing.assert_allclose(found.bias, bias, atol=1e-6)
    apart = image % 4 == 3
    weight, bias = least_squares(x[~apart], t[~apart])
    error = np.sum((t[apart] - x[apart] @ weight.T - bias) ** 2)
    spread = np.sum((t[apart] - t[apart].mean(0)) ** 2)
    assert found.held_out == pytest.approx(np.sqrt(error / spread), rel=1e-5)


def test_the_ridge_is_the_one_that_errs_least_on_images_apart():
    few, many = (
        fit(w, site_of(w, "two"), lossy(site_of(w, "two")), None, PLAIN)
        for w in (disturbed("small", 4), disturbed("small", 160))
    )
    assert few.ridge > many.ridge and {few.ridge, many.ridge} <= set(module.RIDGES)
    assert few.held_out > many.held_out


def test_the_ridge_is_the_least_where_the_input_is_the_original_one():
    """Any ridge toward the original gives it back: rounding doesn't choose."""
    for n in (20, 40):
        walk = small.walk(small.made("small")[1], n)
        for site in walk.found:
            assert fit(walk, site, lossy(site), None, PLAIN).ridge == module.RIDGES[0]


def test_an_output_metric_is_that_of_the_weighted_svd(accepts_only):
    """Without a ridge the best rank 2 in the metric Gamma: an SVD of Gamma^1/2 W_ls S^1/2."""
    walk = disturbed("small", 80)
    site = site_of(walk, "right")
    gamma = fisher(walk, 80)[site.node]
    gamma = gamma @ gamma + 0.01 * np.trace(gamma) ** 2 * np.eye(8)  # uneven enough to matter
    found = fit(walk, site, Candidate("lowrank", (2,), 0, 0, 0.0), gamma, PLAIN)
    x, t = columns(walk, site)
    x = x[:, 0] - x[:, 0].mean(0)
    S = x.T @ x / len(x)
    lam = found.ridge * np.trace(S) / len(S)
    C = (t - t.mean(0)).T @ x / len(x) + lam * site.weight.reshape(8, -1)
    S = S + lam * np.eye(len(S))
    L = np.linalg.cholesky(S)
    root = np.linalg.cholesky(damped(gamma, PLAIN.damping)).T
    U, s, V = np.linalg.svd(root @ C @ np.linalg.inv(L).T)
    expected = np.linalg.solve(root, U[:, :2] * s[:2]) @ V[:2] @ np.linalg.inv(L)
    accepts_only(
        lambda a: np.testing.assert_allclose(a, expected, atol=1e-6),
        found.chain.full().reshape(8, -1),
    )
    plain = fit(walk, site, Candidate("lowrank", (2,), 0, 0, 0.0), None, PLAIN)
    assert not np.allclose(plain.chain.full(), found.chain.full(), atol=1e-3)


def one_sided(total, here, low, high):
    """What passes the clamp of t + skip against y + skip: squared, summed over outputs, mean over rows."""
    error = total - here
    error = np.where(total <= low, np.maximum(here - low, 0.0), error)
    error = np.where(total >= high, np.minimum(here - high, 0.0), error)
    return float(np.mean(np.sum(error**2, axis=1)))


@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.0, np.inf), (0.0, 0.8), (-np.inf, 0.5)])
def test_targets_beyond_the_clamp_are_the_outputs_themselves(low, high, with_skip, accepts_only):
    g = np.random.default_rng(0)
    t, y, skip = (torch.from_numpy(g.standard_normal((200, 3))) for _ in range(3))
    batch = Rows(torch.zeros(200, 1, 1), t, skip if with_skip else None, torch.zeros(200))
    z = clamped(batch, y, Follow(None, low, high))
    add = skip if with_skip else 0.0
    expected = one_sided((t + add).numpy(), (y + add).numpy(), low, high)
    accepts_only(
        lambda a: np.testing.assert_allclose(np.mean(np.sum((a - y.numpy()) ** 2, 1)), expected),
        z.numpy(),
    )
    inside = ((t + add > low) & (t + add < high)).numpy()
    np.testing.assert_array_equal(z.numpy()[inside], t.numpy()[inside])


def error_through_clamp(walk, site, fitted):
    follow = following(walk.network, site)
    found = list(rows(walk, site, 0))
    x, t = columns(walk, site)
    skip = 0.0 if found[0].skip is None else torch.cat([b.skip for b in found]).double().numpy()
    return one_sided(t + skip, outputs_of(fitted, site, x) + skip, follow.low, follow.high)


@pytest.mark.parametrize("form", ["dense", "smaller"])
@pytest.mark.parametrize("name", ["stem", "one", "two", "left", "last"])
def test_steps_through_the_clamp_never_raise_the_one_sided_error(name, form):
    walk = disturbed("small") if name != "stem" else small.walk(small.made("small")[1], 40)
    site = site_of(walk, name)
    candidate = Candidate("dense", (), 0, 0, 0.0) if form == "dense" else lossy(site)
    errors = [
        error_through_clamp(walk, site, fit(walk, site, candidate, None, FitOptions(1, steps)))
        for steps in (0, 1, 4)
    ]
    assert errors[1] <= errors[0] * (1 + 1e-6) and errors[2] <= errors[1] * (1 + 1e-6)
    if form == "smaller":
        assert errors[2] < 0.999 * errors[0]


def test_steps_through_the_clamp_head_for_the_minimum():
    """Unrestricted and with many steps, as low as SciPy gets from where they started."""
    walk = disturbed("small", 12)
    site = site_of(walk, "right")
    site_follow = Follow(None, 0.0, np.inf)
    x, t = columns(walk, site)
    x = x[:, 0]
    batch = Rows(torch.from_numpy(x[:, None]), torch.from_numpy(t), None, torch.zeros(len(x)))
    rows_ = np.column_stack([x, np.ones(len(x))])
    W = np.linalg.lstsq(rows_, t, rcond=None)[0]
    start = one_sided(t, rows_ @ W, 0.0, np.inf)
    for _ in range(300):
        z = clamped(batch, torch.from_numpy(rows_ @ W), site_follow).numpy()
        W = np.linalg.lstsq(rows_, z, rcond=None)[0]

    def loss(w):
        return one_sided(t, rows_ @ w.reshape(W.shape), 0.0, np.inf)

    best = minimize(
        loss, 0.0 * W.ravel(), method="L-BFGS-B", options={"maxfun": 40_000, "maxiter": 500}
    )
    assert loss(W) <= best.fun * 1.01 < start


def test_the_anchored_fit_beats_the_published_one():
    """Symmetric: the layer's own outputs on the original inputs, then run on the inputs that it really gets."""
    walk, clean = disturbed("small", noise=0.6), small.walk(small.made("small")[1], 40)
    site = site_of(walk, "one")
    candidate = lossy(site)
    found = fit(walk, site, candidate, None, PLAIN)
    metrics = [Metric.of(m) for m in layer_moments(clean, site, 0)]
    weight, bias = approximate(site, metrics, candidate)
    x, t = columns(walk, site)
    published = x[:, 0] @ weight.reshape(8, -1).T + bias
    error = np.sqrt(np.sum((t - published) ** 2) / np.sum((t - t.mean(0)) ** 2))
    assert found.measured < 0.9 * error


@pytest.mark.parametrize("form", ["dense", "lowrank", "tucker2", "cp"])
def test_dead_channels_and_repeated_ones_give_finite_weights(form):
    """S is rank-deficient: some inputs never change, others are copies."""
    walk = small.walk(small.made("small")[1], 40)
    stem, one = walk.found[:2]
    weight, bias = stem.weight.copy(), stem.bias.copy()
    weight[2:4], bias[2:4] = 0.0, -1.0
    weight[4], bias[4] = weight[5], bias[5]
    walk.layers[stem.node] = Dense(stem, weight, bias)
    ranks = {"dense": (), "lowrank": (3,), "tucker2": (7, 7), "cp": (20,)}[form]
    found = fit(walk, one, Candidate(form, ranks, 0, 0, 0.0), None, FitOptions(sweeps=2))
    assert all(np.isfinite(f.weight).all() for f in found.chain.factors)
    assert np.isfinite(found.bias).all() and found.predicted == pytest.approx(
        found.measured, rel=1e-6
    )
    assert np.abs(found.chain.full()).max() < 1e3 * np.abs(one.weight).max()


def test_the_same_bytes_twice():
    runs = []
    for _ in range(2):
        walk = disturbed("small")
        site = site_of(walk, "two")
        runs.append(fit(walk, site, lossy(site), fisher(walk, 16)[site.node], FitOptions()))
    a, b = runs
    assert a.bias.tobytes() == b.bias.tobytes() and (a.predicted, a.held_out) == (
        b.predicted,
        b.held_out,
    )
    for f, g in zip(a.chain.factors, b.chain.factors, strict=True):
        assert f.weight.tobytes() == g.weight.tobytes()


def test_rows_that_are_gathered_anew_give_the_same(monkeypatch):
    found = []
    for bound in (module.ROW_BYTES, 0):
        monkeypatch.setattr(module, "ROW_BYTES", bound)
        walk = disturbed("small")
        site = site_of(walk, "two")
        found.append(fit(walk, site, lossy(site), None, FitOptions()))
    np.testing.assert_array_equal(found[0].chain.full(), found[1].chain.full())
    assert found[0].measured == found[1].measured


def test_three_frames_are_too_few_to_hold_one_apart():
    walk = small.walk(small.made("small")[1], 3)
    with pytest.raises(DataError, match="stem: it takes at least 4 calibration frames"):
        fit(walk, walk.found[0], lossy(walk.found[0]), None, PLAIN)
