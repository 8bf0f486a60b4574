"""Empirical VBMF against planted ranks, a plain transcription of the paper, and scipy's optimiser."""

import numpy as np
import pytest
from scipy.optimize import brentq, minimize

from edgesolve.host import vbmf
from edgesolve.host.vbmf import evbmf, tau_bar, threshold, tucker2_ranks, weakened

PLANTED = [(64, 576, 10, 0.5), (128, 300, 20, 1.0), (200, 200, 15, 0.7)]


def planted(L, M, rank, sigma, seed=0):
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal((L, rank)) @ rng.standard_normal((rank, M))
    return signal + sigma * rng.standard_normal((L, M))


@pytest.mark.parametrize(("L", "M", "rank", "sigma"), PLANTED)
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_rank_and_noise(L, M, rank, sigma, seed):
    found = evbmf(planted(L, M, rank, sigma, seed))
    assert found.rank == rank == len(found.shrunk)
    assert abs(found.sigma2**0.5 / sigma - 1) < 0.01


def test_planted_is_rejected_when_wrong():
    """What the last test asks isn't met without noise, by noise alone, or at another scale."""
    V = planted(*PLANTED[0])
    assert evbmf(np.random.default_rng(0).standard_normal((64, 576))).rank == 0
    assert abs(evbmf(2 * V).sigma2 ** 0.5 / 0.5 - 1) > 0.5
    assert evbmf(V[:, np.random.default_rng(0).permutation(576)]).rank == 10
    shuffled = np.random.default_rng(0).permutation(V.ravel()).reshape(V.shape)
    assert evbmf(shuffled).rank == 0


@pytest.mark.parametrize(
    ("a", "exact"), [(1.0, 2.5129), (0.5, 1.7826), (0.1, 0.8222), (1e-4, 0.0346)]
)
def test_tau_bar(a, exact):
    tau = tau_bar(a)
    assert abs(tau - exact) < 5e-5
    assert abs(np.log(1 + tau) / tau + np.log(1 + tau / a) / (tau / a) - 1) < 1e-12


def test_tau_bar_is_not_the_usual_approximation():
    for a, approximate in ((0.5, 1.7769), (0.1, 0.795), (1e-4, 0.0251)):
        assert abs(2.5129 * a**0.5 - approximate) < 5e-4
        assert tau_bar(a) > approximate * 1.002


@pytest.mark.parametrize("a", [1.0, 0.5, 0.1, 1e-4])
def test_threshold_is_where_keeping_starts_to_pay(a):
    """There the free energy of keeping a direction equals that of dropping it."""

    def gain(x):
        tau = 0.5 * (x - (1 + a) + np.sqrt((x - (1 + a)) ** 2 - 4 * a))
        return np.log(tau + 1) + a * np.log(tau / a + 1) - tau

    edge = (1 + a**0.5) ** 2  # below it keeping has no stationary point
    assert np.isclose(
        threshold(a), brentq(gain, edge * (1 + 1e-12), 10 * edge, xtol=1e-14), rtol=1e-9
    )


def bounds_by_the_paper(g, L, M):
    """Theorem 3 of Nakajima et al., with their indices from 1."""
    gamma = dict(enumerate(g, start=1))
    alpha = L / M
    H_bar = min(int(np.ceil(L / (1 + alpha))) - 1, L)
    mean = sum(gamma[h] ** 2 for h in range(H_bar + 1, L + 1)) / (M * (L - H_bar))
    low = max(gamma[H_bar + 1] ** 2 / (M * threshold(alpha)), mean)
    return low, sum(x**2 for x in gamma.values()) / (L * M)


@pytest.mark.parametrize(("L", "M"), [(1, 1), (1, 9), (5, 5), (6, 7), (64, 576), (7, 5000)])
def test_noise_bounds(L, M):
    g = np.sort(np.random.default_rng(L).random(L) + 0.1)[::-1]
    assert np.allclose(vbmf._noise_bounds(g, L, M), bounds_by_the_paper(g, L, M), rtol=1e-13)


def test_off_by_one_is_caught(monkeypatch):
    """Planted: as many strong directions as the theorem allows, 57 of 64. One more or less in the tail shows."""
    V = planted(64, 576, 57, 0.01)
    g = np.linalg.svd(V, compute_uv=False)
    right = vbmf._noise_bounds(g, 64, 576)
    for most in (56, 58):
        tail = g[most:] ** 2 / 576
        wrong = max(tail[0] / threshold(64 / 576), tail.mean())
        assert not np.isclose(wrong, right[0], rtol=1e-3)
    assert evbmf(V).rank == 57
    early = g[56:] ** 2 / 576
    monkeypatch.setattr(vbmf, "_noise_bounds", lambda *_: (early.mean(), right[1]))
    assert abs(evbmf(V).sigma2 ** 0.5 / 0.01 - 1) > 1


def free_energy(sigma2, g, L, M):
    """Twice the negative log evidence's bound over M, written out term by term."""
    alpha, energy = L / M, 0.0
    for x in g**2 / (M * sigma2):
        energy += x - np.log(x)
        if x > threshold(alpha):
            tau = 0.5 * (x - (1 + alpha) + np.sqrt((x - (1 + alpha)) ** 2 - 4 * alpha))
            energy += np.log(tau + 1) + alpha * np.log(tau / alpha + 1) - tau
    return energy


@pytest.mark.parametrize("case", ["planted", "weak", "decaying"])
def test_noise_is_the_minimum(case):
    rng = np.random.default_rng(1)
    V = {
        "planted": planted(30, 90, 5, 1.0),
        "weak": planted(30, 90, 5, 6.0),
        "decaying": rng.standard_normal((30, 90)) * np.exp(-np.arange(30) / 4)[:, None],
    }[case]
    g = np.linalg.svd(V, compute_uv=False)
    low, high = bounds_by_the_paper(g, 30, 90)
    every = np.geomspace(low, high, 2000)
    best = min(free_energy(s, g, 30, 90) for s in every)
    found = evbmf(V).sigma2
    assert low * (1 - 1e-9) <= found <= high * (1 + 1e-9)
    assert free_energy(found, g, 30, 90) <= best + 1e-6 * abs(best)
    for wrong in (0.5, 2.0):
        assert free_energy(found * wrong, g, 30, 90) > best + 1e-2


def test_shrunk_value_minimises_the_bound():
    """One kept direction: the free energy of its posterior, minimised numerically, has its mean at `shrunk`.

    Factors a (M,), b (L,) with Gaussian posteriors N(m_a u, s_a I), N(m_b v, s_b I), priors N(0, c_a), N(0, c_b).
    """
    L, M, g, sigma2 = 8, 20, 12.0, 1.0

    def energy(q):
        m_a, m_b = q[:2]
        s_a, s_b, c_a, c_b = np.exp(q[2:])
        fit = -2 * m_a * m_b * g + (m_a**2 + M * s_a) * (m_b**2 + L * s_b)
        return (
            fit / sigma2
            + M * np.log(c_a / s_a)
            + (m_a**2 + M * s_a) / c_a
            + L * np.log(c_b / s_b)
            + (m_b**2 + L * s_b) / c_b
        )

    start = np.r_[np.sqrt(g), np.sqrt(g), np.log([0.05, 0.05, 1.0, 1.0])]
    best = minimize(energy, start, method="BFGS", options={"gtol": 1e-9})
    values = np.r_[g, np.zeros(L - 1)]
    shrunk = evbmf(values, (L, M), sigma2).shrunk
    assert len(shrunk) == 1
    assert np.isclose(best.x[0] * best.x[1], shrunk[0], rtol=1e-6)


def test_known_noise_sets_the_threshold():
    V = planted(*PLANTED[0])
    assert evbmf(V, sigma2=0.25).rank == 10
    assert evbmf(V, sigma2=1e6).rank == 0
    g = np.linalg.svd(V, compute_uv=False)
    kept = evbmf(V, sigma2=0.25).shrunk
    assert (kept < g[:10]).all() and (kept > 0).all()


def test_equivariant():
    """Transposing, permuting and scaling by k: a small unit of weights isn't noise."""
    V = planted(*PLANTED[1])
    a = evbmf(V)
    assert np.isclose(evbmf(V.T).sigma2, a.sigma2, rtol=1e-6) and evbmf(V.T).rank == a.rank
    for k in (1e-6, 1e5):
        b = evbmf(k * V)
        assert b.rank == a.rank and np.isclose(b.sigma2, k**2 * a.sigma2, rtol=1e-6)
        assert np.allclose(b.shrunk, k * a.shrunk, rtol=1e-6)
    g = np.linalg.svd(V, compute_uv=False)
    assert evbmf(g[::-1], V.shape).sigma2 == a.sigma2


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_vectors_are_noise(shape):
    assert evbmf(np.ones(shape)).rank == 0


def test_exactly_low_rank():
    rng = np.random.default_rng(0)
    assert evbmf(rng.standard_normal((20, 3)) @ rng.standard_normal((3, 40))).rank == 3
    nothing = evbmf(np.zeros((4, 5)))
    assert (nothing.rank, nothing.sigma2, len(nothing.shrunk)) == (0, 0.0, 0)


def test_tucker2_ranks():
    rng = np.random.default_rng(0)
    core = rng.standard_normal((9, 5, 3, 3))
    u_out, u_in = rng.standard_normal((48, 9)), rng.standard_normal((32, 5))
    W = np.einsum("oa,abhw,ib->oihw", u_out, core, u_in) + 0.5 * rng.standard_normal((48, 32, 3, 3))
    assert tucker2_ranks(W) == (9, 5)
    assert tucker2_ranks(W.transpose(1, 0, 2, 3)) == (5, 9)
    assert tucker2_ranks(0 * W) == (0, 0)
    with pytest.raises(ValueError, match="a weight"):
        tucker2_ranks(W[0])


def test_weakened():
    assert [weakened(30, 100, w) for w in (0.0, 0.5, 1.0)] == [100, 65, 30]
    assert weakened(5, 100, 1.0) == 21
    assert weakened(5, 16, 1.0) == 16
    assert weakened(0, 100, 1.0) == 100
    for rank, full, w in ((5, 16, 1.1), (5, 16, np.nan), (17, 16, 0.5), (-1, 16, 0.5)):
        with pytest.raises(ValueError, match="must lie in"):
            weakened(rank, full, w)


def test_unfit_input_is_refused():
    with pytest.raises(ValueError, match="finite"):
        evbmf(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match="takes a matrix"):
        evbmf(np.ones(4))
    with pytest.raises(ValueError, match="has 4 singular values"):
        evbmf(np.ones(3), (4, 5))
    with pytest.raises(ValueError, match="sigma2 must be positive"):
        evbmf(np.eye(3), sigma2=0.0)
