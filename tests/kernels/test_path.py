import time

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels import path as module
from edgesolve.kernels.designs import Explicit
from edgesolve.kernels.losses import SquaredMoments, SquaredRows
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.path import grid, path
from edgesolve.kernels.penalties import GroupL2, Nuclear, lam_max
from edgesolve.kernels.solution import Status
from edgesolve.kernels.solve import solve

STARTS = np.arange(6) * 3


def problem(rng, n=40, c=2):
    x = rng.standard_normal((n, 15)) + 0.5
    t = x[:, :3] @ rng.standard_normal((3, c)) + rng.standard_normal((n, c))
    return SquaredMoments.of(Moments.of(x, t), 0.0), SquaredRows.of(Explicit(x, STARTS), t, 0.0)


def test_the_grid_falls_geometrically():
    lams = grid(2.0, 5, 0.01)
    assert lams[0] == 2.0 and lams[-1] == pytest.approx(0.02)
    assert_allclose(lams[1:] / lams[:-1], 0.01**0.25)
    assert len(grid(1.0)) == 20


@pytest.mark.parametrize("kind", [0, 1], ids=["moments", "rows"])
def test_every_point_is_the_cold_optimum(rng, kind):
    loss = problem(rng)[kind]
    penalty = GroupL2(1.0, STARTS, np.linspace(0.5, 2.0, 5))
    lams = grid(lam_max(loss, penalty), 6, 0.01)
    found = list(path(loss, penalty, lams, tol=1e-9))
    assert len(found) == 6 and not found[0].weights.any()
    gates = []
    for lam, s in zip(lams, found, strict=True):
        here = GroupL2(lam, STARTS, penalty.weights)
        cold = solve(loss, here, tol=1e-9)
        assert s.status is Status.CONVERGED and s.relative_gap <= 1e-9
        assert_allclose(s.objective, cold.objective, rtol=1e-8)
        assert_allclose(s.objective, loss.value(s.weights) + here.value(s.weights), rtol=1e-10)
        gates.append(int((here.norms(s.weights) > 0).sum()))
    assert gates[0] == 0 and gates[-1] == max(gates) > 0
    # The penalised optimum is concave and rises with lam, and the fit falls with it.
    assert (np.diff([s.objective for s in found]) < 0).all()
    assert (np.diff([loss.value(s.weights) for s in found]) <= 1e-9).all()


def test_the_default_grid_starts_at_lam_max(rng):
    loss = problem(rng)[0]
    found = list(path(loss, GroupL2(123.0, STARTS)))
    assert len(found) == 20 and not found[0].weights.any() and found[2].weights.any()


def test_points_are_warm_started(rng, monkeypatch):
    loss, seen = problem(rng)[0], []

    def spy(loss, penalty, U0, **options):
        seen.append((penalty.lam, U0))
        return solve(loss, penalty, U0, **options)

    monkeypatch.setattr(module, "solve", spy)
    found = list(path(loss, GroupL2(1.0, STARTS), method="newton"))
    lams = [lam for lam, _ in seen]
    assert (np.diff(lams) < 0).all() and seen[0][1] is None and seen[1][1] is None
    assert seen[3][1] is found[2].weights


def test_any_penalty_and_any_order(rng):
    loss = problem(rng)[0]
    top = lam_max(loss, Nuclear(1.0, STARTS))
    up, down = (
        list(path(loss, Nuclear(1.0, STARTS), lams, tol=1e-7))
        for lams in (np.array([0.1, 0.5]) * top, np.array([0.5, 0.1]) * top)
    )
    for a, b in zip(up, reversed(down), strict=True):
        assert_allclose(a.objective, b.objective, rtol=1e-6)


def test_seconds_end_the_path(rng, monkeypatch):
    loss = problem(rng)[0]

    def slow(*args, **options):
        assert options["seconds"] > 0
        time.sleep(0.05)
        return solve(*args, **options)

    monkeypatch.setattr(module, "solve", slow)
    found = list(path(loss, GroupL2(1.0, STARTS), seconds=0.12))
    assert 1 <= len(found) <= 3
    assert list(path(loss, GroupL2(1.0, STARTS), seconds=1e-9)) == []


def test_it_yields_as_it_goes(rng):
    loss = problem(rng)[0]
    points = path(loss, GroupL2(1.0, STARTS), tol=1e-3)
    assert next(points).objective > next(points).objective > 0


def test_errors(rng):
    loss, penalty = problem(rng)[0], GroupL2(1.0, STARTS)
    for options in ({"top": 0.0}, {"top": -1.0}, {"top": np.nan}, {"top": np.inf}):
        with pytest.raises(ValueError, match="starts at lam_max > 0"):
            grid(**options)
    for points, ratio in ((1, 0.1), (0, 0.1), (5, 0.0), (5, 1.0), (5, 2.0), (5, np.nan)):
        with pytest.raises(ValueError, match="2 points or more and 0 < ratio < 1"):
            grid(1.0, points, ratio)
    flat = SquaredMoments.of(Moments.of(rng.standard_normal((9, 15)), np.zeros((9, 1))), 0.0)
    with pytest.raises(ValueError, match="do the targets vary"):
        next(path(flat, penalty))
    for lams in ([-0.1], [np.nan], [np.inf]):
        with pytest.raises(ValueError, match="lam must be finite and not negative"):
            next(path(loss, penalty, lams))
    with pytest.raises(ValueError, match="method must be"):
        next(path(loss, penalty, method="adam"))
