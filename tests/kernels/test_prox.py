from itertools import pairwise

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels import accel
from edgesolve.kernels.prox import group_norms, group_sums, prox_group_l2

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
