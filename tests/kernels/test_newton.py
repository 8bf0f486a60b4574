"""What `newton` and `variational` have in common: the same program, the same promises."""

import time
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edgesolve.kernels.designs import Explicit, Masked, Pooled
from edgesolve.kernels.fista import fista
from edgesolve.kernels.losses import SquaredMoments, SquaredRows
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.newton import newton
from edgesolve.kernels.penalties import GroupL2, Nuclear, lam_max
from edgesolve.kernels.solution import Status
from edgesolve.kernels.variational import variational

SOLVERS = {"newton": newton, "variational": variational}


@pytest.fixture(params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]


def targets(rng, A, c):
    truth = rng.standard_normal((A.shape[1], c))
    truth[A.shape[1] // 2 :] = 0
    return A @ truth + 0.5 * rng.standard_normal((len(A), c)) + 4.0


def problem(rng, design, A, *, c=2, ridge=0.0, intercept=True, share=0.1, weights=True):
    """(loss from rows, penalty at a share of lam_max, targets)."""
    t = targets(rng, A, c)
    loss = SquaredRows.of(design, t, ridge, intercept=intercept)
    w = np.linspace(0.5, 2.0, len(design.starts) - 1) if weights else None
    penalty = GroupL2(share * lam_max(loss, GroupL2(1.0, design.starts, w)), design.starts, w)
    return loss, penalty, t


def small(rng, designs, **options):
    design, A = designs["masked"](rng, 30, np.float64)
    loss, penalty, _ = problem(rng, design, A, **options)
    return loss, penalty


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("ridge, intercept", [(0.0, True), (0.05, True), (0.05, False)])
def test_all_solvers_reach_one_optimum(
    rng, make_design, referee, accepts_only, ridge, intercept, c
):
    design, A = make_design(rng, 36, np.float64)
    loss, penalty, t = problem(rng, design, A, c=c, ridge=ridge, intercept=intercept)
    judge = referee(A, t, penalty, ridge, intercept)
    losses = [(newton, loss), (variational, loss)]
    if intercept:
        losses.append((newton, SquaredMoments.of(Moments.of(A, t), ridge)))
    best = fista(losses[-1][1], penalty, tol=1e-11, max_iter=4000)
    close = 1e-5 * np.abs(best.weights).max()
    for solve, same in losses:
        s = solve(same, penalty, tol=1e-11)
        assert s.status is Status.CONVERGED and s.relative_gap <= 1e-11
        assert_allclose(s.objective, best.objective, rtol=1e-8)
        assert_allclose(s.objective, judge.objective(s.weights), rtol=1e-11)
        assert_allclose(s.intercept, best.intercept, rtol=1e-5, atol=1e-5)
        accepts_only(lambda got: assert_allclose(got, best.weights, atol=close), s.weights)
    off = judge.norms(best.weights) == 0
    assert_array_equal(judge.norms(newton(loss, penalty, tol=1e-11).weights) == 0, off)


def test_the_twins_agree(rng, twin, solver, make_design):
    design, A = make_design(rng, 30, np.float32)
    loss, penalty, _ = problem(rng, design, A)
    best = fista(loss, penalty, tol=1e-10, max_iter=4000)
    s = solver(loss, penalty, tol=1e-9)
    assert s.status is Status.CONVERGED
    assert_allclose(s.objective, best.objective, rtol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_the_certificate_is_that_of_the_point_returned(rng, designs, solver, referee, ridge):
    design, A = designs["masked"](rng, 30, np.float64)
    loss, penalty, t = problem(rng, design, A, ridge=ridge, share=0.03)
    judge = referee(A, t, penalty, ridge, True)
    best = fista(loss, penalty, tol=1e-12, max_iter=4000).objective
    for max_iter in (0, 1, 2, 60):
        s = solver(loss, penalty, tol=1e-8, max_iter=max_iter)
        P, gap = judge.objective(s.weights), judge.gap(s.weights)
        assert_allclose(s.objective, P, rtol=1e-11)
        assert_allclose(s.relative_gap, gap / P, rtol=1e-4, atol=1e-11)
        assert s.relative_gap * P >= P - best - 1e-12
        assert (s.status is Status.CONVERGED) == (s.relative_gap <= 1e-8)
        grad0 = np.linalg.norm(loss.grad(np.zeros(loss.shape)))
        kkt = penalty.kkt(s.weights, loss.grad(s.weights)) / grad0
        assert_allclose(s.kkt, kkt, rtol=1e-6, atol=1e-15)
        mean = (t - A @ s.weights).mean(axis=0)
        assert_allclose(s.intercept, mean, rtol=1e-9)
    assert s.status is Status.CONVERGED


def test_zero_from_lam_max_on(rng, make_design, solver):
    design, A = make_design(rng, 25, np.float64)
    for ridge in (0.0, 0.05):
        for share in (1.0 + 1e-12, 1.1, 1e6):
            loss, penalty, t = problem(rng, design, A, ridge=ridge, share=share)
            s = solver(loss, penalty)
            assert s.status is Status.CONVERGED and not s.weights.any()
            assert 0 <= s.relative_gap <= 1e-15
            assert_allclose(s.intercept, t.mean(axis=0))
        below, penalty, _ = problem(rng, design, A, ridge=ridge, share=0.9)
        assert solver(below, penalty).weights.any()


def test_a_tiny_lam_is_nearly_least_squares(rng, designs, solver, referee):
    design, A = designs["masked"](rng, 80, np.float64)
    loss, penalty, t = problem(rng, design, A, share=1e-6)
    judge = referee(A, t, penalty, 0.0, True)
    s = solver(loss, penalty)
    slow = np.linalg.lstsq(np.c_[A, np.ones(len(A))], t)[0][:-1]
    assert s.objective <= judge.objective(slow) * (1 + 1e-6)
    assert_allclose(s.relative_gap, judge.gap(s.weights) / s.objective, rtol=1e-3, atol=1e-9)
    fit, least = (
        np.sum((judge.Y - judge.A @ s.weights) ** 2),
        np.sum((judge.Y - judge.A @ slow) ** 2),
    )
    assert least <= fit * (1 + 1e-12) and fit <= least * 1.001


def shapes(rng):
    """name: (X, D, t), none of which a solver may stumble over."""
    n, d, m = 24, 4, 5
    x = rng.standard_normal((n, d)) + 0.3
    D = x @ rng.standard_normal((d, m)) >= 0
    D[:, 0] = True
    t = x[:, :2] + rng.standard_normal((n, 2))
    mixed = x * [1e6, 1e-6, 1.0, 1e3]
    low = x[:, :2] @ rng.standard_normal((2, d))
    return {
        "one gate": (x, D[:, :1], t),
        "one output": (x, D, t[:, :1]),
        "one input": (x[:, :1], D, t),
        "one row": (x[:1], D[:1], t[:1]),
        "two rows": (x[:2], D[:2], t[:2]),
        "constant features": (np.ones((n, d)), D, t),
        "a constant feature": (np.c_[x[:, :3], np.ones(n)], D, t),
        "zero features": (np.zeros((n, d)), D, t),
        "duplicated features": (x[:, [0, 0, 1, 1]], D, t),
        "duplicated gates": (x, D[:, [0, 1, 1, 2, 2]], t),
        "rank deficient": (low, D, t),
        "closed gates": (x, D & (np.arange(m) < 2), t),
        "huge features": (1e6 * x, D, t),
        "tiny features": (1e-6 * x, D, t),
        "mixed scales": (mixed, D, t),
        "huge targets": (x, D, 1e6 * t),
        "tiny targets": (x, D, 1e-6 * t),
        "constant targets": (x, D, np.full((n, 2), 3.0)),
        "zero targets": (x, D, np.zeros((n, 2))),
        "a perfect fit": (x, D, np.c_[x[:, 0], x[:, 1]]),
    }


@pytest.mark.parametrize("name", shapes(np.random.default_rng(0)))
def test_degenerate_data_ends_with_an_honest_sentence(rng, referee, name):
    X, D, t = shapes(rng)[name]
    A = (D[:, :, None] * X[:, None]).reshape(len(X), -1)
    for ridge in (0.0, 0.05):
        rows = SquaredRows.of(Masked(X, D), t, ridge)
        starts = rows.design.starts
        penalty = GroupL2(0.05 * lam_max(rows, GroupL2(1.0, starts)) or 0.1, starts)
        judge = referee(A, t, penalty, ridge, True)
        moments = SquaredMoments.of(Moments.of(A, t), ridge)
        for solve, loss in ((newton, rows), (variational, rows), (newton, moments)):
            for U0 in (None, np.ones(loss.shape)):
                s = solve(loss, penalty, U0)
                P, gap = judge.objective(s.weights), judge.gap(s.weights)
                scale = max(P, 1e-9 * judge.objective(0 * s.weights), 1e-15)
                assert s.status is Status.CONVERGED, (solve, s)
                assert s.relative_gap <= 1e-6 and gap <= 1e-5 * scale
                assert_allclose(s.objective, P, rtol=1e-6, atol=1e-12)


def test_identical_gates_of_one_input_are_left_honest(rng, referee):
    """Blocks without curvature, many of them copies: the worst case of the preconditioner."""
    x = rng.standard_normal((15, 1)) + 0.3
    D = x @ rng.standard_normal((1, 30)) >= 0
    t = 0.3 * x + rng.standard_normal((15, 1))
    loss = SquaredRows.of(Masked(x, D), t, 0.0)
    w = rng.uniform(0.5, 2.0, 30)
    penalty = GroupL2(0.05 * lam_max(loss, GroupL2(1.0, np.arange(31), w)), np.arange(31), w)
    judge = referee(D * x, t, penalty, 0.0, True)
    best = variational(loss, penalty)
    s = newton(loss, penalty, max_iter=10)
    assert best.status is Status.CONVERGED and s.status in (Status.CONVERGED, Status.MAX_ITER)
    for one in (best, s):
        assert_allclose(
            one.relative_gap, judge.gap(one.weights) / one.objective, rtol=1e-6, atol=1e-9
        )
    assert best.objective * (1 - 1e-6) <= s.objective <= judge.objective(0 * s.weights)


def test_float32_rows_are_taken_as_they_are(rng, make_design, solver, referee):
    design, A = make_design(rng, 30, np.float32)
    loss, penalty, t = problem(rng, design, A)
    s = solver(loss, penalty, tol=1e-9)
    judge = referee(A, t, penalty, 0.0, True)
    assert s.status is Status.CONVERGED and s.weights.dtype == np.float64
    assert_allclose(s.objective, judge.objective(s.weights), rtol=1e-11)
    assert judge.gap(s.weights) <= 1e-8 * s.objective


def test_two_runs_are_the_same_to_the_last_bit(rng, make_design, solver):
    design, A = make_design(rng, 30, np.float64)
    loss, penalty, _ = problem(rng, design, A, ridge=0.01)
    first, second = (solver(loss, penalty) for _ in range(2))
    assert_array_equal(first.weights, second.weights)
    assert (first.objective, first.relative_gap, first.n_iter) == (
        second.objective,
        second.relative_gap,
        second.n_iter,
    )


def test_a_warm_start_never_ends_higher(rng, designs, solver):
    loss, penalty = small(rng, designs, share=0.03)
    best = solver(loss, penalty, tol=1e-10)
    for noise in (0.0, 1e-6, 1e-2, 1.0, 1e3):
        U0 = best.weights + noise * rng.standard_normal(loss.shape)
        kept = U0.copy()
        begin = loss.value(U0) + penalty.value(U0)
        for budget in ({"max_iter": 0}, {"max_iter": 1}, {"seconds": 1e-9}, {}):
            assert solver(loss, penalty, U0, **budget).objective <= begin * (1 + 1e-9)
        assert_array_equal(U0, kept)
    assert solver(loss, penalty, best.weights, tol=1e-8).n_iter == 0
    for U0 in (np.zeros(loss.shape), np.zeros(loss.shape, int), best.weights.tolist()):
        assert solver(loss, penalty, U0).status is Status.CONVERGED


def test_budgets(rng, designs, solver):
    loss, penalty = small(rng, designs, share=0.01)
    zero = loss.value(np.zeros(loss.shape))
    ended = [solver(loss, penalty, tol=1e-12, max_iter=k) for k in (0, 1, 2, 3)]
    for k, s in enumerate(ended):
        assert s.status is Status.MAX_ITER and s.n_iter == k and s.objective <= zero
    assert ended[-1].objective < ended[0].objective
    assert ended[-1].relative_gap < ended[0].relative_gap
    s = solver(loss, penalty, seconds=1e-9)
    assert s.status is Status.OUT_OF_TIME and s.n_iter == 0 and s.objective <= zero


def test_time_runs_out_between_rounds(rng, designs, solver):
    loss, penalty = small(rng, designs, share=0.01)
    seen = []

    def slow(n_iter, U, objective, relative_gap):
        seen.append((n_iter, objective, relative_gap))
        time.sleep(0.3 if n_iter == 1 else 0.0)

    s = solver(loss, penalty, tol=1e-13, seconds=0.3, callback=slow)
    assert s.status is Status.OUT_OF_TIME and s.seconds >= 0.3
    assert [n for n, _, _ in seen] == list(range(len(seen))) and len(seen) <= 2
    assert_allclose(s.objective, min(objective for _, objective, _ in seen), rtol=1e-12)


def test_the_callback_sees_every_round_with_its_certificate(rng, designs, solver):
    loss, penalty = small(rng, designs, ridge=0.02)
    seen = []
    s = solver(loss, penalty, tol=1e-10, callback=lambda *look: seen.append(look))
    assert [look[0] for look in seen] == list(range(s.n_iter + 1))
    for _, U, objective, relative_gap in seen:
        assert_allclose(objective, loss.value(U) + penalty.value(U), rtol=1e-12)
        assert relative_gap >= -1e-15
    assert seen[-1][3] <= 1e-10


def test_what_is_not_finite_is_said(rng, designs, solver):
    """Where it gets past the checks: a status, and weights that can be used."""
    loss, penalty = small(rng, designs)
    Y = loss.Y.copy()
    Y[3] = np.nan
    s = solver(replace(loss, Y=Y), penalty)
    assert s.status is Status.NOT_FINITE and np.isfinite(s.weights).all()
    for scale in (1e160, 1e300):
        huge = replace(loss, design=Masked(scale * loss.design.X, loss.design.D))
        with np.errstate(all="ignore"):
            s = solver(huge, penalty)
        assert s.status is Status.NOT_FINITE and np.isfinite(s.weights).all()


def test_moments_that_are_not_finite_are_said(rng):
    x = rng.standard_normal((20, 4))
    loss = SquaredMoments.of(Moments.of(x, x[:, :2]), 0.0)
    Q, q = loss.Q.copy(), loss.q.copy()
    Q[0, 0] = q[1, 1] = np.nan
    for spoilt in (replace(loss, Q=Q), replace(loss, q=q), replace(loss, y2=np.nan)):
        s = newton(spoilt, GroupL2(0.01, [0, 2, 4]))
        assert s.status is Status.NOT_FINITE and np.isfinite(s.weights).all()


def test_group_lasso_is_celers(rng, accepts_only, solver):
    celer = pytest.importorskip("celer", reason="celer is a peer of the benchmarks only")
    x = rng.standard_normal((60, 20)) + 1.0
    t = targets(rng, x, 1)
    loss = SquaredRows.of(Explicit(x, np.arange(0, 21, 5)), t, 0.0)
    starts = loss.design.starts
    penalty = GroupL2(0.1 * lam_max(loss, GroupL2(1.0, starts)), starts)
    peer = celer.GroupLasso(groups=5, alpha=penalty.lam, fit_intercept=False, tol=1e-12)
    peer.fit(x - x.mean(0), (t - t.mean(0)).ravel())
    s, coef = solver(loss, penalty, tol=1e-12), peer.coef_[:, None]
    accepts_only(lambda got: assert_allclose(got, coef, rtol=1e-5, atol=1e-6), s.weights)


def test_errors_before_any_work(rng, designs, solver):
    loss, penalty = small(rng, designs)
    starts, D = penalty.starts, loss.shape[0]
    spoilt = np.zeros(loss.shape)
    spoilt[0, 0] = np.inf
    bad = [
        ("lam = 0", GroupL2(0.0, starts), {}),
        ("got Nuclear", Nuclear(0.1, starts), {}),
        ("got NoneType", None, {}),
        (f"end at D = {D}, got 3", GroupL2(0.1, [0, 3]), {}),
        (rf"U0 must be \({D}, 2\)", penalty, {"U0": np.zeros((2, D))}),
        ("U0 holds NaN", penalty, {"U0": spoilt}),
        ("tol must not be negative", penalty, {"tol": -1.0}),
        ("tol must not be negative", penalty, {"tol": np.nan}),
        ("seconds must be positive", penalty, {"seconds": 0.0}),
        ("seconds must be positive", penalty, {"seconds": np.nan}),
    ]
    for message, wrong, options in bad:
        with pytest.raises(ValueError, match=message):
            solver(loss, wrong, **options)
    nan = loss.design.X.copy()
    nan[1, 1] = np.nan
    for make in (
        lambda: Masked(nan, loss.design.D),
        lambda: Pooled(nan[:, None], loss.design.D[:, None]),
    ):
        with pytest.raises(ValueError, match="saturated"):
            make()
