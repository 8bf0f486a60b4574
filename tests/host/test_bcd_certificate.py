import json
from dataclasses import replace

import numpy as np
import pytest

from edgesolve.host import bcd_blocks as blocks
from edgesolve.host import bcd_problem as bcd
from edgesolve.host.bcd import sweep
from edgesolve.host.bcd_certificate import Recorder, constant, gradient_norm
from edgesolve.host.bcd_objective import Trace, logged_objective, objective
from edgesolve.host.bcd_problem import Problem, Settings, Sparse, Train
from edgesolve.host.bcd_run import Budget, Certify, train
from edgesolve.host.tensor_train_cores import TTCores, tt_svd

TRAINS = {2: Train((4, 4, 4, 5), 3), 3: Train((4, 4, 4, 4), 3)}
PRUNED = {1: Sparse(10), 2: Sparse(40), 3: Sparse(30)}
PUBLISHED = [(5.0, 5.0, 0.1, 1.0), (0.5, 0.5, 5.0, 1.0), (100.0, 1.0, 200.0, 1.0)]


def toy(formats, *, seed=0, dtype="float64", n=40):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n * 4, 9)).astype(dtype)
    y = np.eye(3)[rng.integers(0, 3, n)].astype(dtype)
    return Problem(x, y, (5, 16, 16, 3), formats, 4)


def start(problem, settings, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [problem.shape(i) for i in range(1, problem.n_layers + 1)]
    weights = [rng.standard_normal(s) / np.sqrt(s[1]) for s in shapes]
    return bcd.at(problem, settings, weights, [np.zeros(s[0]) for s in shapes])


def run(problem, settings, sweeps=25, **certify):
    certify = Certify(**{"blocks": True, "spectra": True, "gradient_every": 1} | certify)
    state = start(problem, settings)
    return train(problem, settings, state, Budget(sweeps), certify=certify).trace


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("formats", [TRAINS, PRUNED, {}], ids=["train", "pruned", "dense"])
@pytest.mark.parametrize("penalties", PUBLISHED, ids=["mnist", "activity", "flares"])
def test_no_block_rises_and_every_one_falls_by_its_constant(formats, penalties, dtype):
    g, r, t, a = penalties
    settings = Settings(gamma=g, rho=r, tau=t, alpha=a, dtype=dtype)
    trace = run(toy(formats, dtype=dtype), settings)
    assert (trace.rises, trace.block_rises, trace.violations) == (0, 0, 0)
    assert trace.rows[-1]["objective"] < 0.9 * trace.rows[0]["objective"]
    assert len(trace.rows[1]["blocks"]) == 3 * 4 + len(formats)


@pytest.mark.parametrize("weights", [0.0, 20.0])
def test_a_prox_weight_of_the_weights_apart_keeps_the_certificate(weights):
    settings = Settings(gamma=1.0, rho=1.0, tau=0.5, alpha=0.2, alpha_weights=weights)
    trace = run(toy(TRAINS), settings, sweeps=15)
    assert (trace.rises, trace.violations) == (0, 0)


def test_the_constants_without_spectra_are_smaller_and_hold_too():
    problem, settings = toy(TRAINS), Settings(dtype="float64")
    state = start(problem, settings)
    for block in ("V4", "U4", "W4", "V2", "U2", "W2", "C2"):
        small = constant(problem, settings, state, block)
        assert 0.0 < small <= constant(problem, settings, state, block, spectra=True)
        assert small >= 0.5 * min(settings.alpha, settings.gamma, settings.tau)
    assert run(problem, settings, sweeps=5, spectra=False).violations == 0


def test_the_published_steps_are_caught():
    """TT-SVD raises its own block; the alias leaves nothing to pull and raises L; ours does neither."""
    settings = Settings(gamma=1.0, rho=1.0, tau=0.5, alpha=0.3, dtype="float64", published=True)
    trains, pruned = run(toy(TRAINS), settings), run(toy(PRUNED), settings)
    for trace, block in ((trains, "C2"), (pruned, "C1")):
        raised = {
            b["block"] for row in trace.rows for b in row["blocks"] if b["drop"] < -b["slack"]
        }
        assert block in raised
    assert pruned.rises > 0
    assert all(row["objective_formats"] == 0.0 for row in pruned.rows[1:])
    right = run(toy(PRUNED), Settings(gamma=1.0, rho=1.0, tau=0.5, alpha=0.3, dtype="float64"))
    assert right.rows[-1]["objective_formats"] > 0.0
    assert right.rises == 0


def test_a_stale_product_and_a_wrong_proximal_point_are_caught(monkeypatch):
    """Mutants of the sweep: U_i from an older A_i, and V_i solved without its ReLU."""
    problem, settings = toy(TRAINS), Settings(gamma=1.0, rho=1.0, dtype="float64")
    right_pre, right_post = blocks.hidden_pre, blocks.hidden_post
    monkeypatch.setattr(
        blocks, "hidden_pre", lambda V, A, U, **k: right_pre(V, A[::-1].copy(), U, **k)
    )
    assert run(problem, settings, sweeps=3).block_rises > 0
    monkeypatch.setattr(blocks, "hidden_pre", right_pre)

    def without_relu(W, b, U_next, U, *, gamma, rho):
        d = W.shape[1]
        right = rho * (U_next - b) @ W + gamma * U
        V = np.linalg.solve(rho * W.T @ W + gamma * np.eye(d), right.T).T
        return V, V @ W.T + b

    monkeypatch.setattr(blocks, "hidden_post", without_relu)
    assert run(problem, settings, sweeps=3).block_rises > 0
    monkeypatch.setattr(blocks, "hidden_post", right_post)
    assert run(problem, settings, sweeps=3).block_rises == 0


def test_weights_one_percent_too_long_violate_their_constant(monkeypatch):
    problem, settings = toy({}), Settings(gamma=1.0, rho=1.0, dtype="float64")
    right = blocks.affine
    monkeypatch.setattr(blocks, "affine", lambda *a, **k: tuple(1.01 * v for v in right(*a, **k)))
    trace = run(problem, settings, sweeps=10)
    late = {b["block"] for row in trace.rows for b in row["blocks"] if not b["holds"]}
    assert any(block.startswith("W") for block in late)


def random_point(formats, seed=3):
    """A state where nothing is at its minimum and no ReLU at its kink."""
    problem, settings = toy(formats, n=7), Settings(dtype="float64", tau=0.7)
    rng, state = np.random.default_rng(seed), start(toy(formats, n=7), Settings(dtype="float64"))
    moved = {
        n: tuple(v + 0.3 * rng.standard_normal(v.shape) for v in getattr(state, n)) for n in "VUWb"
    }
    state = replace(state, **moved)
    return problem, settings, refreshed(problem, state)


def refreshed(problem, state):
    A = tuple(bcd.affine(problem, i, state.V, state.W[i], state.b[i]) for i in range(4))
    return replace(state, A=A)


def test_the_gradient_matches_differences_of_the_objective():
    problem, settings, state = random_point({2: TRAINS[2], 1: PRUNED[1]})
    arrays = {(n, i): v for n in "VUWb" for i, v in enumerate(getattr(state, n))}

    def put(key, value):
        n, i = key
        values = list(getattr(state, n))
        values[i] = value
        return refreshed(problem, replace(state, **{n: tuple(values)}))

    total, step = 0.0, 1e-5
    for key, array in arrays.items():
        for k in range(array.size):
            values = []
            for sign in (1.0, -1.0):
                moved = array.copy()
                moved.flat[k] += sign * step
                values.append(objective(problem, settings, put(key, moved)).total)
            total += ((values[0] - values[1]) / (2 * step)) ** 2
    pull = settings.tau * (state.C[0] - state.W[0])
    total += float(np.sum(pull[state.C[0] != 0] ** 2))
    total += train_gradient_sq(settings, state)
    assert gradient_norm(problem, settings, state) == pytest.approx(np.sqrt(total), rel=1e-5)
    assert gradient_norm(problem, Settings(tau=0.9, dtype="float64"), state) != pytest.approx(
        np.sqrt(total), rel=1e-5
    )


def train_gradient_sq(settings, state):
    total, step, cores = 0.0, 1e-6, state.C[1].cores
    for j, core in enumerate(cores):
        for k in range(core.size):
            values = []
            for sign in (1.0, -1.0):
                moved = [c.copy() for c in cores]
                moved[j].flat[k] += sign * step
                gap = TTCores(tuple(moved), state.C[1].shape).full() - state.W[1]
                values.append(0.5 * settings.tau * np.sum(gap**2))
            total += ((values[0] - values[1]) / (2 * step)) ** 2
    return total


def test_the_gradient_vanishes_at_a_critical_point():
    problem, settings = toy({}, n=7), Settings(gamma=1.0, rho=1.0, alpha=0.05, dtype="float64")
    trace = run(problem, settings, sweeps=300, blocks=False, gradient_every=50)
    known = [row["gradient"] for row in trace.rows if row["gradient"] is not None]
    assert known[-1] < 0.1 * known[0]


def test_the_shortest_subgradient_at_the_kink():
    from edgesolve.host.bcd_certificate import _shortest

    U, lack = np.zeros(4), np.array([-0.5, 0.5, -3.0, 0.5])
    V = np.array([-1.0, -1.0, -1.0, 2.0])
    # Convex: [lack, lack + 1] holds 0; starts at .5; ends at -2. Concave: the nearer of .5 and -1.5.
    assert np.allclose(np.abs(_shortest(1.0, V, U, lack)), [0.0, 0.5, 2.0, 0.5])


def test_a_trace_counts_rises_and_is_one_json_row_per_sweep(tmp_path):
    problem, settings = toy(TRAINS), Settings(dtype="float64")
    trace = run(problem, settings, sweeps=4)
    trace.write(tmp_path / "trace.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [row["sweep"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[4]["k_min_gradient_sq"] == 4 * min(row["gradient"] for row in rows[1:]) ** 2
    planted = Trace(
        settings, [*trace.rows, {**trace.rows[-1], "objective": rows[-1]["objective"] + 1}]
    )
    assert (trace.rises, planted.rises) == (0, 1)


def test_the_logged_functional_is_another_one():
    problem, settings = toy(TRAINS), Settings(dtype="float64")
    terms = objective(problem, settings, start(problem, settings))
    assert logged_objective(settings, terms) == pytest.approx(terms.total + 4.0 * terms.loss)


def test_a_train_from_scratch_may_lie_further_than_the_old_one():
    """The recorder sees the block, which the sum of all of them would hide."""
    problem, settings, state = random_point(TRAINS)
    for _ in range(20):
        state = sweep(problem, settings, state, {})
    W, old = state.W[1], state.C[1]
    worse = replace(state, C=(None, tt_svd(W + 0.3, (4, 4, 4, 5), 3), state.C[2], None))
    recorder = Recorder(problem, settings)
    recorder("C2", state, worse, 1.0)
    recorder("C2", worse, state, 0.0)
    assert [c.fell for c in recorder.checks] == [False, True]
    assert old.shape == (16, 20)
