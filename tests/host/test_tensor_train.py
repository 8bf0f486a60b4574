"""Tensor train: the TT-SVD, each core against dense least squares, descent, the separable pair."""

from __future__ import annotations

import numpy as np
import pytest
from layer_rows import metric_of, rows
from scipy.optimize import minimize

from edgesolve.host import tucker
from edgesolve.host.metric import Metric
from edgesolve.host.tensor_train import _first, tensor_train

SHAPE = (5, 4, 3, 2)
RANKS = [(2, 3, 2), (3, 4, 3), (4, 4, 5), (4, 2, 3), (2, 3, 5)]


def tt_svd(W, ranks):
    """Oseledets' algorithm over (c, kh, kw, T), as a weight."""
    _, c, kh, kw = W.shape
    rest, cores, left = W.transpose(1, 2, 3, 0), [], 1
    for m, r in zip((c, kh, kw), ranks, strict=True):
        U, s, V = np.linalg.svd(rest.reshape(left * m, -1), full_matrices=False)
        cores.append(U[:, :r].reshape(left, m, r))
        rest, left = s[:r, None] * V[:r], r
    return np.einsum("acx,xhy,ywz,zt->tchw", *cores, rest)


@pytest.mark.parametrize("ranks", RANKS)
def test_in_weight_space_without_sweeps_it_is_the_tt_svd(ranks, accepts_only):
    _, _, W = rows(SHAPE)
    expected = tt_svd(W, ranks)

    def equal(answer):
        np.testing.assert_allclose(answer, expected, atol=1e-10)

    accepts_only(equal, tensor_train(Metric.weight_space(W), SHAPE, ranks, sweeps=0).full())


@pytest.mark.parametrize("dense", [0, 500])
@pytest.mark.parametrize("ranks", RANKS)
def test_sweeps_never_ascend(ranks, dense, monkeypatch):
    monkeypatch.setattr(tucker, "DENSE_UNKNOWNS", dense)
    metric = metric_of(SHAPE)
    found = [
        metric.distortion(tensor_train(metric, SHAPE, ranks, sweeps=s, tol=0).full())
        for s in range(8)
    ]
    assert np.all(np.diff(found) <= 1e-12 * metric.v)
    assert found[-1] < 0.999 * found[0]


@pytest.mark.parametrize("ranks", RANKS[:3])
def test_every_core_is_the_best_given_the_others_in_the_end(ranks):
    """The distortion is quadratic in a core: a dense least-squares solve for each finds nothing to gain."""
    metric = metric_of(SHAPE)
    chain = tensor_train(metric, SHAPE, ranks, sweeps=500, tol=1e-13)
    R, _, M = metric.whitened()
    for at, factor in enumerate(chain.factors):
        columns = []
        for index in np.ndindex(factor.weight.shape):
            one = np.zeros(factor.weight.shape)
            one[index] = 1.0
            columns.append((with_core(chain, at, one).reshape(metric.T, -1) @ R).ravel())
        design = np.stack(columns, axis=1)
        core = np.linalg.lstsq(design, M.ravel(), rcond=None)[0].reshape(factor.weight.shape)
        least = metric.distortion(with_core(chain, at, core))
        assert metric.distortion(chain.full()) == pytest.approx(least, rel=1e-6)


def test_the_first_update_and_what_its_neighbour_takes_up_are_a_dense_solve(accepts_only):
    metric = metric_of(SHAPE)
    chain = tensor_train(metric, SHAPE, (2, 3, 2), sweeps=0)
    first, second, third, last = (f.weight for f in chain.factors)
    basis, carry = _first(
        metric,
        first[..., 0, 0].T,
        second[..., 0].transpose(1, 2, 0).reshape(6, 3),
        third.reshape(2, 6),
        last[..., 0, 0],
    )
    R, _, M = metric.whitened()
    units = np.eye(first.size).reshape(-1, *first.shape)
    design = [(with_core(chain, 0, one).reshape(metric.T, -1) @ R).ravel() for one in units]
    expected = np.linalg.lstsq(np.stack(design, axis=1), M.ravel(), rcond=None)[0].reshape(2, 4).T

    def equal(carry):
        np.testing.assert_allclose(basis @ carry, expected, atol=1e-8)

    accepts_only(equal, carry)
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-12)


def with_core(chain, at, weight):
    factors = [f.weight for f in chain.factors]
    factors[at] = weight
    whole = np.eye(chain.factors[0].c_in)[:, :, None, None]
    for w in factors:
        whole = np.einsum("oihw,icHW->ochHwW", w, whole)
        o, c, h, H, k, K = whole.shape
        whole = whole.reshape(o, c, h * H, k * K)
    return whole


def test_a_numeric_descent_on_both_kernels_gains_nothing():
    shape = (3, 2, 2, 2)
    metric = metric_of(shape)
    chain = tensor_train(metric, shape, (2, 2, 3), sweeps=500, tol=1e-13)
    vertical, horizontal = (f.weight for f in chain.factors)

    def loss(z):
        v, h = (
            z[: vertical.size].reshape(vertical.shape),
            z[vertical.size :].reshape(horizontal.shape),
        )
        return metric.distortion(np.einsum("tqow,qcho->tchw", h, v))

    start = np.concatenate([vertical.ravel(), horizontal.ravel()])
    found = minimize(loss, start, method="BFGS", options={"gtol": 1e-8}).fun
    assert metric.distortion(chain.full()) == pytest.approx(found, rel=1e-7)
    assert minimize(loss, 1.1 * start, method="BFGS", options={"gtol": 1e-8}).fun > found * (
        1 - 1e-7
    )


def test_a_planted_train_is_found():
    x, _, _ = rows(SHAPE)
    g = np.random.default_rng(5)
    a, b, d, e = (g.standard_normal(s) for s in ((4, 2), (2, 3, 3), (3, 2, 2), (2, 5)))
    W = np.einsum("cx,xhy,ywz,zt->tchw", a, b, d, e)
    metric = Metric.symmetric(W, np.cov(x.T))
    np.testing.assert_allclose(tensor_train(metric, SHAPE, (2, 3, 2)).full(), W, atol=1e-7)


def test_full_outer_ranks_drop_their_factor():
    def axes(ranks):
        return [f.axes for f in tensor_train(metric_of(SHAPE), SHAPE, ranks).factors]

    assert axes((2, 3, 2)) == ["", "h", "w", ""]
    assert axes((4, 3, 2)) == ["h", "w", ""]
    assert axes((2, 3, 5)) == ["", "h", "w"]
    assert axes((4, 3, 5)) == ["h", "w"]


def test_the_middle_rank_is_bounded_by_its_neighbours():
    with pytest.raises(
        ValueError, match=r"tensor_train of a \(5, 4, 3, 2\) weight takes .*r2 in 1\.\.4"
    ):
        tensor_train(metric_of(SHAPE), SHAPE, (2, 5, 2))
