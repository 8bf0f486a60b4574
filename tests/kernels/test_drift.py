"""The drift score against an integral, and laws that a wrong one breaks."""

import numpy as np
import pytest

from edgesolve.kernels.drift import divergence


def kl_by_quadrature(m, v, m0, v0):
    """KL(N(m, v) || N(m0, v0)) by summing over a fine grid."""
    x = np.linspace(m - 12 * v**0.5, m + 12 * v**0.5, 200_001)
    p = np.exp(-0.5 * (x - m) ** 2 / v) / np.sqrt(2 * np.pi * v)
    log_ratio = 0.5 * ((x - m0) ** 2 / v0 - (x - m) ** 2 / v + np.log(v0 / v))
    return np.sum(p * log_ratio) * (x[1] - x[0])


@pytest.mark.parametrize("m, v", [(0.0, 1.0), (0.7, 1.0), (0.0, 2.5), (-1.2, 0.3)])
def test_it_is_the_divergence_of_two_gaussians(m, v):
    ref = np.array([0.2]), np.array([1.4])
    expected = kl_by_quadrature(m, v, 0.2, 1.4)
    found = divergence(np.array([m]), np.array([v]), *ref)
    assert found == pytest.approx(expected, rel=2e-3, abs=1e-9)  # the floor is 1e-3 of the variance
    for mutant in (0.0, 2 * found, divergence(*ref, np.array([m]), np.array([v]))):
        assert mutant != pytest.approx(expected, rel=2e-3, abs=1e-9)


def test_it_is_zero_only_for_equal_statistics_and_free_of_units():
    rng = np.random.default_rng(0)
    m, v = rng.normal(size=8), rng.uniform(0.5, 2, 8)
    assert divergence(m, v, m, v) == 0.0
    moved = divergence(m + 0.1, v, m, v)
    assert moved > 0
    assert divergence(9 * (m + 0.1), 81 * v, 9 * m, 81 * v) == pytest.approx(moved, rel=1e-12)


def test_many_windows_at_once_equal_one_by_one():
    rng = np.random.default_rng(1)
    m, v = rng.normal(size=(5, 8)), rng.uniform(0.5, 2, (5, 8))
    ref = np.zeros(8), np.ones(8)
    one_by_one = [divergence(a, b, *ref) for a, b in zip(m, v, strict=True)]
    np.testing.assert_array_equal(divergence(m, v, *ref), one_by_one)


def test_a_dead_channel_does_not_drown_the_others():
    ref_mean, ref_var = np.zeros(3), np.array([1.0, 1.0, 0.0])
    found = divergence(np.array([0.0, 0.0, 1e-4]), np.array([1.0, 1.0, 1e-9]), ref_mean, ref_var)
    assert found < 1e-4
