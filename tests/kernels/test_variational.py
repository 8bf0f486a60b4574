"""What is `variational`'s own; the promises that it shares with `newton` are in test_newton.py."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels import variational as module
from edgesolve.kernels.losses import SquaredMoments, SquaredRows
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.newton import newton
from edgesolve.kernels.penalties import GroupL2, lam_max
from edgesolve.kernels.solution import Status
from edgesolve.kernels.variational import _Dual, kernel_of, variational


def problem(rng, design, A, c=2, ridge=0.0, intercept=True, share=0.1):
    t = A[:, :1] + rng.standard_normal((len(A), c)) + 1.0
    loss = SquaredRows.of(design, t, ridge, intercept=intercept)
    w = np.linspace(0.5, 2.0, len(design.starts) - 1)
    return loss, GroupL2(share * lam_max(loss, GroupL2(1.0, design.starts, w)), design.starts, w)


def blocks(design, A):
    return np.split(A, design.starts[1:-1], axis=1)


def test_the_kernel_is_that_of_the_dense_rows(rng, make_design, accepts_only):
    design, A = make_design(rng, 9, np.float32)
    kernel, w = kernel_of(design), rng.uniform(0.5, 2.0, len(design.starts) - 1)
    slow = sum(a * B @ B.T for a, B in zip(w, blocks(design, A), strict=True))
    accepts_only(lambda got: assert_allclose(got, slow, rtol=1e-5, atol=1e-5), kernel.gram(w))
    on = np.array([0, len(w) - 1])[: len(w)]
    some = sum(w[i] * blocks(design, A)[i] @ blocks(design, A)[i].T for i in set(on.tolist()))
    assert_allclose(kernel.gram(w[np.unique(on)], np.unique(on)), some, rtol=1e-5, atol=1e-5)
    for c in (1, 3):
        alpha = rng.standard_normal((9, c))
        pulled = [B.T @ alpha for B in blocks(design, A)]
        squares = [np.sum(p * p) for p in pulled]
        assert_allclose(kernel.squares(alpha), squares, rtol=1e-5)
        slow = np.stack([B @ p for B, p in zip(blocks(design, A), pulled, strict=True)], axis=1)
        for gates in (np.arange(len(w)), np.unique(on)):
            found = kernel.images(alpha, gates)
            assert_allclose(found, slow[:, gates], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_h_is_the_program_minimised_over_the_weights(rng, make_design, ridge):
    """h(t) = min over U of f(U) + (ridge/2)||U||^2 + sum (limit/2)(||U_i||^2/t + t)."""
    design, A = make_design(rng, 14, np.float64)
    loss, penalty = problem(rng, design, A, ridge=ridge)
    work, sizes = _Dual(loss, penalty), np.diff(design.starts)
    Ac = A - A.mean(axis=0)
    for t in (rng.uniform(0.1, 2.0, len(sizes)), np.full(len(sizes), 0.3)):
        here = work.at(t)
        H = Ac.T @ Ac / 14 + np.diag(np.repeat(penalty.limit / t + ridge, sizes))
        U = np.linalg.solve(H, Ac.T @ loss.Y / 14)
        norms = penalty.norms(U)
        smooth = loss.value(U) + 0.5 * penalty.limit @ (norms**2 / t + t)
        assert_allclose(here.value, smooth, rtol=1e-10)
        assert_allclose(work.weights(here), U, rtol=1e-7, atol=1e-9)
        assert_allclose(here.objective, loss.value(U) + penalty.value(U), rtol=1e-10)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_gradient_of_h_by_differences(rng, designs, ridge, accepts_only):
    design, A = designs["masked"](rng, 14, np.float64)
    loss, penalty = problem(rng, design, A, ridge=ridge)
    work, t, h = _Dual(loss, penalty), rng.uniform(0.1, 2.0, 6), 1e-5
    slow = [(work.at(t + h * e).value - work.at(t - h * e).value) / (2 * h) for e in np.eye(len(t))]
    here = work.at(t)
    grad = 0.5 * (penalty.limit - here.q * penalty.limit / (penalty.limit + ridge * t) ** 2)
    accepts_only(lambda got: assert_allclose(got, slow, rtol=1e-5, atol=1e-8), grad)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_every_step_descends(rng, make_design, ridge):
    design, A = make_design(rng, 12, np.float64)
    loss, penalty = problem(rng, design, A, ridge=ridge, share=0.02)
    work = _Dual(loss, penalty)
    here, values = work.at(work.uniform()), []
    for _ in range(6):
        values.append(here.value)
        here = work.step(here)
        if here is None:
            break
        assert (here.t >= 0).all()
    assert (np.diff(values) <= 1e-14 * values[0]).all() and values[-1] < values[0]


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.3])
@pytest.mark.parametrize("intercept", [True, False])
def test_the_certificate_is_by_definition(
    rng, make_design, referee, accepts_only, ridge, intercept
):
    """P(U) less the largest dual value of the s alpha, of the weights that any t leads to."""
    design, A = make_design(rng, 14, np.float64)
    loss, penalty = problem(rng, design, A, ridge=ridge, intercept=intercept)
    judge = referee(A, loss.Y + loss.mean_t, penalty, ridge, intercept)
    work, m = _Dual(loss, penalty), len(penalty.limit)
    for t in (rng.uniform(0.1, 2.0, m) * (np.arange(m) != 1), np.zeros(m)):
        here = work.at(t)
        s = work.solution(here, np.inf, 3, 0.0)
        P, theta = judge.objective(s.weights), here.alpha - intercept * here.alpha.mean(axis=0)
        pull = judge.A.T @ theta
        top = 1.0 / np.max(judge.norms(pull - ridge * s.weights) / penalty.limit)
        scales = (1.0, min(top, 1.0)) if ridge else np.linspace(0.0, top, 20_001)
        gap = P - max(judge.dual(scale * theta) for scale in scales)
        accepts_only(
            lambda got, right=(gap, P): assert_allclose(got, right, rtol=1e-6),
            [s.relative_gap * s.objective, s.objective],
        )
        assert_allclose([here.gap, here.objective], [gap, P], rtol=1e-6)
        grad = ridge * s.weights - judge.A.T @ (judge.Y - judge.A @ s.weights) / 14
        grad0 = np.linalg.norm(judge.A.T @ judge.Y) / 14
        assert_allclose(s.kkt, penalty.kkt(s.weights, grad) / grad0, rtol=1e-7)
        assert_allclose(s.intercept, loss.intercept(s.weights), rtol=1e-9, atol=1e-12)
        assert_allclose(s.weights, work.weights(here), rtol=1e-12)


def test_alpha_certifies_what_the_residual_cannot(rng, designs):
    """Rows that are nearly fitted: the residual is rounding, alpha is not."""
    design, _ = designs["masked"](rng, 19, np.float64)
    some = module.Masked(design.X[:9], design.D[:9])
    for tol in (1e-9, 1e-12):
        loss = SquaredRows.of(some, rng.standard_normal((9, 2)), 0.0)
        penalty = GroupL2(1e-9 * lam_max(loss, GroupL2(1.0, some.starts)), some.starts)
        s = variational(loss, penalty, tol=tol)
        assert s.status is Status.CONVERGED and s.relative_gap <= tol


def test_more_gates_than_rows_and_outputs(rng, designs):
    """Then the gates' Hessian is singular."""
    for n, m in ((2, 12), (7, 30)):
        x = rng.standard_normal((n, 3)) + 0.3
        design = module.Masked(x, rng.random((n, m)) < 0.6)
        A = (design.D[:, :, None] * x[:, None]).reshape(n, -1)
        for intercept, share in ((True, 0.03), (False, 0.3)):
            loss, penalty = problem(rng, design, A, 1, intercept=intercept, share=share)
            a, b = variational(loss, penalty, tol=1e-7), newton(loss, penalty, tol=1e-7)
            assert a.status is Status.CONVERGED
            assert_allclose(a.objective, b.objective, rtol=1e-6)


def test_the_uniform_start_is_free_of_units(rng, designs):
    design, A = designs["masked"](rng, 20, np.float64)
    loss, penalty = problem(rng, design, A)
    first = _Dual(loss, penalty).uniform()
    for scale in (1e-8, 1e8):
        other = module.Masked(scale * design.X, design.D)
        again, _ = problem(np.random.default_rng(0), other, scale * A)
        again = SquaredRows(other, loss.Y, loss.mean_t, 0.0)
        less = GroupL2(scale * penalty.lam, penalty.starts, penalty.weights)
        assert_allclose(scale * _Dual(again, less).uniform(), first, rtol=1e-9)
    above = GroupL2(100 * penalty.lam, penalty.starts, penalty.weights)
    assert not _Dual(loss, above).uniform().any()


def test_ill_conditioned_is_said_where_rounding_ends_the_descent(rng, designs):
    """More rows than weights and hardly a penalty: n is lost beside K (there `newton` is chosen)."""
    design, A = designs["masked"](rng, 60, np.float64)
    loss, penalty = problem(rng, design, A, share=1e-8)
    s = variational(loss, penalty, tol=1e-9)
    assert s.status in (Status.ILL_CONDITIONED, Status.MAX_ITER) and s.relative_gap > 1e-9
    assert np.isfinite(s.weights).all() and s.objective <= loss.value(np.zeros(loss.shape))


def test_moments_have_no_rows(rng):
    x = rng.standard_normal((9, 4))
    with pytest.raises(ValueError, match="works on rows"):
        variational(SquaredMoments.of(Moments.of(x, x), 0.0), GroupL2(0.1, [0, 4]))
