"""Tucker-2: each update against dense least squares, descent, the table of all ranks, the published sweep."""

from __future__ import annotations

import numpy as np
import pytest
from layer_rows import metric_of, rows
from scipy.sparse.linalg import minres

from edgesolve.host import tucker
from edgesolve.host.lowrank import lowrank_curve, reduced_rank
from edgesolve.host.metric import Metric
from edgesolve.host.tucker import (
    input_basis,
    narrowed,
    refitted,
    tucker2,
    tucker2_curves,
    tucker2_published,
)
from edgesolve.kernels.moments import Moments

SHAPE = (6, 5, 3, 2)
PAIRS = [(2, 2), (4, 3), (6, 2), (2, 5), (3, 4)]


def kron(u, shape=SHAPE):
    return np.kron(u, np.eye(shape[2] * shape[3]))


def least_squares_in(basis, target):
    """The z (k, ...) of least ||target - basis z||: not us."""
    return np.linalg.lstsq(basis, target, rcond=None)[0]


def dense_input(metric, cores, u_out, n):
    """u_in by lstsq on the whitened rows, one column of the design per unknown."""
    r = len(cores)
    columns = []
    for i, p in np.ndindex(n, r):
        e = np.zeros((n, r))
        e[i, p] = 1.0
        V = (e @ cores.reshape(r, -1)).reshape(metric.D, -1)
        columns.append((metric.root()[0].T @ V @ u_out.T).ravel())
    _, _, M = metric.whitened()
    return least_squares_in(np.stack(columns, axis=1), M.T.ravel()).reshape(n, r)


def test_the_input_update_is_a_dense_least_squares_solve(accepts_only):
    metric, u = metric_of(SHAPE), input_basis(metric_of(SHAPE), 5)[:, :3]
    u_out, core = reduced_rank(narrowed(metric, u), 4)
    cores = core.reshape(4, 3, 6).transpose(1, 2, 0)
    expected = dense_input(metric, cores, u_out, 5)

    def equal(answer):
        np.testing.assert_allclose(answer, expected, atol=1e-8)

    accepts_only(equal, refitted(metric.S, metric.C.T @ u_out, u, cores))


def test_the_iterated_update_descends_nearly_as_far(monkeypatch):
    metric, u = metric_of(SHAPE), input_basis(metric_of(SHAPE), 5)[:, :3]
    u_out, core = reduced_rank(narrowed(metric, u), 4)
    cores = core.reshape(4, 3, 6).transpose(1, 2, 0)

    def distortion(u):
        return metric.distortion(u_out @ core @ kron(u).T)

    exact = distortion(refitted(metric.S, metric.C.T @ u_out, u, cores))
    monkeypatch.setattr(tucker, "DENSE_UNKNOWNS", 0)
    iterated = distortion(refitted(metric.S, metric.C.T @ u_out, u, cores))
    assert exact <= iterated <= exact + 1e-4 * (distortion(u) - exact)


def test_core_and_output_are_jointly_optimal():
    """No separate solve beats it, and it is what an SVD of the projected target gives."""
    metric = metric_of(SHAPE)
    R, _, M = metric.whitened()
    for r_out, r_in in PAIRS[:2]:
        u = input_basis(metric, 5)[:, :r_in]
        basis = R.T @ kron(u)
        projected = basis @ least_squares_in(basis, M.T)
        s = np.linalg.svd(projected, compute_uv=False)
        least = metric.v - np.sum(s[:r_out] ** 2)
        joint = metric.distortion(tucker2(metric, SHAPE, (r_out, r_in), sweeps=0).full())
        assert joint == pytest.approx(least, rel=1e-10)
        hosvd_out = np.linalg.svd(metric.least_squares())[0][:, :r_out]
        core = least_squares_in(basis, M.T @ hosvd_out)
        assert joint < metric.distortion(hosvd_out @ (kron(u) @ core).T)


@pytest.mark.parametrize("dense", [0, 500])
@pytest.mark.parametrize("ranks", PAIRS)
def test_sweeps_never_ascend(ranks, dense, monkeypatch):
    monkeypatch.setattr(tucker, "DENSE_UNKNOWNS", dense)
    metric = metric_of(SHAPE)
    found = [
        metric.distortion(tucker2(metric, SHAPE, ranks, sweeps=s, tol=0).full()) for s in range(8)
    ]
    assert np.all(np.diff(found) <= 1e-12 * metric.v)
    if ranks[1] < 5:
        assert found[-1] < 0.9999 * found[0]


@pytest.mark.parametrize("ranks", [(2, 2), (4, 3), (6, 2)])
def test_the_answer_is_jointly_optimal_at_its_own_input_factor(ranks):
    metric = metric_of(SHAPE)
    chain = tucker2(metric, SHAPE, ranks)
    curve = lowrank_curve(narrowed(metric, chain.factors[0].weight[:, :, 0, 0].T))
    assert metric.distortion(chain.full()) == pytest.approx(curve[ranks[0]], rel=1e-9)


def test_a_planted_weight_is_found():
    x, _, _ = rows(SHAPE)
    g = np.random.default_rng(5)
    core, u_in, u_out = (
        g.standard_normal((3, 2, 3, 2)),
        g.standard_normal((5, 2)),
        g.standard_normal((6, 3)),
    )
    W = np.einsum("tq,qphw,cp->tchw", u_out, core, u_in)
    metric = Metric.symmetric(W, np.cov(x.T))
    np.testing.assert_allclose(tucker2(metric, SHAPE, (3, 2)).full(), W, atol=1e-7)


def test_full_outer_ranks_drop_their_factor():
    def axes(ranks):
        return [f.axes for f in tucker2(metric_of(SHAPE), SHAPE, ranks).factors]

    assert axes((3, 2)) == ["", "hw", ""]
    assert axes((3, 5)) == ["hw", ""]
    assert axes((6, 2)) == ["", "hw"]
    assert axes((6, 5)) == ["hw"]


@pytest.mark.parametrize("shape", [SHAPE, (4, 5, 1, 3), (7, 4, 1, 1)])
def test_the_table_is_every_pair_at_the_start(shape, accepts_only):
    metric = metric_of(shape)
    T, c = shape[:2]

    def at(i, j):
        return metric.distortion(tucker2(metric, shape, (j, i), sweeps=0).full())

    expected = np.array([[at(i, j) for j in range(1, T + 1)] for i in range(1, c + 1)])

    def equal(table):
        np.testing.assert_allclose(table, expected, rtol=1e-9)

    accepts_only(equal, tucker2_curves(metric, shape))
    assert np.all(np.diff(expected, axis=0) <= 1e-12) and np.all(np.diff(expected, axis=1) <= 1e-12)


def test_the_last_row_of_the_table_is_low_rank():
    metric = metric_of(SHAPE)
    np.testing.assert_allclose(
        tucker2_curves(metric, SHAPE)[-1], lowrank_curve(metric)[1:], rtol=1e-9
    )


def test_the_table_of_a_rank_deficient_input():
    x, t, _ = rows(SHAPE)
    x[:, 6:12] = 0.0
    x[:, 13] = x[:, 14]
    metric = Metric.of(Moments.of(x, t))
    table = tucker2_curves(metric, SHAPE)
    for i, j in ((1, 1), (2, 4), (4, 6), (5, 3), (5, 6)):
        chain = tucker2(metric, SHAPE, (j, i), sweeps=0)
        assert table[i - 1, j - 1] == pytest.approx(metric.distortion(chain.full()), rel=1e-7)


def test_the_start_in_weight_space_is_the_hosvd(accepts_only):
    _, _, W = rows(SHAPE)
    U = np.linalg.svd(W.transpose(1, 2, 3, 0).reshape(5, -1))[0][:, :2]

    def same_span(u):
        np.testing.assert_allclose(u @ u.T, U @ U.T, atol=1e-10)

    accepts_only(same_span, input_basis(Metric.weight_space(W), 5)[:, :2], blind=("flipped",))


def test_the_narrowed_metric_is_that_of_narrowed_rows():
    x, t, _ = rows(SHAPE)
    u = np.random.default_rng(1).standard_normal((5, 2))
    small = narrowed(Metric.of(Moments.of(x, t)), u)
    expected = Metric.of(Moments.of(x @ kron(u), t))
    for name in ("S", "C", "v", "mu_x", "mu_t"):
        np.testing.assert_allclose(getattr(small, name), getattr(expected, name), atol=1e-9)


def test_a_published_sweep_is_three_least_squares_solves(accepts_only):
    x, _, W = rows(SHAPE)
    metric = Metric.symmetric(W, x.T @ x / len(x))
    R, _, M = metric.whitened()
    u_in = np.linalg.svd(W.transpose(1, 2, 3, 0).reshape(5, -1))[0][:, :2]
    u_out = np.linalg.svd(W.reshape(6, -1))[0][:, :3]

    def core_of(u_in, u_out):
        design = np.kron(R.T @ kron(u_in), u_out)
        return least_squares_in(design, M.T.ravel()).reshape(-1, 3)

    core = core_of(u_in, u_out)
    u_in = dense_input(metric, core.reshape(2, 6, 3), u_out, 5)
    u_out = least_squares_in(R.T @ kron(u_in) @ core, M.T).T
    core = core_of(u_in, u_out)
    expected = (u_out @ core.T @ kron(u_in).T).reshape(SHAPE)

    def equal(answer):
        np.testing.assert_allclose(answer, expected, atol=1e-6)

    accepts_only(equal, tucker2_published(metric, SHAPE, (3, 2), sweeps=1).full())


def test_a_published_rise_restores_the_last_state(monkeypatch):
    metric, calls = metric_of(SHAPE), []

    def broken(operator, right, **options):
        calls.append(None)
        return minres(operator, right, **options) if len(calls) == 1 else (np.ones(right.size), 0)

    once = tucker2_published(metric, SHAPE, (3, 2), sweeps=1).full()
    monkeypatch.setattr(tucker, "minres", broken)
    np.testing.assert_array_equal(tucker2_published(metric, SHAPE, (3, 2)).full(), once)
    assert len(calls) == 2


def test_published_and_ours_meet():
    x, _, W = rows(SHAPE)
    metric = Metric.symmetric(W, x.T @ x / len(x))
    ours = metric.distortion(tucker2(metric, SHAPE, (4, 3), sweeps=100, tol=1e-9).full())
    theirs = metric.distortion(tucker2_published(metric, SHAPE, (4, 3)).full())
    assert theirs == pytest.approx(ours, rel=1e-3)
    first = metric.distortion(tucker2(metric, SHAPE, (4, 3), sweeps=0).full())
    assert theirs <= first


@pytest.mark.parametrize("ranks", [(6, 5), (6, 2), (2, 5)])
def test_published_at_full_outer_ranks(ranks):
    x, _, W = rows(SHAPE)
    metric = Metric.symmetric(W, x.T @ x / len(x))
    ours = metric.distortion(tucker2(metric, SHAPE, ranks, sweeps=50).full())
    theirs = metric.distortion(tucker2_published(metric, SHAPE, ranks, sweeps=30).full())
    assert theirs <= 1.05 * ours + 1e-9 * metric.v


def test_sigma_of_other_data_costs_and_still_beats_the_weight_space():
    x, _, W = rows(SHAPE)
    scale = np.exp(0.2 * np.random.default_rng(0).standard_normal(metric_of(SHAPE).D))
    own = Metric.symmetric(W, np.cov(x.T))
    other = Metric.symmetric(W, np.cov((x * scale).T))
    plain = Metric.weight_space(W)
    a, b, c = (
        own.distortion(tucker2_published(m, SHAPE, (3, 3)).full()) for m in (own, other, plain)
    )
    assert a < b < c
