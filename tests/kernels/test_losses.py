import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels import losses
from edgesolve.kernels.designs import Pooled
from edgesolve.kernels.gated import gated_pool
from edgesolve.kernels.losses import SquaredMoments, SquaredRows, top_eigenvalue
from edgesolve.kernels.moments import Moments

N, P, R_, M, C = 40, 3, 4, 5, 2
RIDGE = 0.3


def problem(rng):
    z = rng.standard_normal((N, P, R_)) + 1.0
    D = np.clip(rng.standard_normal((N, P, M)) + 0.5, 0, 1)
    A = gated_pool(z, D)
    Y = A @ rng.standard_normal((M * R_, C)) + rng.standard_normal((N, C)) + 5.0
    return z, D, A, Y


@pytest.fixture(params=["moments", "gated"])
def loss_and_rows(request, rng, twin):
    z, D, A, Y = problem(rng)
    if request.param == "moments":
        return SquaredMoments.of(Moments.of(A, Y), RIDGE), A, Y
    return SquaredRows.of(Pooled(z, D), Y, RIDGE), A, Y


def test_value_is_the_stated_scaling(rng, loss_and_rows):
    loss, A, Y = loss_and_rows
    Ac, Yc = A - A.mean(0), Y - Y.mean(0)
    for _ in range(3):
        U = rng.standard_normal(loss.shape)
        fit = np.sum((Ac @ U - Yc) ** 2) / (2 * N)
        assert_allclose(loss.value(U), fit + RIDGE / 2 * np.sum(U * U), rtol=1e-12)


def test_gradient_by_differences(rng, loss_and_rows, accepts_only):
    loss, _, _ = loss_and_rows
    U, h = rng.standard_normal(loss.shape), 1e-4
    slow = np.zeros_like(U)
    for i in np.ndindex(U.shape):
        step = np.zeros_like(U)
        step[i] = h
        slow[i] = (loss.value(U + step) - loss.value(U - step)) / (2 * h)
    accepts_only(lambda got: assert_allclose(got, slow, rtol=1e-6, atol=1e-7), loss.grad(U))


def test_residual_is_that_of_the_rows(rng, loss_and_rows):
    loss, A, Y = loss_and_rows
    Ac, Yc = A - A.mean(0), Y - Y.mean(0)
    U = rng.standard_normal(loss.shape)
    R = Yc - Ac @ U
    V, rr, ry = loss.residual(U)
    assert_allclose(V, Ac.T @ R / N, rtol=1e-10, atol=1e-12)
    assert_allclose([rr, ry], [np.sum(R * R) / N, np.sum(R * Yc) / N], rtol=1e-10)


def test_intercept_is_optimal(rng, loss_and_rows):
    loss, A, Y = loss_and_rows
    U = rng.standard_normal(loss.shape)
    assert_allclose((Y - A @ U - loss.intercept(U)).mean(axis=0), 0, atol=1e-12)


def test_lipschitz_bounds_the_curvature(loss_and_rows):
    loss, A, _ = loss_and_rows
    exact = np.linalg.eigvalsh(np.cov(A.T, bias=True))[-1] + RIDGE
    assert exact <= loss.lipschitz() <= 1.03 * exact


def test_lipschitz_mends_a_power_iteration_that_fell_short(rng, monkeypatch):
    _, _, A, Y = problem(rng)
    loss = SquaredMoments.of(Moments.of(A, Y), RIDGE)
    exact = np.linalg.eigvalsh(np.cov(A.T, bias=True))[-1] + RIDGE
    monkeypatch.setattr(losses, "top_eigenvalue", lambda product, size: 0.5 * (exact - RIDGE))
    assert exact <= loss.lipschitz() <= 1.15 * exact


def test_lipschitz_is_never_below_for_hard_spectra(rng):
    """Clustered tops mislead the power iteration; the Cholesky check does not let that through."""
    d = 60
    basis, _ = np.linalg.qr(rng.standard_normal((d, d)))
    for spectrum in (np.linspace(0.9, 1, d), np.geomspace(1e-12, 1, d), np.eye(d)[0], np.zeros(d)):
        Q = (basis * spectrum) @ basis.T
        loss = SquaredMoments(Q, np.zeros((d, 1)), 0.0, 0.0, np.zeros(d), np.zeros(1))
        assert spectrum.max() * (1 - 1e-12) <= loss.lipschitz() <= 1.13 * spectrum.max()
    short = top_eigenvalue(lambda V: np.diag(np.linspace(0.5, 1, d)) @ V, d, max_iter=1)
    assert 1.02 * short < 1.0  # so the check above has something to catch


def test_both_losses_agree(rng, twin):
    z, D, A, Y = problem(rng)
    a = SquaredMoments.of(Moments.of(A, Y), RIDGE)
    b = SquaredRows.of(Pooled(z.astype(np.float64), D), Y, RIDGE)
    U = rng.standard_normal(a.shape)
    assert a.shape == b.shape
    assert_allclose(a.value(U), b.value(U), rtol=1e-11)
    assert_allclose(a.grad(U), b.grad(U), rtol=1e-9, atol=1e-11)
    assert_allclose(a.intercept(U), b.intercept(U), rtol=1e-11)


def test_errors(rng):
    z, D, A, Y = problem(rng)
    with pytest.raises(ValueError, match="ridge"):
        SquaredMoments.of(Moments.of(A, Y), -0.1)
    with pytest.raises(ValueError, match="ridge"):
        SquaredRows.of(Pooled(z, D), Y, np.nan)
    with pytest.raises(ValueError, match=r"t must be \(40, c\)"):
        SquaredRows.of(Pooled(z, D), Y[:3], 0.1)
