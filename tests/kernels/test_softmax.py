"""Softmax and logistic loss: the definition, the certificate along a solve and its mutants."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels import fista as fista_module
from edgesolve.kernels import softmax as softmax_module
from edgesolve.kernels.designs import Explicit, Masked, Pooled
from edgesolve.kernels.fista import fista
from edgesolve.kernels.gap import duality_gap, group_gap, relative_gap
from edgesolve.kernels.penalties import GroupL2, lam_max
from edgesolve.kernels.softmax import MU_B, Softmax, _divergence, one_hot
from edgesolve.kernels.solution import Status

N, R, M = 60, 4, 5
EVEN = np.arange(M + 1) * R


def rows(rng, n=N):
    X = rng.standard_normal((n, R))
    return Masked(X + 1.0, X @ rng.standard_normal((R, M)) >= 0)


def explicit(design):
    """A (n, D) of a design."""
    return design.forward(np.eye(design.starts[-1]))


def targets(rng, design, c, soft=False):
    Z = design.forward(rng.standard_normal((M * R, c))) / 3 + rng.gumbel(size=(design.n, c))
    if c == 1:
        return 1 / (1 + np.exp(-Z)) if soft else (Z > Z.mean()).astype(float)
    E = np.exp(Z)
    return E / E.sum(axis=1, keepdims=True) if soft else one_hot(Z.argmax(axis=1), c)


def problem(rng, c=3, ridge=0.0, soft=False, make=lambda lam, m, r: GroupL2(lam, EVEN)):
    """A loss with an intercept, and the penalty at a fifth of its lam_max."""
    design = rows(rng)
    loss = Softmax.of(design, targets(rng, design, c, soft), ridge)
    return loss, make(0.2 * lam_max(loss, make(1.0, M, R)), M, R)


def plain(loss, A, U, b):
    """The objective by its definition, U and b free."""
    Z = A @ U + b
    if Z.shape[1] == 1:
        rest = np.log1p(np.exp(Z[:, 0])) - loss.T[:, 0] * Z[:, 0]
    else:
        rest = np.log(np.exp(Z).sum(axis=1)) - (loss.T * Z).sum(axis=1)
    return loss.omega @ rest + 0.5 * MU_B * b @ b + 0.5 * loss.ridge * np.sum(U * U)


@pytest.mark.parametrize("c", [1, 2, 10])
def test_value_is_the_least_over_the_intercept(rng, twin, c):
    loss, _ = problem(rng, c, ridge=0.1, soft=True)
    A = explicit(loss.design)
    for scale in (0.0, 0.3, 3.0):
        U = scale * rng.standard_normal(loss.shape)
        b = loss.intercept(U)
        assert_allclose(loss.value(U), plain(loss, A, U, b), rtol=1e-12)
        for step in np.geomspace(1e-4, 10, 20):
            other = plain(loss, A, U, b + step * rng.standard_normal(c))
            assert other >= loss.value(U) * (1 - 1e-12)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("c", [1, 2, 10])
def test_gradient_by_differences(rng, accepts_only, c, intercept):
    design = rows(rng)
    weights = rng.random(N)
    T = targets(rng, design, c)
    loss = Softmax.of(design, T, 0.3, intercept=intercept, weights=weights)
    U, h = 0.3 * rng.standard_normal(loss.shape), 1e-4
    slow = np.zeros_like(U)
    for i in np.ndindex(U.shape):
        step = np.zeros_like(U)
        step[i] = h
        slow[i] = (loss.value(U + step) - loss.value(U - step)) / (2 * h)
    accepts_only(lambda got: assert_allclose(got, slow, rtol=1e-5, atol=1e-7), loss.grad(U))


def hessian_top(loss, U, h=1e-5):
    columns = []
    for i in np.ndindex(U.shape):
        step = np.zeros_like(U)
        step[i] = h
        columns.append(((loss.grad(U + step) - loss.grad(U - step)) / (2 * h)).ravel())
    return np.linalg.eigvalsh(np.array(columns))[-1]


@pytest.mark.parametrize("intercept", [True, False])
def test_lipschitz_bounds_the_curvature_and_no_more(rng, intercept):
    """At U = 0 and two classes as frequent the bound is reached: twice or half of it fails here."""
    design = rows(rng)
    T = one_hot(np.arange(N) % 2, 2)
    for t in (T, T[:, 1:]):
        loss = Softmax.of(design, t, 0.3, intercept=intercept)
        exact = hessian_top(loss, np.zeros(loss.shape))
        assert exact <= loss.lipschitz() * (1 + 1e-6) <= 1.03 * exact
        for scale in (0.1, 1.0):
            assert hessian_top(loss, scale * rng.standard_normal(loss.shape)) <= loss.lipschitz()


def test_weights_of_rows_are_repeated_rows(rng):
    design = rows(rng)
    T, times = targets(rng, design, 3), rng.integers(1, 4, N)
    again = np.repeat(np.arange(N), times)
    a = Softmax.of(design, T, 0.1, weights=times)
    b = Softmax.of(Masked(design.X[again], design.D[again]), T[again], 0.1)
    U = rng.standard_normal(a.shape)
    assert_allclose(a.value(U), b.value(U), rtol=1e-12)
    assert_allclose(a.grad(U), b.grad(U), atol=1e-12)
    assert_allclose(a.intercept(U), b.intercept(U), atol=1e-8)
    assert_allclose(a.lipschitz(), b.lipschitz(), rtol=0.02)
    penalty = GroupL2(0.01, EVEN)
    assert_allclose(duality_gap(a, penalty, U), duality_gap(b, penalty, U), rtol=1e-10)


def test_all_designs_agree(rng, twin):
    """`Pooled` with one position is `Masked`, and both are `Explicit`."""
    masked = rows(rng)
    pooled = Pooled(masked.X[:, None], masked.D[:, None])
    T = targets(rng, masked, 3)
    penalty, U = GroupL2(0.01, EVEN), rng.standard_normal((M * R, 3))
    losses = [
        Softmax.of(design, T, 0.1) for design in (masked, pooled, Explicit(explicit(masked), EVEN))
    ]
    for loss in losses[1:]:
        assert_allclose(loss.grad(U), losses[0].grad(U), atol=1e-12)
        assert_allclose(duality_gap(loss, penalty, U), duality_gap(losses[0], penalty, U))


def test_one_logit_is_two_logits(rng):
    """U = (-w, w)/2 has the norm ||w||/sqrt(2), so the same solution at another lam and ridge."""
    design = rows(rng)
    t = targets(rng, design, 1, soft=True)
    one = Softmax.of(design, t, 0.01)
    two = Softmax.of(design, np.hstack([1 - t, t]), 0.02)
    a = fista(one, GroupL2(0.01, EVEN), tol=1e-10)
    b = fista(two, GroupL2(0.01 * np.sqrt(2), EVEN), tol=1e-10)
    assert_allclose(b.weights, a.weights * [-0.5, 0.5], atol=1e-6)
    assert_allclose(np.diff(b.intercept), a.intercept, rtol=1e-4)
    assert_allclose(a.objective, b.objective, rtol=1e-5)


def visited(loss, penalty, monkeypatch):
    """The best solution, and each of the first 40 points on the way to it."""
    points = []
    with monkeypatch.context() as patch:
        patch.setattr(fista_module, "CHECK_EVERY", 1)
        some = fista(
            loss, penalty, tol=0.0, max_iter=40, callback=lambda k, U, P, kkt: points.append(U)
        )
    return fista(loss, penalty, some.weights, tol=1e-9, max_iter=1500), points


def assert_certifies(loss, penalty, best, points):
    """`loss` is what the certificate is given, best.objective and `points` are the truth's."""
    assert duality_gap(loss, penalty, best.weights)[0] <= 1e-6 * best.objective
    for U in points:
        gap, objective = duality_gap(loss, penalty, U)
        assert gap >= objective - best.objective - 1e-12
        assert objective - best.objective >= -1e-12


@pytest.mark.parametrize("ridge", [0.0, 1e-5, 0.05])
def test_the_gap_bounds_the_error_everywhere(rng, monkeypatch, make_penalty, ridge):
    loss, penalty = problem(rng, 3, ridge, make=make_penalty)
    best, points = visited(loss, penalty, monkeypatch)
    points += [s * rng.standard_normal(loss.shape) for s in np.geomspace(1e-3, 100, 10)]
    assert_certifies(loss, penalty, best, points)


@pytest.mark.parametrize("c, soft", [(1, False), (1, True), (2, False), (3, True), (10, False)])
def test_the_gap_for_all_kinds_of_targets(rng, monkeypatch, c, soft):
    loss, penalty = problem(rng, c, soft=soft)
    best, points = visited(loss, penalty, monkeypatch)
    assert_certifies(loss, penalty, best, points)


@pytest.mark.parametrize("intercept", [True, False])
def test_the_gap_shrinks_as_fast_as_it_did(rng, intercept):
    """convex.md, section 4, has 1.3e-1, 1.2e-3, 3.0e-6 after 10, 100, 300 iterations."""
    loss, penalty = problem(rng)
    loss, penalty = replace(loss, centre=intercept), replace(penalty, lam=0.5 * penalty.lam)
    seen = [fista(loss, penalty, tol=0.0, max_iter=k).relative_gap for k in (10, 100, 300)]
    assert seen[0] < 0.5 and seen[1] < 5e-3 and seen[2] < 5e-6


def twist(change):
    """A loss whose fit is wrong, as a slip in softmax.py would make it."""

    class Twisted(Softmax):
        def fit(self, U):
            return change(Softmax.fit(self, U))

    return lambda loss: Twisted(loss.design, loss.T, loss.omega, loss.ridge, loss.centre)


def shifted(fit):
    """Not at the optimal intercept, and the certificate isn't told: R is projected by hand."""
    p = fit.p * np.array([1.5, 1.0, 1.0])[:, None]
    p /= p.sum(axis=0)
    R = fit.R - (p - fit.p).T
    return fit._replace(p=p, R=R)


MUTANTS = {
    "n c for n": twist(lambda fit: fit._replace(R=fit.R / 3)),
    "sign of R": twist(lambda fit: fit._replace(R=-fit.R)),
    "permuted R": twist(lambda fit: fit._replace(R=np.roll(fit.R, 1, axis=1))),
    "zero R": twist(lambda fit: fit._replace(R=0 * fit.R)),
    "intercept not projected out": twist(shifted),
    "no intercept in the certificate": lambda loss: replace(loss, centre=False),
}


@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_residual_is_caught(rng, monkeypatch, name, ridge):
    loss, penalty = problem(rng, 3, ridge)
    best, points = visited(loss, penalty, monkeypatch)
    with pytest.raises(AssertionError):
        assert_certifies(MUTANTS[name](loss), penalty, best, points)


@pytest.mark.parametrize("share", [0.0, 0.5, 2.0])
def test_a_wrong_divergence_is_caught(rng, monkeypatch, share):
    """Along the ray the bound is tight in s; a factor in the conjugate breaks or loosens it."""
    loss, penalty = problem(rng, 3)
    U = 0.03 * fista(loss, penalty, tol=0.0, max_iter=20).weights
    exact = duality_gap(loss, penalty, U)[0]
    A, p = explicit(loss.design), np.exp(loss.fit(U).logp).T
    s = penalty.lam / np.max(penalty.dual_norms(A.T @ (loss.T - p) / N))
    q = (1 - s) * loss.T + s * p
    token = (s * (loss.T - p).mean(axis=0)) ** 2 / (2 * MU_B)
    dual = -np.sum(q * np.log(q)) / N - token.sum()
    assert s < 1 and dual > 0.1

    def check():
        gap, objective = duality_gap(loss, penalty, U)
        assert_allclose(gap, objective - dual, rtol=1e-9)

    check()
    right = softmax_module._divergence
    monkeypatch.setattr(softmax_module, "_divergence", lambda *a: share * right(*a))
    assert duality_gap(loss, penalty, U)[0] != exact
    with pytest.raises(AssertionError):
        check()


class Confused:
    """A penalty that takes another's for its dual norm, and for the prox that follows from it."""

    def __init__(self, right, wrong):
        self.lam, self.limit, self.value = right.lam, right.limit, right.value
        self.norms, self.inner = right.norms, right.inner
        self.dual_norms, self.prox = wrong.dual_norms, wrong.prox


@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("right, wrong", [("gates", "ranks"), ("ranks", "gates")])
def test_the_wrong_dual_norm_is_caught(rng, monkeypatch, penalties, right, wrong, ridge):
    loss, penalty = problem(rng, 10, ridge, make=penalties[right])
    best, points = visited(loss, penalty, monkeypatch)
    confused = Confused(penalty, penalties[wrong](penalty.lam, M, R))
    with pytest.raises(AssertionError):
        assert_certifies(loss, confused, best, points)


def test_a_rough_intercept_costs_tightness_and_not_truth(rng, monkeypatch):
    loss, penalty = problem(rng)
    best, points = visited(loss, penalty, monkeypatch)
    exact = [duality_gap(loss, penalty, U)[0] for U in points]
    monkeypatch.setattr(softmax_module, "INTERCEPT_TOL", np.inf)
    rough = [duality_gap(loss, penalty, U) for U in points]
    assert all(gap >= P - best.objective - 1e-12 for gap, P in rough)
    assert np.median([gap for gap, _ in rough]) > 10 * np.median(exact)


def test_any_weights_give_a_dual_point(rng, make_penalty):
    loss, penalty = problem(rng, make=make_penalty)
    best = fista(loss, penalty, tol=1e-11)
    for scale in (0.1, 1.0):
        U = scale * rng.standard_normal(loss.shape)
        own, objective = duality_gap(loss, penalty, U)
        error = objective - best.objective
        for W in (0 * U, 0.9 * best.weights, -U):
            gap, same = duality_gap(loss, penalty, U, W)
            assert error - 1e-12 <= gap <= own and same == objective
        assert_allclose(duality_gap(loss, penalty, U, best.weights)[0], error, rtol=1e-5)
        assert duality_gap(loss, penalty, U, np.nan * U)[0] == own


def test_without_penalty_the_gap_is_the_ridge_bound_or_trivial(rng):
    loss, _ = problem(rng, ridge=0.05)
    near = fista(loss, GroupL2(0.0, EVEN), max_iter=30).weights
    for U in (near, 0.1 * rng.standard_normal(loss.shape)):
        closed = np.sum(loss.grad(U) ** 2) / (2 * 0.05)
        assert (closed < loss.value(U)) == (U is near)
        for penalty in (None, GroupL2(0.0, EVEN)):
            gap, objective = duality_gap(loss, penalty, U)
            assert_allclose(gap, min(closed, loss.value(U)), rtol=1e-8)
            assert objective == loss.value(U)
    bare = replace(loss, ridge=0.0)
    assert_allclose(duality_gap(bare, None, U)[0], bare.value(U), rtol=1e-12)


@pytest.mark.parametrize("c", [1, 2, 3])
def test_ridge_alone_is_scikit_learns(rng, accepts_only, c):
    sklearn = pytest.importorskip("sklearn.linear_model")
    design = rows(rng)
    T = targets(rng, design, c)
    labels = T[:, 0] if c == 1 else T.argmax(axis=1)
    ridge = 0.05
    peer = sklearn.LogisticRegression(C=1 / (N * ridge), tol=1e-10, max_iter=5000)
    if c == 2:  # scikit-learn has one logit for two classes: half its weights and twice its ridge
        peer = sklearn.LogisticRegression(C=2 / (N * ridge), tol=1e-10, max_iter=5000)
    peer.fit(explicit(design), labels)
    s = fista(Softmax.of(design, T, ridge), GroupL2(0.0, EVEN), tol=1e-9)
    assert s.status is Status.CONVERGED and s.relative_gap < 1e-12
    coef, offset = peer.coef_.T, peer.intercept_
    if c == 2:
        coef, offset = coef * [-0.5, 0.5], offset * [-0.5, 0.5]
    accepts_only(lambda got: assert_allclose(got, coef, rtol=1e-3, atol=1e-5), s.weights)
    assert_allclose(s.intercept, offset, rtol=1e-3, atol=1e-4)


def test_groups_of_one_are_the_lasso_of_liblinear(rng, accepts_only):
    """lam sum |u_j| without an intercept, the one penalty that scikit-learn has too."""
    pytest.importorskip("sklearn", minversion="1.8", reason="it spells the l1 penalty otherwise")
    linear_model = importlib.import_module("sklearn.linear_model")
    svm = importlib.import_module("sklearn.svm")
    design = rows(rng)
    t, A = targets(rng, design, 1), explicit(design)
    loss = Softmax.of(design, t, 0.0, intercept=False)
    single = np.arange(M * R + 1)
    lam = 0.1 * lam_max(loss, GroupL2(1.0, single))
    C = svm.l1_min_c(A, t[:, 0], loss="log", fit_intercept=False)
    assert_allclose(1 / C, N * 10 * lam, rtol=1e-9)  # the same lam_max, so the same scaling
    s = fista(loss, GroupL2(lam, single), tol=1e-9)
    assert s.status is Status.CONVERGED and s.relative_gap < 1e-5
    assert 0 < np.count_nonzero(s.weights) < M * R
    peer = linear_model.LogisticRegression(
        C=1 / (N * lam), l1_ratio=1, solver="liblinear", fit_intercept=False, tol=1e-10
    )
    peer.fit(A, t[:, 0])
    coef = peer.coef_.T
    accepts_only(lambda got: assert_allclose(got, coef, rtol=1e-3, atol=1e-4), s.weights)


def test_zero_from_lam_max_on(rng):
    loss, _ = problem(rng)
    top = lam_max(loss, GroupL2(1.0, EVEN))
    above = fista(loss, GroupL2(1.0001 * top, EVEN))
    assert above.status is Status.CONVERGED and not above.weights.any()
    assert above.relative_gap <= 1e-12
    share = np.exp(above.intercept) / np.exp(above.intercept).sum()
    assert_allclose(share, loss.mean_t, rtol=1e-4)
    assert fista(loss, GroupL2(0.8 * top, EVEN)).weights.any()


def test_separable_data_have_an_optimum_thanks_to_the_penalty(rng):
    design = rows(rng)
    labels = (design.X @ rng.standard_normal(R) > 1.0).astype(int)
    for t in (one_hot(labels, 2), one_hot(labels, 2)[:, 1:]):
        loss = Softmax.of(design, t, 0.0)
        penalty = GroupL2(0.1 * lam_max(loss, GroupL2(1.0, EVEN)), EVEN)
        s = fista(loss, penalty, tol=1e-7)
        assert s.status is Status.CONVERGED and s.relative_gap < 1e-3
        none = fista(loss, GroupL2(0.0, EVEN), max_iter=50)
        assert none.status is Status.MAX_ITER and np.isfinite(none.weights).all()
        assert none.relative_gap > 0.5  # nothing is known: the infimum is not attained


def test_one_class_alone_leaves_the_intercept(rng):
    design = rows(rng)
    for t in (one_hot(np.full(N, 1), 3), np.ones((N, 1)), np.zeros((N, 1))):
        loss = Softmax.of(design, t, 0.0)
        s = fista(loss, GroupL2(0.01, EVEN))
        assert s.status is Status.CONVERGED and not s.weights.any()
        assert s.relative_gap < 1e-6
        assert s.objective < 1e-3 and 5 < np.abs(s.intercept).max() < 20


def test_smoothed_labels_are_targets(rng):
    design = rows(rng)
    hard = targets(rng, design, 3)
    smooth = Softmax.of(design, 0.9 * hard + 0.1 / 3, 0.0)
    s = fista(smooth, GroupL2(0.01, EVEN), tol=1e-9)
    assert s.relative_gap < 1e-6
    entropy = -(0.9 + 0.1 / 3) * np.log(0.9 + 0.1 / 3) - 2 * (0.1 / 3) * np.log(0.1 / 3)
    assert s.objective > entropy  # no forecast beats the entropy of the targets


def test_a_wild_start_is_survived(rng):
    """Logits in the hundreds: Newton's method for the intercept may not end; the gap still holds."""
    loss, penalty = problem(rng)
    best = fista(loss, penalty, tol=1e-10)
    for scale in (30.0, 1000.0):
        U0 = scale * rng.standard_normal(loss.shape)
        gap, objective = duality_gap(loss, penalty, U0)
        assert objective - best.objective <= gap < np.inf
        found = fista(loss, penalty, U0, max_iter=30)
        assert found.objective < objective


def test_what_is_not_finite_is_said(rng):
    loss, penalty = problem(rng)
    s = fista(loss, penalty, np.full(loss.shape, np.nan))
    assert s.status is Status.NOT_FINITE
    assert not relative_gap(loss, penalty, np.full(loss.shape, np.nan)) < np.inf


def test_divergence_keeps_small_and_survives_tiny():
    p = np.array([[0.25], [0.25], [0.5]])
    x = 1e-7 * np.array([[1.0], [1.0], [-1.0]])
    assert_allclose(_divergence(p * (1 + x), p, np.log(p)), np.sum(p * x * x) / 2, rtol=1e-6)
    logp = np.array([[0.0], [-1000.0]])
    q = np.array([[0.25], [0.75]])
    exact = np.sum(q * (np.log(q) - logp))
    assert_allclose(_divergence(q, np.exp(logp), logp), exact, rtol=1e-12)
    edge = np.array([[1.0], [0.0]])
    assert_allclose(_divergence(edge, q, np.log(q)), np.log(4.0), rtol=1e-12)
    assert _divergence(q, q, np.log(q)) == 0


def test_the_groups_share_is_not_negative(rng, make_penalty):
    for ridge in (0.0, 0.1):
        for _ in range(5):
            U, V = rng.standard_normal((2, M * R, 3))
            penalty = make_penalty(1.0, M, R)
            pull = V if ridge > 0 else V / np.max(penalty.dual_norms(V) / penalty.limit)
            assert group_gap(penalty, ridge, U, pull) >= 0


def test_errors(rng):
    design = rows(rng)
    T = targets(rng, design, 3)
    for bad, text in (
        (T[:5], r"t must be \(60, c\)"),
        (T[:0], r"t must be \(60, c\)"),
        (T[:, 0], "labels: `one_hot`"),
        (T[:, :0], r"t must be \(60, c\)"),
        (0.9 * T, "sum to one, row 0"),
        (T - 0.1, "apply softmax"),
        (np.where(T > 0, np.nan, T), "apply softmax"),
        (30 * T, "apply softmax"),
    ):
        with pytest.raises(ValueError, match=text):
            Softmax.of(design, bad, 0.1)
    with pytest.raises(ValueError, match="ridge"):
        Softmax.of(design, T, -1.0)
    for weights in (np.ones(3), np.zeros(N), -np.ones(N), np.full(N, np.nan)):
        with pytest.raises(ValueError, match="weights must be"):
            Softmax.of(design, T, 0.1, weights=weights)
    for labels in ([], [0.5, 1.0], [[0, 1]]):
        with pytest.raises(ValueError, match=r"\(n,\) integers"):
            one_hot(labels, 3)
    for labels, n_classes in (([0, 3], 3), ([-1, 0], 3), ([0, 0], 1)):
        with pytest.raises(ValueError, match="labels must lie"):
            one_hot(labels, n_classes)
    assert_allclose(Softmax.of(design, T.astype(np.float16) * 1.0005, 0.0).T, T)
