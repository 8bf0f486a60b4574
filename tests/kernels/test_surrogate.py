import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels import surrogate as module
from edgesolve.kernels.losses import SquaredMoments
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.surrogate import Surrogate, secular

EVEN, RAGGED = np.arange(5) * 3, np.array([0, 3, 4, 7, 9, 12])


def model(rng, starts, ridge):
    """A surrogate, and (Gamma x S, diag(Gamma) x S) as dense matrices."""
    x = rng.standard_normal((40, 12)) @ rng.standard_normal((12, 12))
    loss = SquaredMoments.of(Moments.of(x, x[:, :1]), ridge)
    one = Surrogate.of(loss, starts)
    full, alone = np.zeros((12, 12)), np.zeros((12, 12))
    for gates, Gamma, S in loss.kronecker(starts):
        rows = (starts[gates][:, None] + np.arange(len(S))).ravel()
        full[np.ix_(rows, rows)] = np.kron(Gamma, S)
        alone[np.ix_(rows, rows)] = np.kron(np.diag(np.diag(Gamma)), S)
    return one, full, alone


def test_secular_is_the_root(rng, twin, accepts_only):
    """s over 8 decades, limits over 6: Newton climbs to the root and stops there."""
    k, r = 200, 6
    beta = rng.standard_normal((k, r)) ** 2
    s = 10.0 ** rng.uniform(-6, 2, (k, r))
    limit = 10.0 ** rng.uniform(-4, 2, k)
    beta[:3], limit[0] = 0.0, 1e-4
    nu = secular(beta, s, limit)
    off = np.sqrt(beta.sum(axis=1)) <= limit
    assert 10 < off.sum() < 190 and not nu[off].any() and (nu[~off] > 0).all()
    beta, s, limit = beta[~off], s[~off], limit[~off]

    def check(got):
        assert_allclose((beta / (s * got[:, None] + limit[:, None]) ** 2).sum(axis=1), 1, rtol=1e-9)

    # Where s nu is far below the limit h hardly depends on nu: look at roots that matter.
    keep = (s.max(axis=1) * nu[~off]) > limit
    beta, s, limit = beta[keep], s[keep], limit[keep]
    accepts_only(check, nu[~off][keep])


def test_secular_edges(twin):
    one = np.ones((1, 2))
    assert secular(one, one, np.array([np.sqrt(2)])) == 0.0
    assert secular(one, one, np.array([1.0])) == pytest.approx(np.sqrt(2) - 1, rel=1e-14)
    assert secular(np.zeros((1, 2)), one, np.array([0.1])) == 0.0
    assert np.isnan(secular(np.nan * one, one, np.array([0.1]))).all()
    assert len(secular(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0))) == 0


def test_the_twins_agree(rng, monkeypatch):
    beta, s = rng.standard_normal((50, 4)) ** 2, 10.0 ** rng.uniform(-6, 2, (50, 4))
    limit = 10.0 ** rng.uniform(-3, 1, 50)
    first = secular(beta, s, limit)
    monkeypatch.setattr(module.accel, "compiled", lambda: None)
    assert_allclose(secular(beta, s, limit), first, rtol=1e-11)


@pytest.mark.parametrize("starts", [EVEN, RAGGED], ids=["even", "ragged"])
def test_metric_is_the_diagonal_blocks(rng, starts, accepts_only):
    one, full, alone = model(rng, starts, 0.0)
    for dtype, rtol in ((np.float64, 1e-10), (np.float32, 1e-3)):
        U = rng.standard_normal((12, 2)).astype(dtype)
        got = one.metric(U)
        assert got.dtype == dtype
        scale = rtol * np.abs(alone @ U).max()
        accepts_only(lambda got, U=U, a=scale: assert_allclose(got, alone @ U, atol=a), got)
    exact = np.linalg.eigvals(np.linalg.solve(alone, full)).real.max()
    assert exact * (1 - 1e-9) <= one.lipschitz() <= (len(one.classes) + 1e-9) * exact


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("starts", [EVEN, RAGGED], ids=["even", "ragged"])
def test_prox_solves_its_program(rng, twin, starts, ridge, c, accepts_only):
    one, _, alone = model(rng, starts, ridge)
    C, L = 3.0 * rng.standard_normal((12, c)), 1.7
    norms = np.array([np.linalg.norm(part) for part in np.split(C, starts[1:-1])])
    limit = norms * np.linspace(0.2, 1.2, len(norms))
    H = L * alone + ridge * np.eye(12)

    def check(U):
        groups = zip(
            np.split(U, starts[1:-1]), np.split(C - H @ U, starts[1:-1]), limit, strict=True
        )
        for part, pull, most in groups:
            length = np.linalg.norm(part)
            if length == 0:
                assert np.linalg.norm(pull) <= most * (1 + 1e-9)
            else:
                assert_allclose(pull, most * part / length, atol=1e-7 * most)

    U = one.prox(C, L, limit)
    assert not U[starts[-2] :].any() and U[: starts[-2]].any(axis=1).all()
    accepts_only(check, U)
    rough = one.prox(C.astype(np.float32), L, limit)
    assert rough.dtype == np.float32
    assert_allclose(rough, U, rtol=1e-3, atol=1e-4 * np.abs(U).max())


@pytest.mark.parametrize("tile", [1, module.TILE_FLOATS])
@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("starts", [EVEN, RAGGED], ids=["even", "ragged"])
def test_the_preconditioner_is_the_inverse(rng, starts, ridge, c, tile, accepts_only, monkeypatch):
    monkeypatch.setattr(module, "TILE_FLOATS", tile)
    one, full, _ = model(rng, starts, ridge)
    U = rng.standard_normal((12, c))
    norms = np.array([np.linalg.norm(part) for part in np.split(U, starts[1:-1])])
    limit = np.linspace(0.5, 2.0, len(norms))
    M = np.kron(full, np.eye(c)) + ridge * np.eye(12 * c)
    for a, b, norm, most in zip(starts[:-1], starts[1:], norms, limit, strict=True):
        u = U[a:b].ravel() / norm
        at = slice(a * c, b * c)
        M[at, at] += most / norm * (np.eye(len(u)) - np.outer(u, u))
    r = rng.standard_normal((12, c))
    slow = np.linalg.solve(M, r.ravel()).reshape(12, c)
    apply = one.preconditioner(U, norms, limit)
    close = 3e-3 * np.abs(slow).max()
    accepts_only(lambda got: assert_allclose(got, slow, atol=close), apply(r.astype(np.float32)))
    # Conjugate gradients need it to be symmetric and positive, whatever float32 does.
    dense = np.stack([apply(e.reshape(12, c)).ravel() for e in np.eye(12 * c, dtype=np.float32)])
    assert_allclose(dense, dense.T, atol=1e-4 * np.abs(dense).max())
    assert np.linalg.eigvalsh(dense + dense.T)[0] > 0


def test_the_preconditioner_stands_a_direction_without_curvature(rng):
    """c = 1, blocks of one input: u u' leaves nothing but Gamma, here of rank one."""
    x = np.outer(rng.standard_normal(20), np.ones(4))
    loss = SquaredMoments.of(Moments.of(x, x[:, :1]), 0.0)
    U = np.array([[1.0], [1e-3], [1e-6], [2.0]])
    one = Surrogate.of(loss, np.arange(5))
    apply = one.preconditioner(U, np.abs(U[:, 0]), np.full(4, 0.1))
    dense = np.hstack([apply(e[:, None]) for e in np.eye(4, dtype=np.float32)])
    assert np.isfinite(dense).all() and np.linalg.eigvalsh(dense + dense.T)[0] > 0


def test_restrict_is_the_model_of_some_gates(rng):
    one, _, alone = model(rng, RAGGED, 0.2)
    gates = np.array([0, 3, 4])
    rows = np.r_[0:3, 7:9, 9:12]
    U = rng.standard_normal((len(rows), 2))
    part = one.restrict(RAGGED, gates)
    assert part.ridge == one.ridge
    assert_allclose(part.metric(U), alone[np.ix_(rows, rows)] @ U, atol=1e-9 * np.abs(alone).max())


def test_constant_features_leave_a_finite_model(twin):
    loss = SquaredMoments.of(Moments.of(np.ones((9, 4)), np.ones((9, 1))), 0.0)
    one = Surrogate.of(loss, np.array([0, 2, 4]))
    U = one.prox(np.ones((4, 1)), one.lipschitz(), np.array([0.5, 2.0]))
    assert np.isfinite(U).all() and not U[2:].any() and U[:2].all()
