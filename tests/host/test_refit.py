"""Blocks refitted by coordinate descent: each update against NumPy, descent at every block, held-out choice."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import small_nets as small
import torch

from edgesolve.host import bcd_refit as bcd
from edgesolve.host import bcd_refit_steps as steps
from edgesolve.host.bcd_blocks import relu_prox
from edgesolve.host.bcd_refit_steps import clamp_prox
from edgesolve.host.compress import compress
from edgesolve.host.errors import DataError
from edgesolve.host.fit import FitOptions
from edgesolve.host.network import trace
from edgesolve.host.plan import Candidate, Plan
from edgesolve.host.refit import refit, refitted
from edgesolve.host.refit_block import blocks, flow, spread
from edgesolve.host.refit_problem import Problem, RefitOptions, affine, conv, matrix, put
from edgesolve.host.shards import Shards
from edgesolve.host.splice import Compressed

FRAMES = 24
EXACT = RefitOptions(dtype="float64", cg=(1e-12, 500), sweeps=2)


def candidate(site, form):
    T, c, kh, kw = site.shape
    if form == "dense":
        return Candidate("dense", (), site.weight.size, site.macs, 0.0)
    if kh * kw == 1:
        return Candidate("lowrank", (max(1, min(T, c) // 2),), 0, 0, 0.0)
    if form == "cp":
        return Candidate("cp", (4,), 0, 0, 0.0)
    return Candidate("tucker2", (max(1, T // 2), max(1, c // 2)), 0, 0, 0.0)


@cache
def compressed(name, form="tucker2", n=FRAMES, pivots=True):
    """(network, compression by the one-shot pass) of small_nets' network `name`."""
    network = small.made(name)[1]
    walk = small.walk(network, n)
    chosen = {s.node: candidate(s, form) for s in walk.found}
    chosen[walk.found[0].node] = candidate(
        walk.found[0], "tucker2"
    )  # else nothing is ever refitted
    plan = Plan(chosen, "params", 0.0, None)
    return network, compress(walk, plan, {}, None, FitOptions(sweeps=1, pivots=pivots))


def problems(name, form="tucker2", options=EXACT, weights=True):
    """(Problem, layers) of every block of a compressed network, its last channels unevenly weighted."""
    network, done = compressed(name, form, 300 if name == "perceptron" else FRAMES)
    walk = small.walk(network, FRAMES, seed=3)
    walk.layers.update({s.node: done.module.places[s.node] for s in walk.found})
    for block in blocks(network, walk.found, done.fitted)[0]:
        d = np.linspace(0.5, 1.5, len(block.sites[-1].bias)) if weights else None
        own = flow(walk, block, getattr(torch, options.dtype))
        layers = [(done.fitted[s.node].chain, done.fitted[s.node].bias) for s in block.sites]
        yield Problem.of(block, own, options, d), layers


def problem_of(name, block, **more):
    return next((p, lay) for p, lay in problems(name, **more) if p.block.name == block)


def moved(problem, layers):
    """A point away from the start, where every update has something to do."""
    return bcd.sweep(problem, bcd.start(problem, layers))


CLAMPS = [(0.0, np.inf), (0.0, 6.0), (-np.inf, 0.5), (-np.inf, np.inf), (-1.0, 1.0)]


@pytest.mark.parametrize(("low", "high"), CLAMPS)
@pytest.mark.parametrize("g", [0.1, 1.0, 10.0])
def test_prox_is_the_minimum(low, high, g, accepts_only):
    draw = np.random.default_rng(0)
    a, b = (torch.from_numpy(5.0 * draw.standard_normal(200)) for _ in range(2))
    grid = torch.linspace(-25.0, 25.0, 40_001, dtype=torch.float64)

    def cost(u):
        return 0.5 * (u.clamp(low, high) - a) ** 2 + 0.5 * g * (u - b) ** 2

    least = torch.stack([cost(u).clone() for u in grid[::20]]).min(0).values

    def near(u):
        assert (cost(torch.from_numpy(u)) <= least + 1e-9).all()

    accepts_only(near, clamp_prox(a, b, g, low, high).numpy())


def test_the_relu_prox_is_that_of_training():
    draw = np.random.default_rng(1)
    a, b = draw.standard_normal((2, 1000))
    ours = clamp_prox(torch.from_numpy(a), torch.from_numpy(b), 0.7, 0.0, np.inf)
    np.testing.assert_allclose(ours.numpy(), relu_prox(a, b, 0.7), atol=1e-14)


def jacobian(problem, i, W, shape):
    """Layer i without bias as a matrix, column by column through torch."""
    eye = torch.eye(int(np.prod(shape[1:])), dtype=torch.float64).reshape(-1, *shape[1:])
    out = affine(problem, i, W, np.zeros(len(W)), eye)
    return out.flatten(1).T.numpy()


def test_activations_by_dense_least_squares(accepts_only):
    """V_1 of the residual block, against NumPy's least squares over one explicit matrix per frame."""
    problem, layers = problem_of("small", "one - two")
    p, o = moved(problem, layers), problem.options
    i, k = 1, 0
    V, U, before = p.V[i][k], p.U[i][k], p.U[0][k].clamp(min=0.0)
    J = jacobian(problem, i, p.W[i], V.shape)
    lack = (U - problem.skip(i, k) - torch.from_numpy(p.bias[i])[None, :, None, None]).flatten(1)
    d = np.sqrt(np.broadcast_to(problem.weights[:, None, None], U.shape[1:]).ravel())
    near, far = np.sqrt(o.gamma / problem.rows(0)), np.sqrt(o.rho / problem.rows(i))
    A = np.vstack([near * np.eye(J.shape[1]), far * d[:, None] * J])
    b = np.vstack([near * before.flatten(1).numpy().T, far * d[:, None] * lack.numpy().T])
    expected = np.linalg.solve(A.T @ A, A.T @ b).T.reshape(V.shape)
    found = steps.updated_v(problem, p, i)[k].numpy()
    accepts_only(lambda v: np.testing.assert_allclose(v, expected, atol=1e-8), found)


@pytest.mark.parametrize("name", ["stride", "dilation", "rectangular", "plain"])
def test_activations_before_odd_convolutions(name):
    """No change of V_i lowers L: its gradient, by autograd, vanishes."""
    problem, layers = next(
        (p, lay) for p, lay in problems(name) if p.n_layers == 2 and "odd" in p.block.name
    )
    p = moved(problem, layers)
    new = replace(p, V=put(p.V, 1, steps.updated_v(problem, p, 1)))
    at = [v.clone().requires_grad_() for v in new.V[1]]
    before, share = problem.block.follow[0], problem.options
    total = 0.0
    for k, v in enumerate(at):
        linear = affine(problem, 1, p.W[1], p.bias[1], v) + problem.skip(1, k)
        near = (v - p.U[0][k].clamp(before.low, before.high)) ** 2
        far = problem.scale(1) * (p.U[1][k] - linear) ** 2
        total = total + share.gamma / problem.rows(0) * near.sum()
        total = total + share.rho / problem.rows(1) * far.sum()
    for g, v in zip(torch.autograd.grad(total, at), at, strict=True):
        assert float(g.abs().max()) < 1e-9 * (1.0 + float(v.detach().abs().max()))


@pytest.mark.parametrize("tau", [None, 0.5])
def test_weights_by_least_squares(tau, accepts_only):
    """W and b of a dense layer from rows in NumPy, with what pulls at W as more rows."""
    options = replace(EXACT, tau=tau)
    problem, layers = problem_of("small", "one - two", form="dense", options=options)
    p, i = moved(problem, layers), 1
    found = steps.updated_layer(problem, p, i)
    x, t = [], []
    for k, (v, u) in enumerate(zip(p.V[i], p.U[i], strict=True)):
        columns = torch.nn.functional.unfold(v, 3, 1, 1, 1).transpose(1, 2)
        x.append(columns.flatten(0, 1).numpy())
        t.append((u - problem.skip(i, k)).flatten(2).transpose(1, 2).flatten(0, 1).numpy())
    x, t = np.concatenate(x), np.concatenate(t)
    n, D = x.shape
    spread = np.trace(np.cov(x.T, bias=True)) / D
    rows = np.column_stack([x, np.ones(n)])
    expected = np.empty((len(p.W[i]), D + 1))
    for c in range(len(expected)):
        # Means over positions: n rows of ρ d / n; the pull of τ isn't a mean.
        proximal = np.sqrt(n * options.ridge * spread)
        towards = np.sqrt(n * problem.tau / (options.rho * problem.weights[c]))
        extra = [(proximal, p.W[i][c]), (towards, matrix(p.chains[i])[c])]
        A = np.vstack([rows, *(np.eye(D, D + 1) * s for s, _ in extra)])
        b = np.concatenate([t[:, c], *(s * at for s, at in extra)])
        expected[c] = np.linalg.lstsq(A, b, rcond=None)[0]
    accepts_only(lambda a: np.testing.assert_allclose(a, expected[:, :D], atol=1e-7), found.W[i])
    np.testing.assert_allclose(found.bias[i], expected[:, D], atol=1e-7)


def rises(problem, layers, sweeps=2):
    """Blocks at which L rose, over some sweeps."""
    last, found = [bcd.objective(problem, bcd.start(problem, layers))], []

    def watch(block, p):
        now = bcd.objective(problem, p)
        if now > last[0] * (1.0 + 1e-10) + 1e-14:
            found.append(block)
        last[0] = now

    p = bcd.start(problem, layers)
    for _ in range(sweeps):
        p = bcd.sweep(problem, p, watch)
    return found


@pytest.mark.parametrize("tau", [None, 0.3])
@pytest.mark.parametrize("form", ["tucker2", "cp", "dense"])
@pytest.mark.parametrize("name", ["small", "downsampled"])
def test_the_objective_never_rises(name, form, tau):
    for problem, layers in problems(name, form, replace(EXACT, tau=tau)):
        assert rises(problem, layers) == []


@pytest.mark.parametrize("name", ["sequence", "perceptron", "stride", "dilation", "rectangular"])
def test_the_objective_never_rises_in_odd_layers(name):
    for problem, layers in problems(name, options=replace(EXACT, cg=(1e-3, 5))):
        assert rises(problem, layers) == []


def _one_piece_of_the_prox(monkeypatch):
    monkeypatch.setattr(
        steps, "clamp_prox", lambda a, b, g, low, high: ((a + g * b) / (1.0 + g)).clamp(low, high)
    )


def _weight_instead_of_its_adjoint(monkeypatch):
    monkeypatch.setattr(
        steps, "adjoint", lambda site, weight, y, shape: conv(site, weight.flip(2), y)
    )


def _starts_anew(monkeypatch):
    own = steps.factorise
    monkeypatch.setattr(steps, "factorise", lambda m, shape, c, sweeps, start: own(m, shape, c, 0))
    monkeypatch.setattr(steps, "_distortion", lambda metric, W, problem, i: 0.0)


@pytest.mark.parametrize(
    "mutant",
    [
        _one_piece_of_the_prox,
        _weight_instead_of_its_adjoint,
        _starts_anew,
    ],
)
def test_a_wrong_update_is_seen_to_rise(mutant, monkeypatch):
    found = list(problems("small", "cp"))
    mutant(monkeypatch)
    assert any(rises(problem, layers, 3) for problem, layers in found)


def test_blocks_begin_and_end_where_everything_passes():
    network, done = compressed("small")
    sites = small.walk(network, 4).found
    names = [b.name for b in blocks(network, sites, done.fitted)[0]]
    assert names == ["stem", "one - two", "left", "right", "last", "fc"]
    alone = [b.name for b in blocks(network, sites, done.fitted, longest=1)[0]]
    assert alone == [s.name for s in sites]
    runs, refused = blocks(network, sites, set(done.fitted) - {sites[2].node})
    assert "two" in refused and [b.name for b in runs][:2] == ["stem", "one"]
    with pytest.raises(ValueError, match="longest must be 1 or more"):
        blocks(network, sites, done.fitted, 0)


def test_grouped_layers_are_refused_by_name():
    network, done = compressed("groups")
    runs, refused = blocks(network, small.walk(network, 4).found, done.fitted)
    assert refused == {"odd": "a convolution of 2 groups; left as fitted"}
    assert [b.name for b in runs] == ["before", "fc"]


@pytest.mark.parametrize("name", ["small", "downsampled", "sequence", "perceptron", "reflected"])
def test_a_block_gives_what_the_network_gives(name):
    """Its factors in float64, clamp and skip as in the graph, against the compressed network's own activations."""
    network, done = compressed(name, n=300 if name == "perceptron" else FRAMES)
    walk = small.walk(network, 8, seed=3)
    walk.layers.update({s.node: done.module.places[s.node] for s in walk.found})
    for block in blocks(network, walk.found, done.fitted)[0]:
        problem = Problem.of(block, flow(walk, block, torch.float64), EXACT)
        layers = [(done.fitted[s.node].chain, done.fitted[s.node].bias) for s in block.sites]
        seen = {}
        x = small.PLAIN(torch.from_numpy(walk.x))
        keep = lambda node, v, args, seen=seen: seen.update({node.name: v})  # noqa: E731
        with torch.no_grad():
            network.run(x, norm=walk.norm, layers={**walk.original, **walk.layers}, watch=keep)
        follow, last = block.follow[-1], block.sites[-1]
        expected = seen[last.node] + (seen[follow.skip] if follow.skip else 0.0)
        expected = spread(expected.clamp(follow.low, follow.high), last)
        found = torch.cat(bcd.forward(problem, layers))
        torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-5)


def disturbed(done):
    """The fitted layers with biases that are off."""
    draw = np.random.default_rng(0)
    return {
        n: replace(f, bias=f.bias + 0.1 * draw.standard_normal(f.bias.shape))
        for n, f in done.fitted.items()
    }


def test_no_more_frames_than_rows_are_asked_for():
    network, done = compressed("small", n=200)
    walk = small.walk(network, 200)
    whole, few = (
        flow(walk, blocks(network, walk.found, done.fitted)[0][1], rows=r) for r in (1e9, 80 * 65)
    )
    assert sum(map(len, whole.x)) == 200 and sum(map(len, few.x)) == 2 * walk.size == 128
    assert all(torch.equal(a, b) for a, b in zip(few.target, whole.target, strict=False))
    assert len(few.skip) == len(few.x) == len(few.target) == 2


def judged(network, found, frames, fitted):
    """(divergence, agreement) of the whole network with `fitted`, in plain torch."""
    layers = {s.node: fitted[s.node].module(s) for s in found}
    x = small.PLAIN(torch.from_numpy(frames))
    with torch.no_grad():
        a, b = network.run(x).double(), Compressed(network, found, layers)(x).double()
    kl = torch.nn.functional.kl_div(b.log_softmax(1), a.softmax(1), reduction="batchmean")
    return float(kl), float((a.argmax(1) == b.argmax(1)).double().mean())


def test_what_is_kept_is_what_was_best_on_the_frames_apart():
    network, done = compressed("small", n=200)
    walk, held = small.walk(network, 200), small.walk(network, 100, seed=7)
    given = disturbed(done)
    fitted, rows, refused = refit(walk, held, given, RefitOptions(sweeps=3))
    assert refused == {} and any(r.accepted for r in rows)
    losses = [rows[0].divergence[0]]
    for row in rows:
        assert row.divergence[0] == pytest.approx(losses[-1], rel=1e-4)
        assert row.sweep == int(np.argmin(row.divergence)) and len(row.divergence) == 4
        assert all(
            b <= a * (1 + 1e-5) for a, b in zip(row.objective, row.objective[1:], strict=False)
        )
        losses.append(row.divergence[row.sweep])
    assert losses[-1] < losses[0]
    before = judged(network, held.found, held.x, given)
    after = judged(network, held.found, held.x, fitted)
    assert before[0] == pytest.approx(losses[0], rel=1e-4)
    assert after == pytest.approx((losses[-1], rows[-1].agreement[rows[-1].sweep]), rel=1e-4)
    for node, f in fitted.items():
        old = done.fitted[node]
        assert f.chain.ranks == old.chain.ranks and f.chain.n_params == old.chain.n_params


def test_what_does_not_help_changes_nothing():
    """Fitted to frames of another kind, judged on those that the layers were made for."""
    network, done = compressed("small", n=200)
    walk, held = small.walk(network, 12, seed=5), small.walk(network, 200)
    walk.x[:] = 40.0 * np.random.default_rng(0).standard_normal(walk.x.shape)
    fitted, rows, _ = refit(walk, held, done.fitted, RefitOptions(sweeps=1, rho=0.05))
    for row, block in zip(rows, blocks(network, walk.found, done.fitted)[0], strict=True):
        if row.accepted:
            continue
        for site in block.sites:
            a, b = fitted[site.node], done.fitted[site.node]
            assert all(
                np.array_equal(f.weight, g.weight)
                for f, g in zip(a.chain.factors, b.chain.factors, strict=True)
            )
            assert np.array_equal(a.bias, b.bias)
    assert sum(r.accepted for r in rows) < len(rows)


def test_the_compression_is_put_together_again():
    network, done = compressed("small", n=100)
    walk, held = small.walk(network, 100), small.walk(network, 60, seed=7)
    off = replace(done, fitted=disturbed(done))
    found, rows = refitted(walk, held, off, RefitOptions(sweeps=1))
    changed = {n for r in rows if r.accepted for n in r.block.split(" - ")}
    assert changed
    assert changed == {s.layer for s in found.steps if s.reason.endswith("refitted in its block")}
    kl, _ = judged(network, walk.found, walk.x, found.fitted)
    assert found.divergence == pytest.approx(kl, rel=1e-3)
    x = small.PLAIN(torch.from_numpy(held.x))
    with torch.no_grad():
        a = found.module(x)
        layers = {s.node: found.fitted[s.node].module(s) for s in walk.found}
        assert torch.equal(a, Compressed(network, walk.found, layers)(x))
        assert trace(found.module, small.IMAGE).run(x).shape == a.shape


def test_the_same_bytes_twice():
    network, done = compressed("small")
    runs = []
    for _ in range(2):
        walk, held = small.walk(network, FRAMES), small.walk(network, 30, seed=7)
        runs.append(refit(walk, held, done.fitted, RefitOptions(sweeps=1))[0])
    for node in runs[0]:
        a, b = runs[0][node], runs[1][node]
        assert a.bias.tobytes() == b.bias.tobytes()
        assert a.chain.full().tobytes() == b.chain.full().tobytes()


def test_bad_input_is_named():
    network, done = compressed("small")
    walk, held = small.walk(network, FRAMES), small.walk(network, 30)
    walk.x[5] = np.nan
    with pytest.raises(
        DataError, match="stem: NaN or inf in its activations on calibration batch 0"
    ):
        refit(walk, held, done.fitted)
    with pytest.raises(DataError, match="refitted by one process"):
        refit(small.walk(network, 200, shards=Shards(0, 2)), held, done.fitted)
    for wrong in ({"rho": 0.0}, {"gamma": np.inf}, {"tau": -1.0}, {"dtype": "float16"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            RefitOptions(**wrong)
    block = blocks(network, held.found, done.fitted)[0][0]
    with pytest.raises(ValueError, match="stem: weights must be"):
        Problem.of(block, flow(held, block), EXACT, np.zeros(8))
