import tracemalloc

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels import moments
from edgesolve.kernels.moments import Moments, pooled

FIELDS = ("n", "sx", "sxx", "stx", "st", "stt")


def rows(rng, n, d=5, c=3, mean=2.0):
    x = mean + rng.standard_normal((n, d)) @ rng.standard_normal((d, d))
    return x, x @ rng.standard_normal((d, c)) + rng.standard_normal((n, c))


def assert_same(a, b, rtol=1e-12):
    for field in FIELDS:
        left, right = np.asarray(getattr(a, field)), np.asarray(getattr(b, field))
        assert_allclose(left, right, rtol=rtol, atol=rtol * np.abs(right).max(initial=0))


def test_sums_are_those_of_the_rows(rng, accepts_only):
    x, t = rows(rng, 50)
    m = Moments.of(x, t)
    loops = sum(np.outer(a, a) for a in x)
    accepts_only(lambda got: assert_allclose(got, loops, rtol=1e-12), m.sxx)
    stx = sum(np.outer(b, a) for a, b in zip(x, t, strict=True))
    accepts_only(lambda got: assert_allclose(got, stx, rtol=1e-12, atol=1e-10), m.stx)
    assert (m.n, m.d, m.c) == (50, 5, 3)
    assert_allclose(m.stt, np.sum(t * t))


def test_centred_is_numpys_covariance(rng, accepts_only):
    x, t = rows(rng, 80)
    S, C, v = Moments.of(x, t).centred()
    joint = np.cov(np.hstack([x, t]).T, bias=True)
    accepts_only(lambda got: assert_allclose(got, joint[:5, :5], rtol=1e-9), S)
    accepts_only(lambda got: assert_allclose(got, joint[5:, :5], rtol=1e-9, atol=1e-10), C)
    assert_allclose(v, np.trace(joint[5:, 5:]))


@pytest.mark.parametrize("cuts", [(1,), (20, 21), (7, 30, 55)])
def test_any_split_adds_up_in_any_order(rng, cuts):
    x, t = rows(rng, 60)
    parts = [Moments.of(a, b) for a, b in zip(np.split(x, cuts), np.split(t, cuts), strict=True)]
    whole = Moments.of(x, t)
    assert_same(sum(parts, Moments.zeros(5, 3)), whole)
    assert_same(sum(parts[::-1], Moments.zeros(5, 3)), whole)


def test_tiles_change_nothing_and_bound_the_copy(rng, monkeypatch):
    x, t = rows(rng, 40_000, d=8, c=2)
    x, t = x.astype(np.float32), t.astype(np.float32)
    whole = Moments.of(x, t)
    monkeypatch.setattr(moments, "TILE_FLOATS", 1 << 12)
    tracemalloc.start()
    tiled = Moments.of(x, t)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_same(tiled, whole)
    assert peak < 200_000 < 8 * x.size  # the whole float64 copy would be 2.5 MB


def test_unlearning_restores_the_record(rng):
    a, b = Moments.of(*rows(rng, 40)), Moments.of(*rows(rng, 30))
    back = (a + b) - b
    assert_same(back, a)
    assert np.linalg.eigvalsh(back.sxx)[0] >= 0


def test_unlearning_all_but_few_rows_stays_positive_semidefinite(rng):
    x, t = rows(rng, 1000, d=20, mean=100.0)
    few, many = Moments.of(x[:3], t[:3]), Moments.of(x[3:], t[3:])
    back = (few + many) - many
    assert np.linalg.eigvalsh(back.sxx)[0] >= -1e-15 * np.trace(back.sxx)
    assert_same(back, few, rtol=1e-7)


def test_unlearning_everything_leaves_nothing(rng):
    m = Moments.of(*rows(rng, 40))
    assert_same(m - m, Moments.zeros(5, 3))


def test_unlearning_strangers_is_refused(rng):
    x, t = rows(rng, 40)
    m = Moments.of(x, t)
    with pytest.raises(ValueError, match="un-learn 41 rows from 40"):
        m - Moments.of(np.zeros((41, 5)), np.zeros((41, 3)))
    with pytest.raises(ValueError, match="smallest eigenvalue"):
        m - Moments.of(10 * x[:5], 0 * t[:5])
    with pytest.raises(ValueError, match="cannot meet"):
        m + Moments.zeros(4, 3)


def test_scaled_forgets_but_keeps_the_means(rng):
    m = Moments.of(*rows(rng, 40))
    half = m.scaled(0.5)
    assert half.n == 20
    assert_allclose(half.means()[0], m.means()[0])
    assert_allclose(half.centred()[0], m.centred()[0])
    with pytest.raises(ValueError, match="not negative"):
        m.scaled(-1)


def test_pooled_mass_is_a_ratio(rng):
    a, b = Moments.of(*rows(rng, 40)), Moments.of(*rows(rng, 10))
    assert_same(pooled(a, b, 0.0), a)
    assert_same(pooled(a, b, b.n / a.n), (a + b).scaled(a.n / (a.n + b.n)))
    half = pooled(a, b, 1.0)
    assert half.n == pytest.approx(a.n)
    assert_allclose(half.means()[0], (a.means()[0] + b.means()[0]) / 2)
    assert_same(pooled(a, b.scaled(7.0), 0.3), pooled(a, b, 0.3))
    with pytest.raises(ValueError, match="mass"):
        pooled(a, b, -0.1)
    with pytest.raises(ValueError, match="no rows"):
        pooled(a, Moments.zeros(5, 3), 1.0)


def test_error_from_the_record_is_that_of_the_rows(rng):
    x, t = rows(rng, 70)
    m = Moments.of(x, t)
    for _ in range(5):
        W, b = rng.standard_normal((5, 3)), rng.standard_normal(3)
        direct = np.mean(np.sum((t - x @ W - b) ** 2, axis=1))
        assert_allclose(m.mean_squared_error(W, b), direct, rtol=1e-10)
        assert m.mean_squared_error(W, 1.1 * b) != pytest.approx(direct, rel=1e-6)
    with pytest.raises(ValueError, match=r"\(5, 3\)"):
        m.mean_squared_error(W.T, b)


def test_storage_loses_nothing_in_float64_and_little_in_float32(rng):
    x, t = rows(rng, 200, d=6, mean=1000.0)
    m = Moments.of(x, t)
    assert_same(Moments.from_arrays(m.to_arrays(np.float64)), m)
    stored = m.to_arrays()
    assert stored["s"].dtype == np.float32 and stored["s"].shape == (21,)
    assert {v.dtype for k, v in stored.items() if k != "s"} == {np.dtype(np.float64)}
    S, C, v = m.centred()
    S32, C32, v32 = Moments.from_arrays(stored).centred()
    assert_allclose(S32, S, rtol=1e-6, atol=1e-7 * np.abs(S).max())
    assert_allclose(C32, C, atol=1e-6 * np.abs(C).max())
    assert_allclose(v32, v, rtol=1e-6)
    # The same float32, not centred, is off by far more: the check above can fail.
    raw = m.sxx.astype(np.float32) / m.n - np.outer(*[m.means()[0]] * 2)
    assert np.abs(raw - S).max() > 1e-3 * np.abs(S).max()


def test_damaged_storage_is_refused(rng):
    stored = Moments.of(*rows(rng, 20)).to_arrays()
    with pytest.raises(ValueError, match="lack s"):
        Moments.from_arrays({k: v for k, v in stored.items() if k != "s"})
    with pytest.raises(ValueError, match="s of shape"):
        Moments.from_arrays(stored | {"s": stored["s"][:-1]})


def test_errors_name_what_was_found(monkeypatch):
    x, t = np.zeros((4, 2)), np.zeros((4, 1))
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(3, 1\)"):
        Moments.of(x, t[:3])
    with pytest.raises(ValueError, match="no rows"):
        Moments.of(x[:0], t[:0])
    x[2, 0], x[3, 1] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"x .* 2 values that are not finite, the first in row 2"):
        Moments.of(x, t)
    monkeypatch.setattr(moments, "TILE_FLOATS", 2)
    with pytest.raises(ValueError, match=r"x .* 2 values that are not finite, the first in row 2"):
        Moments.of(x, t)
    with pytest.raises(ValueError, match="no rows have no mean"):
        Moments.zeros(2, 1).means()
    with pytest.raises(ValueError, match="shapes"):
        Moments(1.0, np.zeros(2), np.zeros((3, 3)), np.zeros((1, 2)), np.zeros(1), 0.0)
