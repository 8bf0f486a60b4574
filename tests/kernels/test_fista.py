import time

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels.designs import Pooled
from edgesolve.kernels.fista import fista, next_momentum
from edgesolve.kernels.gated import gated_pool
from edgesolve.kernels.losses import SquaredMoments, SquaredRows
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.penalties import GroupL2, lam_max
from edgesolve.kernels.solution import Status

RAGGED = np.array([0, 1, 4, 9, 12, 20])


def rows(rng, n=120, d=20, c=3):
    x = rng.standard_normal((n, d)) + 1.0
    truth = rng.standard_normal((d, c))
    truth[4:12] = 0
    return x, x @ truth + rng.standard_normal((n, c)) + 4.0


def variational(x, y, penalty, ridge):
    """The same program by another road: lam w ||u|| = min_t (lam w/2)(||u||^2/t + t), t > 0.

    Smooth in one t per group; each value is a ridge solve, and L-BFGS-B moves t. No prox, no
    momentum, no code of ours (convex.md, section 2).
    """
    n, xc, yc = len(x), x - x.mean(0), y - y.mean(0)
    lam, sizes = penalty.lam * penalty.weights, np.diff(penalty.starts)
    starts = penalty.starts

    def solve(t):
        scale = np.repeat(np.sqrt(t / lam), sizes)
        b = xc * scale
        H = b.T @ b / n + np.diag(ridge * scale**2) + np.eye(len(scale))
        return scale[:, None] * np.linalg.solve(H, b.T @ yc / n)

    def h(t):
        U = solve(t)
        V = xc.T @ (yc - xc @ U) / n - ridge * U
        size = np.array([np.sum(v * v) for v in np.split(V, starts[1:-1])])
        fit = np.vdot(yc, yc - xc @ U) / (2 * n)
        return fit + lam @ t / 2, lam / 2 - size / (2 * lam)

    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-11}
    bounds = [(0, None)] * len(sizes)
    optimize = pytest.importorskip("scipy.optimize", reason="no SciPy on a device")
    return solve(
        optimize.minimize(h, np.ones(len(sizes)), jac=True, bounds=bounds, options=options).x
    )


def test_without_penalty_it_is_least_squares(rng, twin, accepts_only):
    x, t = rows(rng)
    s = fista(SquaredMoments.of(Moments.of(x, t), 0.0), GroupL2(0.0, RAGGED), tol=1e-11)
    slow = np.linalg.lstsq(np.c_[x, np.ones(len(x))], t)[0]
    accepts_only(lambda got: assert_allclose(got, slow[:-1], rtol=1e-7, atol=1e-8), s.weights)
    assert_allclose(s.intercept, slow[-1], rtol=1e-7)
    assert s.status is Status.CONVERGED and s.kkt <= 1e-11 and s.relative_gap < 1e-12


@pytest.mark.parametrize("weights", [None, np.array([1.0, 2.0, 0.5, 1.0, 3.0])])
@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("share", [0.3, 0.03])
def test_group_lasso_is_that_of_the_variational_form(
    rng, twin, accepts_only, share, ridge, weights
):
    x, t = rows(rng)
    loss = SquaredMoments.of(Moments.of(x, t), ridge)
    top = lam_max(loss, GroupL2(1.0, RAGGED, weights))
    penalty = GroupL2(share * top, RAGGED, weights)
    s = fista(loss, penalty, tol=1e-10)
    slow = variational(x, t, penalty, ridge)
    assert s.status is Status.CONVERGED and s.kkt <= 1e-10 and s.relative_gap < 1e-6
    assert_allclose(s.objective, loss.value(slow) + penalty.value(slow), rtol=1e-9)
    close = 1e-4 * np.abs(slow).max()
    accepts_only(lambda got: assert_allclose(got, slow, rtol=1e-3, atol=close), s.weights)


def test_group_lasso_is_celers(rng, accepts_only):
    celer = pytest.importorskip("celer")
    x, t = rows(rng, c=1)
    loss = SquaredMoments.of(Moments.of(x, t), 0.0)
    starts = np.arange(0, 21, 5)
    penalty = GroupL2(0.1 * lam_max(loss, GroupL2(1.0, starts)), starts)
    peer = celer.GroupLasso(groups=5, alpha=penalty.lam, fit_intercept=False, tol=1e-12)
    peer.fit(x - x.mean(0), (t - t.mean(0)).ravel())
    s = fista(loss, penalty, tol=1e-10)
    coef = peer.coef_[:, None]
    accepts_only(lambda got: assert_allclose(got, coef, rtol=1e-6, atol=1e-7), s.weights)


def test_zero_from_lam_max_on_and_some_groups_below(rng, twin):
    loss = SquaredMoments.of(Moments.of(*rows(rng)), 0.0)
    top = lam_max(loss, GroupL2(1.0, RAGGED))
    above = fista(loss, GroupL2(1.0001 * top, RAGGED))
    assert above.status is Status.CONVERGED and not above.weights.any()
    assert above.relative_gap <= 1e-15
    below = fista(loss, GroupL2(0.5 * top, RAGGED))
    groups = [part.any() for part in np.split(below.weights, RAGGED[1:-1])]
    assert any(groups) and not all(groups)


def test_rows_and_moments_lead_to_the_same_point(rng, twin):
    n, p, r, m, c = 90, 3, 4, 6, 2
    z = (rng.standard_normal((n, p, r)) + 0.5).astype(np.float32)
    D = rng.random((n, p, m)) < 0.5
    A = gated_pool(z.astype(np.float64), D)
    t = A @ rng.standard_normal((m * r, c)) + rng.standard_normal((n, c))
    from_rows = SquaredRows.of(Pooled(z, D), t, 0.01)
    from_moments = SquaredMoments.of(Moments.of(A, t), 0.01)
    starts = np.arange(m + 1) * r
    penalty = GroupL2(0.1 * lam_max(from_moments, GroupL2(1.0, starts)), starts)
    a, b = (fista(loss, penalty, tol=1e-10) for loss in (from_rows, from_moments))
    assert a.status is b.status is Status.CONVERGED
    assert_allclose(a.weights, b.weights, rtol=1e-6, atol=1e-8)
    assert_allclose(a.intercept, b.intercept, rtol=1e-6)
    assert a.relative_gap < 1e-8


def test_it_is_accelerated(rng):
    """P(U_k) - P* <= 2 L ||U_0 - U*||^2 / (k + 1)^2, which plain proximal steps break."""
    k = 1000
    x = rng.standard_normal((60, 2)) * [1.0, (2 * k) ** -0.5]
    t = x @ np.array([[0.0], [1.0]])  # all in the direction that is worst for k plain steps
    loss, penalty = SquaredMoments.of(Moments.of(x, t), 0.0), GroupL2(0.0, [0, 2])
    seen = []
    fista(loss, penalty, tol=0.0, max_iter=k, callback=lambda n, U, P, kkt: seen.append((n, P)))
    L = loss.lipschitz()
    assert len(seen) > 50
    assert all(objective <= 2 * L / (n + 1) ** 2 + 1e-12 for n, objective in seen[1:])
    U = np.zeros(loss.shape)
    for _ in range(k):
        U = U - loss.grad(U) / L
    assert loss.value(U) > 10 * 2 * L / (k + 1) ** 2


def test_momentum_law():
    def obeys(step):
        t = 1.0
        for _ in range(1000):
            s = step(t)
            assert s * s - s <= t * t * (1 + 1e-12)
            t = s

    obeys(next_momentum)
    with pytest.raises(AssertionError):
        obeys(lambda t: 1.0 + np.sqrt(1.0 + 4.0 * t * t) / 2.0)  # scnn's


def test_the_best_point_is_returned_even_if_the_steps_diverge(rng):
    loss = SquaredMoments.of(Moments.of(*rows(rng)), 0.0)

    class TooLong:
        shape, ridge, mean_t = loss.shape, 0.0, loss.mean_t
        value, grad, residual, intercept = loss.value, loss.grad, loss.residual, loss.intercept

        def lipschitz(self):
            return 0.2 * loss.lipschitz()

    seen = []
    s = fista(
        TooLong(), GroupL2(1e-3, RAGGED), max_iter=40, callback=lambda n, U, P, kkt: seen.append(P)
    )
    assert s.objective == min(seen) < seen[-1]


def test_a_warm_start_never_ends_higher(rng, twin):
    loss = SquaredMoments.of(Moments.of(*rows(rng)), 0.0)
    penalty = GroupL2(0.05 * lam_max(loss, GroupL2(1.0, RAGGED)), RAGGED)
    best = fista(loss, penalty, tol=1e-12)
    for noise in (0.0, 1e-9, 1e-3, 1.0):
        U0 = best.weights + noise * rng.standard_normal(loss.shape)
        kept = U0.copy()
        begin = loss.value(U0) + penalty.value(U0)
        for budget in ({"max_iter": 1}, {"max_iter": 7}, {"seconds": 0.0}, {}):
            assert fista(loss, penalty, U0, tol=1e-9, **budget).objective <= begin
        assert np.array_equal(U0, kept)
    assert fista(loss, penalty, best.weights, tol=1e-9).n_iter == 0


def test_every_figure_is_that_of_the_point_returned(rng):
    loss = SquaredMoments.of(Moments.of(*rows(rng)), 0.0)
    penalty = GroupL2(0.05 * lam_max(loss, GroupL2(1.0, RAGGED)), RAGGED)
    for max_iter in (1, 13, 2000):
        s = fista(loss, penalty, max_iter=max_iter)
        grad0 = np.linalg.norm(loss.grad(np.zeros(loss.shape)))
        kkt = penalty.kkt(s.weights, loss.grad(s.weights)) / grad0
        assert_allclose(s.kkt, kkt, rtol=1e-9)
        assert_allclose(s.objective, loss.value(s.weights) + penalty.value(s.weights))
        assert (s.status is Status.CONVERGED) == (kkt <= 1e-8) == (max_iter == 2000)
        assert (s.status is Status.MAX_ITER) == (s.n_iter == max_iter)


def test_tolerance_is_free_of_units(rng):
    x, t = rows(rng)
    counts = []
    for scale in (1.0, 1024.0):
        loss = SquaredMoments.of(Moments.of(x, scale * t), 0.0)
        s = fista(loss, GroupL2(0.1 * lam_max(loss, GroupL2(1.0, RAGGED)), RAGGED))
        counts.append((s.n_iter, s.status))
    assert counts[0] == counts[1]


def test_time_runs_out(rng):
    loss = SquaredMoments.of(Moments.of(*rows(rng)), 0.0)
    began = time.perf_counter()
    s = fista(loss, GroupL2(1e-3, RAGGED), tol=0.0, max_iter=10**9, seconds=0.05)
    assert s.status is Status.OUT_OF_TIME
    assert 0.05 <= s.seconds <= time.perf_counter() - began < 5
    assert s.objective < loss.value(np.zeros(loss.shape))


def test_what_is_not_finite_is_said(rng, twin):
    m = Moments.of(*rows(rng))
    stx = m.stx.copy()
    stx[0, 0] = np.nan
    loss = SquaredMoments.of(Moments(m.n, m.sx, m.sxx, stx, m.st, m.stt), 0.0)
    s = fista(loss, GroupL2(0.1, RAGGED))
    assert s.status is Status.NOT_FINITE and np.isfinite(s.weights).all()


def test_features_without_variance_leave_the_mean(rng, twin):
    t = rng.standard_normal((30, 2))
    s = fista(SquaredMoments.of(Moments.of(np.ones((30, 20)), t), 0.0), GroupL2(0.1, RAGGED))
    assert s.status is Status.CONVERGED and not s.weights.any()
    assert_allclose(s.intercept, t.mean(0))


def test_errors(rng):
    loss = SquaredMoments.of(Moments.of(*rows(rng)), 0.0)
    with pytest.raises(ValueError, match=r"U0 must be \(20, 3\)"):
        fista(loss, GroupL2(0.1, RAGGED), np.zeros((3, 20)))
