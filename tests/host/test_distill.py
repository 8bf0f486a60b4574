"""The head against closed forms, and its held-out figure against what it claims."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from edgesolve.host.adaptable import Preprocess
from edgesolve.host.capture import activations, capture
from edgesolve.host.distill import HeadOptions, distill, solve
from edgesolve.host.errors import DataError, ModelError
from edgesolve.host.network import cuts, trace
from edgesolve.kernels.moments import Moments

PLAIN = Preprocess(1.0, (0.0,) * 3, (1.0,) * 3)


@pytest.fixture(scope="module")
def linear_teacher(nets, scrambled):
    """What is behind the cut is linear in the pooled activation, so a head can be exact."""
    torch.manual_seed(0)
    model = scrambled(nets.Whole(nets.convolution(8, padding=1, stride=2)))
    model.tail.weight.data *= 6
    network = trace(model, (3, 12, 12))
    return network, cuts(network)[-1]


@pytest.fixture(scope="module")
def deep_teacher(nets, scrambled):
    torch.manual_seed(0)
    model = scrambled(
        nn.Sequential(
            nets.convolution(8, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
        )
    )  # fmt: skip
    network = trace(model, (3, 12, 12))
    return network, next(c for c in cuts(network) if c.shape[0] == 8)


@pytest.fixture
def data(frames):
    x = frames(400, (12, 12, 3))
    x = x * np.random.default_rng(1).uniform(0.3, 2.0, (400, 1, 1, 3)).astype(np.float32)
    return x, np.arange(400) % 5 == 0


def test_the_solve_is_least_squares(accepts_only):
    rng = np.random.default_rng(0)
    A = rng.normal(2.0, 1.0, (200, 12)) * rng.uniform(0.5, 3, 12)
    T = A[:, :3] @ rng.normal(size=(3, 4)) + rng.normal(size=(200, 4))
    n, relative = len(A), 0.03
    ridge = relative * A.var(0).mean()
    centred = np.concatenate([A - A.mean(0), np.sqrt(n * ridge) * np.eye(12)])
    U = np.linalg.lstsq(centred, np.concatenate([T - T.mean(0), np.zeros((12, 4))]), rcond=None)[0]
    found = solve(Moments.of(A, T), [0, 6, 12], relative, HeadOptions())

    def equal(weights):
        np.testing.assert_allclose(weights, U, rtol=1e-7, atol=1e-9)

    accepts_only(equal, found.weights)
    np.testing.assert_allclose(found.intercept, T.mean(0) - A.mean(0) @ U, rtol=1e-7)
    assert found.relative_gap <= 1e-10


def test_a_linear_teacher_is_matched(linear_teacher, data):
    network, cut = linear_teacher
    found = distill(network, cut, PLAIN, *data, HeadOptions(n_gates=4, rank=2))
    assert found.agreement >= 0.97 and found.error < 0.1
    assert found.gate_source == "seeded", "no convolution reads this cut"
    assert found.solution.relative_gap <= 1e-6
    assert found.moments.n == 400 and len(found.held_out_logits) == 80
    with pytest.raises(ModelError, match=r"no plain 1×1 or 3×3 convolution reads the cut"):
        distill(network, cut, PLAIN, *data, HeadOptions(gates="teacher", n_gates=4, rank=2))


def test_the_held_out_figures_are_those_of_rows_the_solve_has_not_seen(deep_teacher, data):
    """Everything again by hand: rows, moments of the training fold, lstsq, held-out answers."""
    network, cut = deep_teacher
    x, held_out = data
    found = distill(network, cut, PLAIN, x, held_out, HeadOptions(n_gates=8, rank=3))
    z, logits = activations(network, cut.node, PLAIN, x)
    A, T = found.rows(z).numpy().astype(np.float64), logits.numpy().astype(np.float64)
    fit = ~held_out
    ridge = found.ridge * A[fit].var(0).mean()
    centre, target = A[fit].mean(0), T[fit].mean(0)
    Q = (A[fit] - centre).T @ (A[fit] - centre) / fit.sum() + ridge * np.eye(A.shape[1])
    U = np.linalg.solve(Q, (A[fit] - centre).T @ (T[fit] - target) / fit.sum())
    answers = (A[held_out] - centre) @ U + target
    np.testing.assert_allclose(found.held_out_logits, answers, rtol=1e-3, atol=1e-3)
    expected = (answers.argmax(1) == T[held_out].argmax(1)).mean()
    assert found.agreement == pytest.approx(expected, abs=0.013)
    spread = ((T[held_out] - T[held_out].mean(0)) ** 2).sum(1).mean()
    error = np.sqrt(((answers - T[held_out]) ** 2).sum(1).mean() / spread)
    assert found.error == pytest.approx(error, rel=1e-2)
    assert 0.5 < found.agreement and found.error < 1.0
    assert found.ridge == min(found.path, key=lambda pair: pair[1])[0] and len(found.path) == 7
    assert found.gate_source == "teacher"


def test_gates_help(deep_teacher, data):
    """Against the pooled activation alone, on rows that neither has seen."""
    network, cut = deep_teacher
    found = distill(network, cut, PLAIN, *data, HeadOptions(n_gates=16, rank=4))
    plain = found.rows.starts[found.rows.n_gates]
    kept = found.capture
    small = Moments(
        kept.fit.n, kept.fit.sx[plain:], kept.fit.sxx[plain:, plain:], kept.fit.stx[:, plain:],
        kept.fit.st, kept.fit.stt,
    )  # fmt: skip
    alone = solve(small, [0], found.ridge, HeadOptions())
    answers = kept.rows[:, plain:] @ alone.weights + alone.intercept
    without = ((answers - kept.logits) ** 2).sum()
    assert ((found.held_out_logits - kept.logits) ** 2).sum() < 0.9 * without


@pytest.mark.parametrize("ramps", [1, 2, 3])
def test_the_group_penalty(deep_teacher, data, ramps):
    network, cut = deep_teacher
    options = HeadOptions(n_gates=8, rank=3, ramps=ramps, penalty="group", lam=0.05)
    found = distill(network, cut, PLAIN, *data, options)
    assert found.solution.status.name == "CONVERGED" and found.solution.relative_gap <= 1e-6
    starts = found.rows.starts
    norms = [np.linalg.norm(found.solution.weights[a:b]) for a, b in itertools.pairwise(starts)]
    assert found.rows.n_gates == 8 * ramps < len(norms)
    assert min(norms) == 0.0 < max(norms), "whole gates are switched off"
    ridge = distill(network, cut, PLAIN, *data, dataclasses.replace(options, penalty="ridge"))
    assert np.count_nonzero(ridge.solution.weights == 0.0) == 0


def test_the_same_seed_gives_the_same_head(deep_teacher, data):
    network, cut = deep_teacher
    options = HeadOptions(gates="seeded", n_gates=8, rank=3, seed=5)
    one, two = (distill(network, cut, PLAIN, *data, options) for _ in range(2))
    assert one.solution.weights.tobytes() == two.solution.weights.tobytes()
    assert torch.equal(one.rows.gate_weight, two.rows.gate_weight)
    other = distill(network, cut, PLAIN, *data, dataclasses.replace(options, seed=6))
    assert not torch.equal(one.rows.gate_weight, other.rows.gate_weight)


def test_mirrored_frames_are_added_and_never_held_out(deep_teacher, data):
    network, cut = deep_teacher
    x, held_out = data
    rows = distill(network, cut, PLAIN, x, held_out, HeadOptions(n_gates=8, rank=2)).rows
    seen = []
    found = capture(
        network, cut.node, rows, PLAIN, x, held_out, flip=True,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert found.fit.n == 2 * 320 and found.held_out.n == 80 and seen[-1] == (720, 720)
    twice = np.concatenate([x[~held_out], x[~held_out][:, :, ::-1]])
    z, logits = activations(network, cut.node, PLAIN, twice)
    expected = Moments.of(rows(z).numpy(), logits.numpy())
    np.testing.assert_allclose(found.fit.sxx, expected.sxx, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.fit.stx, expected.stx, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(found.index, np.flatnonzero(held_out))


def test_outputs_that_are_not_finite_are_refused(deep_teacher, data):
    network, cut = deep_teacher
    huge = Preprocess(1e30, (0.0,) * 3, (1e-10,) * 3)
    with pytest.raises(DataError, match="NaN or inf on the calibration data; check --scale"):
        distill(network, cut, huge, *data, HeadOptions(n_gates=8, rank=2))
