from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edgesolve.kernels.losses import SquaredMoments
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.online import Online
from edgesolve.kernels.penalties import GroupL2, lam_max
from edgesolve.kernels.solution import Status
from edgesolve.kernels.solve import solve

STARTS = np.arange(5) * 3
D = 12


def batch(rng, k, c=3):
    x = rng.standard_normal((k, D)) + 0.5
    return x, x[:, :c] + 0.5 * rng.standard_normal((k, c))


def penalty_for(loss):
    return GroupL2(0.1 * lam_max(loss, GroupL2(1.0, STARTS)), STARTS)


class Rows:
    """The rows themselves with their weights: what `Online` has to agree with."""

    def __init__(self, x, t):
        self.x, self.t, self.w = x, t, np.ones(len(x))

    def solve(self, ridge=0.0):
        x, t, w = self.x, self.t, self.w / self.w.sum()
        xc, tc = x - w @ x, t - w @ t
        Q, q = (xc.T * w) @ xc, (xc.T * w) @ tc
        y2 = float(np.sum(w[:, None] * tc * tc))
        loss = SquaredMoments(Q, q, y2, ridge, w @ x, w @ t)
        return loss, solve(loss, penalty_for(loss), tol=1e-10)


def agrees(online, rows, accepts_only, ridge=0.0):
    loss, slow = rows.solve(ridge)
    online, found = online.solve(penalty_for(loss), ridge, tol=1e-10)
    assert found.status is Status.CONVERGED and found.relative_gap <= 1e-10
    assert_allclose(found.objective, slow.objective, rtol=1e-8)
    assert_allclose(found.intercept, slow.intercept, rtol=1e-4, atol=1e-4)
    close = 1e-4 * np.abs(slow.weights).max()
    accepts_only(lambda got: assert_allclose(got, slow.weights, atol=close), found.weights)
    assert_array_equal(online.weights, found.weights)
    return online


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_equals_the_batch(seed, accepts_only):
    rng = np.random.default_rng(seed)
    x, t = batch(rng, 40)
    rows, online = Rows(x, t), Online(Moments.of(x, t))
    names = ["add", "remove", "decay", "add_class", "remove_class", "solve"]
    for name in [*rng.permutation(names), *rng.choice(names, 4)]:
        c = rows.t.shape[1]
        if name == "add":
            x, t = batch(rng, int(rng.integers(1, 9)), D)
            t = t[:, :c] if c <= D else np.hstack([t, t])[:, :c]
            online = online.add(x, t)
            rows.x, rows.t = np.vstack([rows.x, x]), np.vstack([rows.t, t])
            rows.w = np.append(rows.w, np.ones(len(x)))
        elif name == "remove":
            new = np.flatnonzero(rows.w == 1.0)[:5]  # decayed rows are removed at their weight
            if not len(new):
                continue
            online = online.remove(rows.x[new], rows.t[new])
            rows.x, rows.t, rows.w = (np.delete(a, new, axis=0) for a in (rows.x, rows.t, rows.w))
        elif name == "decay":
            online, rows.w = online.decay(0.7), 0.7 * rows.w
        elif name == "add_class":
            value = float(rng.choice([0.0, 1.0]))
            online = online.add_class(value)
            rows.t = np.hstack([rows.t, np.full((len(rows.t), 1), value)])
            x, t = batch(rng, 6, c + 1)
            online = online.add(x, t)
            rows.x, rows.t = np.vstack([rows.x, x]), np.vstack([rows.t, t])
            rows.w = np.append(rows.w, np.ones(6))
        elif name == "remove_class" and c > 1:
            k = int(rng.integers(c))
            online = online.remove_class(k, float(rows.w @ rows.t[:, k] ** 2))
            rows.t = np.delete(rows.t, k, axis=1)
        elif name == "solve":
            online = agrees(online, rows, accepts_only)
    agrees(online, rows, accepts_only, ridge=0.05)


def test_adding_and_removing_leaves_what_was(rng):
    x, t = batch(rng, 30)
    more = batch(rng, 5)
    online = Online(Moments.of(x, t))
    back = online.add(*more).remove(*more)
    for name in ("n", "sx", "sxx", "stx", "st", "stt"):
        assert_allclose(
            getattr(back.moments, name), getattr(online.moments, name), rtol=1e-10, atol=1e-10
        )


def test_nothing_is_written_to(rng):
    x, t = batch(rng, 30)
    online = Online(Moments.of(x, t))
    online, _ = online.solve(GroupL2(0.01, STARTS))
    kept = {k: np.copy(getattr(online.moments, k)) for k in ("n", "sx", "sxx", "stx", "st", "stt")}
    weights = online.weights.copy()
    online.add(*batch(rng, 3))
    online.remove(x[:3], t[:3])
    online.decay(0.5)
    online.add_class(1.0)
    online.remove_class(0, float(np.sum(t[:, 0] ** 2)))
    online.solve(GroupL2(0.2, STARTS))
    assert_array_equal(online.weights, weights)
    for name, value in kept.items():
        assert_array_equal(getattr(online.moments, name), value)


def test_warm_weights_need_a_round_or_two(rng):
    x, t = batch(rng, 200)
    online, penalty = Online(Moments.of(x, t)), GroupL2(0.05, STARTS)
    online, first = online.solve(penalty)
    again = online.add(*batch(rng, 4))
    _, warm = again.solve(penalty)
    _, cold = replace(again, weights=None).solve(penalty)
    assert warm.n_iter <= 2 and first.status is Status.CONVERGED
    assert_allclose(warm.objective, cold.objective, rtol=1e-6)
    assert online.solve(penalty)[1].n_iter == 0


def test_classes_follow_in_the_weights(rng):
    x, t = batch(rng, 30)
    online, _ = Online(Moments.of(x, t)).solve(GroupL2(0.01, STARTS))
    grown = online.add_class(0.0)
    assert grown.weights.shape == (D, 4) and not grown.weights[:, 3].any()
    assert grown.moments.c == 4
    same = grown.remove_class(3, 0.0)
    assert_array_equal(same.weights, online.weights)
    assert_array_equal(same.moments.stx, online.moments.stx)
    assert Online(online.moments).add_class().weights is None
    assert Online(online.moments).remove_class(0, 0.0).weights is None


def test_a_class_that_is_constant_needs_no_weights(rng):
    x, t = batch(rng, 30)
    grown = Online(Moments.of(x, t)).add_class(1.0)
    _, found = grown.solve(GroupL2(0.01, STARTS), tol=1e-10)
    assert_allclose(found.weights[:, 3], 0, atol=1e-8)
    assert_allclose(found.intercept[3], 1.0)


def test_weights_stay_where_the_moments_are_not_finite(rng):
    x, t = batch(rng, 30)
    online, _ = Online(Moments.of(x, t)).solve(GroupL2(0.01, STARTS))
    m = online.moments
    spoilt = replace(online, moments=replace(m, stx=np.nan * m.stx))
    with pytest.raises(ValueError, match="NaN or inf"):
        spoilt.solve(GroupL2(0.01, STARTS))


def test_errors(rng):
    x, t = batch(rng, 10)
    online = Online(Moments.of(x, t))
    bad = [
        ("factor must lie in", lambda: online.decay(0.0)),
        ("factor must lie in", lambda: online.decay(1.1)),
        ("factor must lie in", lambda: online.decay(np.nan)),
        ("there are 3 classes", lambda: online.remove_class(3, 0.0)),
        ("there are 3 classes", lambda: online.remove_class(-1, 0.0)),
        ("squares must lie in", lambda: online.remove_class(0, -1.0)),
        ("squares must lie in", lambda: online.remove_class(0, 1e9)),
        ("squares must lie in", lambda: online.remove_class(0, np.nan)),
        ("one must stay", lambda: Online(Moments.of(x, t[:, :1])).remove_class(0, 0.0)),
        ("cannot meet", lambda: online.add(x, t[:, :2])),
        ("cannot meet", lambda: online.add(x[:, :4], t)),
        ("no rows", lambda: online.add(x[:0], t[:0])),
        ("not finite", lambda: online.add(np.nan * x, t)),
        ("never part", lambda: online.remove(*batch(rng, 20))),
        ("starts must end at D = 12", lambda: online.solve(GroupL2(0.1, [0, 3]))),
        ("budgets must be positive", lambda: online.solve(GroupL2(0.1, STARTS), seconds=0)),
        ("target must be finite", lambda: online.add_class(np.nan)),
        ("ridge must be", lambda: online.solve(GroupL2(0.1, STARTS), -1.0)),
    ]
    for message, call in bad:
        with pytest.raises(ValueError, match=message):
            call()
