from itertools import pairwise

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels import accel
from edgesolve.kernels.prox import (
    GRAM_SHARE,
    equal_groups,
    group_norms,
    group_sums,
    nuclear_norms,
    prox_group_l2,
    prox_nuclear,
    spectral_norms,
)

STARTS = np.array([0, 1, 4, 9, 12], np.int64)


def prox(v, thresh, starts=STARTS):
    out = np.full_like(v, np.nan)
    prox_group_l2(v, starts, thresh, out)
    return out


def assert_law(v, p, thresh):
    """v - p lies in thresh times the subdifferential of the norm at p, group by group."""
    for g, (a, b) in enumerate(pairwise(STARTS)):
        rest, size = v[a:b] - p[a:b], np.linalg.norm(p[a:b])
        if size > 0:
            assert_allclose(rest, thresh[g] * p[a:b] / size, rtol=1e-9, atol=1e-12)
        else:
            assert np.linalg.norm(rest) <= thresh[g] * (1 + 1e-12)


@pytest.mark.parametrize("c", [1, 3])
def test_law(rng, twin, accepts_only, c):
    v = rng.standard_normal((12, c))
    norms = group_norms(v, STARTS)
    thresh = norms * np.array([0.5, 0.2, 2.0, 0.9])  # the third group is switched off
    p = prox(v, thresh)
    assert not p[4:9].any()
    accepts_only(lambda got: assert_law(v, got, thresh), p)


def test_one_threshold_serves_all_groups(rng, twin):
    v = rng.standard_normal((12, 2))
    assert np.array_equal(prox(v, 0.3), prox(v, np.full(4, 0.3)))
    assert_allclose(prox(v, 0.0), v)


def test_in_place(rng, twin):
    v = rng.standard_normal((12, 2))
    expected = prox(v, 0.5)
    prox_group_l2(v, STARTS, 0.5, v)
    assert np.array_equal(v, expected)


def test_zero_groups_stay_zero_and_nan_stays_nan(twin):
    v = np.zeros((12, 2))
    v[2, 1] = np.nan
    out = prox(v, 0.1)
    assert np.isnan(out[1:4]).all() and not out[4:].any() and not out[:1].any()
    assert not prox(np.zeros((12, 2)), 0.0).any()


def test_twins_agree(rng, monkeypatch):
    if accel.compiled() is None:
        pytest.skip("no Numba")
    v = rng.standard_normal((12, 3))
    fast = prox(v, 0.7)
    monkeypatch.setattr(accel, "compiled", lambda: None)
    assert_allclose(fast, prox(v, 0.7), rtol=1e-15, atol=1e-15)


def test_group_sums_and_norms(rng):
    v = rng.standard_normal((12, 3))
    parts = np.split(v, STARTS[1:-1])
    assert_allclose(group_sums(v, STARTS), [part.sum() for part in parts])
    assert_allclose(group_norms(v, STARTS), [np.linalg.norm(part) for part in parts])


def test_equal_groups_meet_every_row_once():
    met = {}
    for groups, rows in equal_groups(STARTS):
        met.update(zip(groups.tolist(), rows.tolist(), strict=True))
    assert met == {g: list(range(a, b)) for g, (a, b) in enumerate(pairwise(STARTS.tolist()))}


def soft_singular(v, thresh):
    P, s, Qt = np.linalg.svd(v, full_matrices=False)
    return P @ np.diag(np.maximum(s - thresh, 0)) @ Qt


@pytest.mark.parametrize("c", [1, 3, 7])
@pytest.mark.parametrize("share", [0.5, 2 * GRAM_SHARE, 0.5 * GRAM_SHARE, 0.0])
def test_singular_values_shrink_through_the_gram_as_through_an_svd(rng, accepts_only, share, c):
    """Blocks with singular values over seven decades, cut where the Gram is least exact."""
    v = rng.standard_normal((12, c)) @ np.diag(np.logspace(0, -7, c))
    thresh = share * spectral_norms(v, STARTS)
    slow = np.vstack(
        [soft_singular(v[a:b], thresh[g]) for g, (a, b) in enumerate(pairwise(STARTS))]
    )
    tol = {"rtol": 0, "atol": 1e-12 * np.abs(v).max()}
    accepts_only(lambda got: assert_allclose(got, slow, **tol), prox_nuclear(v, STARTS, thresh))


def test_what_is_cut_leaves_the_rank(rng):
    v = rng.standard_normal((12, 3))
    s = np.linalg.svd(v[4:9])[1]
    for thresh in (s[2] * 1.001, s[1] * 1.001, s[0] * 1.001):
        out = prox_nuclear(v, STARTS, np.array([0.0, 0.0, thresh, 0.0]))[4:9]
        left = np.linalg.svd(out)[1]
        assert_allclose(left, np.maximum(s - thresh, 0), atol=1e-14)
    assert not out.any()


def test_a_block_that_is_not_finite_spoils_no_other(rng):
    v = rng.standard_normal((12, 2))
    for bad in (np.nan, np.inf, 1e200):  # whose Gram overflows
        w = v.copy()
        w[2, 1] = bad
        with np.errstate(over="ignore", invalid="ignore"):
            out, norms = prox_nuclear(w, STARTS, np.full(4, 0.1)), spectral_norms(w, STARTS)
        assert (np.isnan(norms[1]) and not np.isfinite(out[2]).all()) or bad == 1e200
        assert_allclose(
            np.delete(out, [1, 2, 3], 0),
            np.delete(prox_nuclear(v, STARTS, np.full(4, 0.1)), [1, 2, 3], 0),
        )


def test_nuclear_and_spectral_norms(rng):
    v = rng.standard_normal((12, 3))
    parts = np.split(v, STARTS[1:-1])
    assert_allclose(nuclear_norms(v, STARTS), [np.linalg.norm(part, "nuc") for part in parts])
    assert_allclose(spectral_norms(v, STARTS), [np.linalg.norm(part, 2) for part in parts])
    thin = np.outer(v[:, 0], [1.0, 2.0, 3.0])
    assert_allclose(nuclear_norms(thin, STARTS), group_norms(thin, STARTS), rtol=1e-14)
