"""Proximal Newton for softmax: FISTA's optimum, an honest certificate, budgets kept."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels.designs import Explicit, Masked
from edgesolve.kernels.fista import fista
from edgesolve.kernels.penalties import GroupL2, lam_max
from edgesolve.kernels.softmax import Softmax, one_hot
from edgesolve.kernels.softmax_newton import softmax_newton
from edgesolve.kernels.solution import Status


def problem(rng, c, *, intercept=True, ridge=0.0, lam=0.1, explicit=False):
    """A `Softmax` on n = 90 rows of 5 gates with 4 inputs, and its penalty at `lam` lam_max."""
    X = rng.standard_normal((90, 4))
    D = X @ rng.standard_normal((4, 5)) >= 0
    labels = (X @ rng.standard_normal((4, max(c, 2))) + rng.gumbel(size=(90, max(c, 2)))).argmax(1)
    T = one_hot(labels, max(c, 2))
    T = T[:, 1:] if c == 1 else T
    design = Masked(X, D)
    if explicit:
        design = Explicit((D[:, :, None] * X[:, None]).reshape(90, -1), np.array([0, 3, 12, 20]))
    loss = Softmax.of(design, T, ridge, intercept=intercept)
    penalty = GroupL2(1.0, design.starts)
    return loss, GroupL2(lam * lam_max(loss, penalty), design.starts)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize(
    "more", [{}, {"intercept": False}, {"ridge": 0.02}, {"explicit": True}, {"lam": 0.02}]
)
def test_it_finds_the_optimum_of_fista(rng, accepts_only, c, more):
    loss, penalty = problem(rng, c, **more)
    found = softmax_newton(loss, penalty, tol=1e-8)
    slow = fista(loss, penalty, tol=1e-9, max_iter=5000)
    assert found.status is Status.CONVERGED and found.relative_gap <= 1e-8
    assert found.objective <= slow.objective * (1 + 1e-8)
    accepts_only(lambda U: assert_allclose(U, slow.weights, atol=2e-4), found.weights)
    assert_allclose(found.intercept, slow.intercept, atol=1e-3)


def test_the_certificate_covers_the_error_at_every_round(rng):
    loss, penalty = problem(rng, 3)
    best = softmax_newton(loss, penalty, tol=1e-12).objective
    seen = []
    softmax_newton(loss, penalty, tol=1e-9, callback=lambda *a: seen.append(a[2:]))
    for objective, relative in seen:
        assert -1e-12 <= objective - best <= relative * objective + 1e-12
    assert all(a[0] >= b[0] for a, b in pairwise(seen)) and len(seen) > 2


def test_above_lam_max_nothing_is_on(rng):
    loss, penalty = problem(rng, 3, lam=1.001)
    found = softmax_newton(loss, penalty)
    assert not found.weights.any() and found.status is Status.CONVERGED and found.n_iter <= 1


def test_budgets_and_a_warm_start(rng):
    loss, penalty = problem(rng, 3)
    best = softmax_newton(loss, penalty, tol=1e-8)
    assert softmax_newton(loss, penalty, best.weights, tol=1e-7).n_iter == 0
    none = softmax_newton(loss, penalty, max_iter=0)
    assert none.status is Status.MAX_ITER and not none.weights.any()
    late = softmax_newton(loss, penalty, seconds=1e-9)
    assert late.status is Status.OUT_OF_TIME and np.isfinite(late.relative_gap)
    for bad in ({"seconds": 0}, {"tol": -1.0}, {"U0": np.full(loss.shape, np.nan)}):
        with pytest.raises(ValueError):
            softmax_newton(loss, penalty, **bad)
