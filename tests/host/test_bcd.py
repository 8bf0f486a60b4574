from dataclasses import replace

import numpy as np
import pytest
import torch

from edgesolve.host import bcd_problem as bcd
from edgesolve.host import bcd_run
from edgesolve.host.bcd import sweep
from edgesolve.host.bcd_problem import Problem, Settings, Sparse, Train, forward, shipped
from edgesolve.host.bcd_run import Budget, train
from edgesolve.host.bcd_start import Start, closed_form, leading, readout

FORMATS = {2: Train((4, 4, 4, 5), 3), 3: Sparse(60)}
SETTINGS = Settings(gamma=1.0, rho=1.0, tau=0.5, alpha=0.2, dtype="float64")


def toy(formats=FORMATS, *, n=60, seed=0):
    """Three blobs seen through patches: a convolution with 5 filters on 4 positions, 16, 16, 3."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    centres = 2.0 * np.random.default_rng(9).standard_normal((3, 4, 9))
    x = (centres[labels] + rng.standard_normal((n, 4, 9))).reshape(-1, 9)
    return Problem(x, np.eye(3)[labels], (5, 16, 16, 3), formats, 4)


def same(p, q):
    return all(
        np.array_equal(bcd.full(a), bcd.full(b))
        for name in "VUAWbC"
        for a, b in zip(getattr(p, name), getattr(q, name), strict=True)
        if a is not None
    )


def test_the_forward_pass_is_torchs_convolution_and_layers():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((6, 1, 7, 7))
    conv = torch.nn.Conv2d(1, 4, 3, stride=2).double()
    layers = [torch.nn.Linear(36, 5).double(), torch.nn.Linear(5, 2).double()]
    maps = conv(torch.tensor(images)).relu().permute(0, 2, 3, 1).flatten(1)
    want = layers[1](layers[0](maps).relu()).detach().numpy()
    view = np.lib.stride_tricks.sliding_window_view(images[:, 0], (3, 3), axis=(1, 2))
    patches = view[:, ::2, ::2].reshape(-1, 9)
    weights = [conv.weight.detach().numpy().reshape(4, 9)]
    weights += [layer.weight.detach().numpy() for layer in layers]
    biases = [layer.bias.detach().numpy() for layer in (conv, *layers)]
    got = forward(patches, 9, weights, biases)
    assert np.allclose(got, want, atol=1e-12)
    assert not np.allclose(got[::-1], want, atol=1e-3)


def test_a_start_is_feasible_and_its_format_pulls_nothing():
    problem = toy()
    state = closed_form(problem, SETTINGS, Start(directions=8), seed=0)
    for i in range(3):
        assert np.array_equal(state.V[i], np.maximum(state.U[i], 0.0))
    assert all(np.array_equal(u, a) for u, a in zip(state.U, state.A, strict=True))
    assert np.array_equal(state.W[1], state.C[1].full())
    assert np.allclose(forward(problem.x, 4, state.W, state.b), state.V[-1])
    assert same(state, closed_form(problem, SETTINGS, Start(directions=8), seed=0))


def test_labels_in_the_start_make_a_better_one():
    problem, held_out = toy({}, n=120), toy({}, n=300, seed=5)
    errors = []
    for labels in (0.0, 2.0):
        state = closed_form(problem, SETTINGS, Start(directions=3, labels=labels), seed=0)
        out = forward(held_out.x, 4, state.W, state.b)
        errors.append(float(np.mean((out - held_out.y) ** 2)))
    assert errors[1] < errors[0]
    assert errors[0] < np.var(held_out.y)


def test_the_readout_is_ridge_regression():
    rng = np.random.default_rng(0)
    V, Y = rng.standard_normal((30, 4)), rng.standard_normal((30, 2))
    W, b = readout(V, Y, 3.0)
    X = np.column_stack([V, np.ones(30)])
    want = np.linalg.lstsq(
        np.vstack([X, np.sqrt(3.0) * np.eye(5)]), np.vstack([Y, np.zeros((5, 2))]), rcond=None
    )[0].T
    assert np.allclose(np.column_stack([W, b]), want, atol=1e-10)


def test_the_leading_axes_are_the_principal_ones():
    V = np.random.default_rng(0).standard_normal((200, 30)) * 0.5 ** np.arange(30) + 1.0
    axes, size = leading(V, 3, np.random.default_rng(1))
    _, s, Qt = np.linalg.svd(V - V.mean(axis=0), full_matrices=False)
    assert np.allclose(np.abs(axes @ Qt[:3].T), np.eye(3), atol=1e-6)
    assert size == pytest.approx(np.sqrt(np.sum(s[:3] ** 2) / 200), rel=1e-9)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_it_learns_a_separable_problem_with_the_weights_it_ships(dtype):
    problem, held_out = toy(n=120), toy(n=300, seed=5)
    settings = replace(SETTINGS, dtype=dtype)
    start = closed_form(problem, settings, Start(directions=3, smooth=10.0), seed=0)
    run = train(problem, settings, start, Budget(30))
    assert run.trace.rises == 0
    assert run.state.W[0].dtype == dtype
    labels = held_out.y.argmax(axis=1)
    right = forward(held_out.x, 4, shipped(run.state), run.state.b).argmax(axis=1) == labels
    assert right.mean() > 0.95
    assert np.count_nonzero(shipped(run.state)[2]) <= 60
    wrong = [np.roll(w, 1, axis=0) for w in shipped(run.state)]
    assert (forward(held_out.x, 4, wrong, run.state.b).argmax(axis=1) == labels).mean() < 0.8


def test_a_plain_mlp_needs_no_positions():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 6))
    problem = Problem(x, x[:, :2] @ rng.standard_normal((2, 2)), (12, 2), {1: Train((3, 4, 6), 3)})
    run = train(problem, SETTINGS, closed_form(problem, SETTINGS, seed=0), Budget(20))
    assert run.trace.rises == 0
    assert run.trace.rows[-1]["objective"] < 0.2 * np.sum(problem.y**2)


def test_watching_changes_nothing_beyond_rounding():
    problem = toy()
    state = closed_form(problem, SETTINGS, seed=0)
    seen = []
    plain = sweep(problem, SETTINGS, state, {})
    watched = sweep(problem, SETTINGS, state, {}, lambda block, *rest: seen.append(block))
    order = ["V4", "U4", "W4", "V3", "U3", "W3", "C3", "V2", "U2", "W2", "C2", "V1", "U1", "W1"]
    assert seen == order
    for p, q in zip(plain.W, watched.W, strict=True):
        assert np.allclose(p, q, atol=1e-9)


def test_the_products_kept_are_those_of_the_state():
    problem = toy()
    state = sweep(problem, SETTINGS, closed_form(problem, SETTINGS, seed=0), {})
    rows = problem.x
    for i in range(4):
        A = (rows @ state.W[i].T + state.b[i]).reshape(60, -1)
        assert np.allclose(state.A[i], A, atol=1e-10)
        rows = state.V[i]


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path):
    problem = toy()
    state = closed_form(problem, SETTINGS, seed=0)
    whole = train(problem, SETTINGS, state, Budget(9))
    train(problem, SETTINGS, state, Budget(4), folder=tmp_path / "run", save_every=3)
    again = train(problem, SETTINGS, state, Budget(9), folder=tmp_path / "run")
    assert same(whole.state, again.state)
    assert [r["objective"] for r in again.trace.rows] == [r["objective"] for r in whole.trace.rows]
    assert again.state.sweeps == 9


def test_other_settings_or_data_are_refused_and_the_run_is_kept(tmp_path):
    problem, folder = toy(), tmp_path / "run"
    state = closed_form(problem, SETTINGS, seed=0)
    train(problem, SETTINGS, state, Budget(2), folder=folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for other, settings in ((problem, replace(SETTINGS, rho=2.0)), (toy(seed=1), SETTINGS)):
        with pytest.raises(ValueError, match="run holds a run of other settings"):
            train(other, settings, state, Budget(4), folder=folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert train(problem, SETTINGS, state, Budget(3), folder=folder).state.sweeps == 3


def test_budgets_end_a_run_and_say_why(monkeypatch):
    problem = toy()
    state = closed_form(problem, SETTINGS, seed=0)
    clock = iter(range(1000))
    monkeypatch.setattr(bcd_run.time, "perf_counter", lambda: float(next(clock)))
    rows = []
    ended = train(
        problem, SETTINGS, state, Budget(50, seconds=4.5), progress=lambda r, s: rows.append(r)
    )
    assert ended.reason == "seconds"
    assert 0 < ended.state.sweeps == len(rows) < 50
    assert train(problem, SETTINGS, state, Budget(2)).reason == "sweeps"
    assert train(problem, SETTINGS, state, Budget(50, tol=0.5)).reason == "converged"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"y": np.zeros((60, 4))}, r"y must be \(n, 3\), got \(60, 4\)"),
        ({"y": np.full((60, 3), np.nan)}, r"y has 60 row\(s\) with NaN"),
        ({"y": np.zeros((61, 3))}, "x has 240 rows, y 61 of 4 position"),
        ({"formats": {2: Train((4, 4, 4, 4), 3)}}, "The nearest that do"),
        ({"formats": {2: Train((4, 4, 4, 5), 21)}}, r"rank must lie in 1\.\.16"),
        ({"formats": {5: Sparse(3)}}, "no layer 5, there are 4"),
        ({"formats": {3: Sparse(257)}}, r"keep must lie in 1\.\.256"),
    ],
)
def test_what_cannot_be_trained_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(toy(), **change)


@pytest.mark.parametrize("name", ["gamma", "rho", "tau", "alpha"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_penalties_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive number"):
        Settings(**{name: value})


def test_weights_of_another_shape_are_refused():
    problem = toy()
    with pytest.raises(ValueError, match=r"W_2 must be \(16, 20\), got \(16, 5\)"):
        bcd.at(problem, SETTINGS, [np.zeros((5, 9)), np.zeros((16, 5))], [np.zeros(5)] * 2)
