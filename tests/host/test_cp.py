"""CP: every update against dense least squares, descent, planted terms, bounded terms."""

from __future__ import annotations

import numpy as np
import pytest
from layer_rows import metric_of, rows

from edgesolve.host import cp as module
from edgesolve.host import tucker
from edgesolve.host.cp import balanced, cp, khatri_rao, refitted_mode, refitted_output
from edgesolve.host.metric import Metric

SHAPE = (5, 4, 3, 2)
RANK = 4


def terms(dims, seed=0, rank=RANK):
    g = np.random.default_rng(seed)
    return [g.standard_normal((m, rank)) for m in dims], g.standard_normal((SHAPE[0], rank))


def dense(metric, weight_of, shape):
    """The array of `shape` in which weight_of is linear and that lies closest to the target, by lstsq."""
    R, _, M = metric.whitened()
    columns = []
    for index in np.ndindex(shape):
        one = np.zeros(shape)
        one[index] = 1.0
        columns.append((weight_of(one) @ R).ravel())
    return np.linalg.lstsq(np.stack(columns, axis=1), M.ravel(), rcond=None)[0].reshape(shape)


@pytest.mark.parametrize("dims", [(4, 3, 2), (4, 6)])
def test_every_update_is_a_dense_least_squares_solve(dims, accepts_only):
    metric = metric_of(SHAPE)
    modes, u_out = terms(dims)

    def check(found, expected):
        accepts_only(lambda a: np.testing.assert_allclose(a, expected, atol=1e-8), found)

    check(
        refitted_output(metric, modes),
        dense(metric, lambda u: u @ khatri_rao(modes).T, u_out.shape),
    )
    for at in range(len(dims)):

        def weight_of(u, at=at):
            return u_out @ khatri_rao([*modes[:at], u, *modes[at + 1 :]]).T

        check(refitted_mode(metric, modes, u_out, at), dense(metric, weight_of, modes[at].shape))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_iterated_update_descends_nearly_as_far(at, monkeypatch):
    metric = metric_of(SHAPE)
    modes, u_out = terms((4, 3, 2))

    def distortion(u):
        return metric.distortion(u_out @ khatri_rao([*modes[:at], u, *modes[at + 1 :]]).T)

    exact = distortion(refitted_mode(metric, modes, u_out, at))
    monkeypatch.setattr(tucker, "DENSE_UNKNOWNS", 0)
    iterated = distortion(refitted_mode(metric, modes, u_out, at))
    assert exact <= iterated <= exact + 1e-4 * (distortion(modes[at]) - exact)


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("dense_up_to", [0, 500])
def test_sweeps_never_ascend(separable, dense_up_to, monkeypatch):
    monkeypatch.setattr(tucker, "DENSE_UNKNOWNS", dense_up_to)
    metric = metric_of(SHAPE)

    def at(sweeps):
        chain = cp(metric, SHAPE, RANK, separable=separable, sweeps=sweeps, seeds=0, tol=0)
        return metric.distortion(chain.full())

    found = [at(s) for s in range(8)]
    assert np.all(np.diff(found) <= 1e-12 * metric.v)
    assert found[-1] < 0.9 * found[0]


def test_the_start_keeps_the_largest_terms():
    """For S = A ⊗ I the slices' terms are orthogonal: what is left out is at most their energy."""
    W, A = rows(SHAPE)[2], np.cov(np.random.default_rng(1).standard_normal((4, 9)))
    R = np.linalg.cholesky(A)
    metric = Metric.symmetric(W, np.kron(A, np.eye(6)))
    white = np.einsum("tchw,cp->tphw", W, R)
    h, w = (np.linalg.svd(np.moveaxis(white, i, 0).reshape(k, -1))[0] for i, k in ((2, 3), (3, 2)))
    values = np.linalg.svd(np.einsum("tphw,hx,wy->xytp", white, h, w), compute_uv=False)
    energy = np.sort(values.ravel() ** 2)[::-1]
    for rank in (1, 6, 15, 24):
        start = metric.distortion(cp(metric, SHAPE, rank, sweeps=0, seeds=0).full())
        assert start <= energy[rank:].sum() + 1e-9 * metric.v


def test_starts_beyond_the_bound_do_not_count(monkeypatch):
    metric = metric_of(SHAPE)
    first, h, w, _ = (f.weight for f in cp(metric, SHAPE, RANK, seeds=0).factors)
    good = [first[..., 0, 0].T, h[:, 0, :, 0].T, w[:, 0, 0, :].T]
    start = metric.distortion(cp(metric, SHAPE, RANK, sweeps=0, seeds=0).full())
    monkeypatch.setattr(module, "_random", lambda *_: [good])
    assert metric.distortion(cp(metric, SHAPE, RANK, sweeps=0).full()) < start
    monkeypatch.setattr(module, "CANCELLATION", 0.0)
    assert metric.distortion(cp(metric, SHAPE, RANK, sweeps=0).full()) == start


def test_a_random_start_can_only_help():
    metric = metric_of(SHAPE)
    found = [metric.distortion(cp(metric, SHAPE, RANK, seeds=s).full()) for s in range(4)]
    assert np.all(np.diff(found) <= 0)


@pytest.mark.parametrize("separable", [True, False])
def test_planted_terms_are_found(separable):
    x, _, _ = rows(SHAPE)
    (c, h, w), u_out = terms((4, 3, 2), seed=3, rank=2)
    W = np.einsum("tr,cr,hr,wr->tchw", u_out, c, h, w)
    metric = Metric.symmetric(W, np.cov(x.T))
    chain = cp(metric, SHAPE, 2, separable=separable, sweeps=100, tol=1e-12, seeds=2)
    np.testing.assert_allclose(chain.full(), W, atol=1e-4)


def test_its_factors():
    def kinds(shape, **options):
        return [
            (f.axes, f.groups) for f in cp(metric_of(shape), shape, 3, sweeps=1, **options).factors
        ]

    assert kinds(SHAPE) == [("", 1), ("h", 3), ("w", 3), ("", 1)]
    assert kinds(SHAPE, separable=False) == [("", 1), ("hw", 3), ("", 1)]
    assert kinds((5, 4, 1, 3)) == [("", 1), ("hw", 3), ("", 1)]
    assert kinds((5, 4, 1, 1)) == [("hw", 1), ("", 1)]


def test_balancing_keeps_every_term(accepts_only):
    modes, u_out = terms((4, 3, 2))
    modes[0] *= 1e3
    even, out = balanced(modes, u_out)
    norms = [np.linalg.norm(u, axis=0) for u in [*even, out]]
    np.testing.assert_allclose(norms, np.tile(norms[0], (4, 1)))

    def equal(answer):
        np.testing.assert_allclose(
            answer @ khatri_rao(even).T, u_out @ khatri_rao(modes).T, rtol=1e-9
        )

    accepts_only(equal, out)
    dead, zero = balanced([np.zeros((4, 1)), np.ones((3, 1))], np.ones((5, 1)))
    assert not np.any(dead[0]) and not np.any(zero)


def test_terms_that_cancel_stay_bounded(monkeypatch):
    """A tensor of border rank 2 and rank 3: the best CP of rank 2 doesn't exist, its terms diverge."""
    a, b = np.eye(2)
    parts = [(b, a, a), (a, b, a), (a, a, b)]
    W = sum(np.einsum("t,c,k->tck", *p) for p in parts).reshape(2, 2, 1, 2)
    metric = Metric.weight_space(W)

    def size(chain):
        c, k, t = (f.weight[..., 0, :] if i == 1 else f.weight for i, f in enumerate(chain.factors))
        sums = [
            np.sum(c**2, axis=(1, 2, 3)),
            np.sum(k**2, axis=(1, 2)),
            np.sum(t**2, axis=(0, 2, 3)),
        ]
        return np.sum(np.prod(sums, axis=0)) / np.vdot(W, W)

    monkeypatch.setattr(module, "CANCELLATION", np.inf)
    free = cp(metric, W.shape, 2, sweeps=150, tol=0, seeds=1)
    monkeypatch.setattr(module, "CANCELLATION", 3.0)
    bound = cp(metric, W.shape, 2, sweeps=150, tol=0, seeds=1)
    assert size(bound) <= 3.0 < size(free)
    assert metric.distortion(free.full()) < metric.distortion(bound.full()) < 0.2 * metric.v
