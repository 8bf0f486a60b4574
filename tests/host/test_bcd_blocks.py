import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar

from edgesolve.host import bcd_blocks as blocks

GAMMA, RHO, TAU, ALPHA = 1.3, 0.7, 0.4, 0.6


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def half(a):
    return 0.5 * float(np.sum(np.square(a)))


def assert_minimises(cost, found, tol=1e-9):
    """No quasi-Newton run from `found` goes lower, and it does from a scaled or shifted answer."""
    flat = np.concatenate([np.ravel(f) for f in found])
    shapes = [np.shape(f) for f in found]

    def of(x):
        parts = np.split(x, np.cumsum([int(np.prod(s)) for s in shapes])[:-1])
        return cost(*(p.reshape(s) for p, s in zip(parts, shapes, strict=True)))

    best = minimize(of, flat + 0.1, method="BFGS", options={"gtol": 1e-7}).fun
    assert of(flat) <= best + tol * (1.0 + best)
    for mutant in (0.0 * flat, 1.05 * flat, flat[::-1]):
        assert of(mutant) > best + 1e-4


@pytest.mark.parametrize("g", [0.1, 1.0, 1.2, 10.0])
def test_the_relu_step_is_the_published_case_formula(g):
    a, b = noise(2, 20_000) * 3
    root = np.sqrt(g * (g + 1.0)) - g
    mixed = a + g * b
    up = (mixed >= 0) & ((b >= 0) | (g * b >= -a * root))
    want = np.where(up, mixed / (1 + g), np.minimum(b, 0.0))
    assert np.allclose(blocks.relu_prox(a, b, g), want, atol=1e-12)


@pytest.mark.parametrize("g", [0.1, 1.2, 10.0])
def test_the_relu_step_beats_a_grid_and_a_line_search(g):
    def cost(u, a, b):
        return 0.5 * (np.maximum(u, 0) - a) ** 2 + 0.5 * g * (u - b) ** 2

    a, b = noise(2, 40, seed=1) * 2
    u = blocks.relu_prox(a, b, g)
    grid = np.linspace(-8, 8, 20_001)[:, None]
    assert (cost(u, a, b) <= cost(grid, a, b).min(axis=0) + 1e-12).all()
    for k in range(3):
        found = minimize_scalar(cost, args=(a[k], b[k]), bounds=(-8, 8), method="bounded")
        assert cost(u[k], a[k], b[k]) <= found.fun + 1e-9
    assert not (cost(np.minimum(b, 0), a, b) <= cost(u, a, b)).all()


def test_the_relu_step_keeps_nan_and_precision():
    a = np.array([1.0, np.nan, 1.0], np.float32)
    b = np.array([np.nan, 1.0, 2.0], np.float32)
    out = blocks.relu_prox(a, b, 2.0)
    assert out.dtype == np.float32
    assert np.array_equal(np.isnan(out), [True, True, False])


def test_the_output_blocks():
    Y, U, V, A = noise(4, 6, 3)
    assert_minimises(
        lambda v: half(v - Y) + GAMMA * half(v - U) + ALPHA * half(v - V),
        [blocks.output(Y, U, V, gamma=GAMMA, alpha=ALPHA)],
    )
    assert_minimises(
        lambda u: GAMMA * half(V - u) + RHO * half(u - A),
        [blocks.output_pre(V, A, gamma=GAMMA, rho=RHO)],
    )


def test_the_hidden_preactivations():
    V, A, U = noise(3, 8, 5)
    found = blocks.hidden_pre(V, A, U, gamma=GAMMA, rho=RHO, alpha=ALPHA)

    def cost(u):
        gap = GAMMA * np.square(V - np.maximum(u, 0)) + RHO * np.square(u - A)
        return 0.5 * (gap + ALPHA * np.square(u - U))

    grid = np.linspace(-6, 6, 4_001)
    best = np.min([cost(np.full_like(U, u)) for u in grid], axis=0)
    assert (cost(found) <= best + 1e-12).all()
    assert (cost(1.1 * found) > best + 1e-6).any()


@pytest.mark.parametrize("shape", [(3, 7), (7, 3)], ids=["wide", "tall"])
def test_the_hidden_activations_and_their_product(shape):
    W, b = noise(*shape), noise(shape[0], seed=1)
    U_next, U = noise(5, shape[0], seed=2), noise(5, shape[1], seed=3)
    V, A = blocks.hidden_post(W, b, U_next, U, gamma=GAMMA, rho=RHO)
    assert np.allclose(A, V @ W.T + b, atol=1e-12)
    assert_minimises(
        lambda v: GAMMA * half(v - np.maximum(U, 0)) + RHO * half(U_next - v @ W.T - b), [V]
    )


@pytest.mark.parametrize("tau", [0.0, TAU])
def test_weights_and_bias_together(tau):
    V, U = noise(9, 4), noise(9, 3, seed=1) + 2.0
    W, b, target = noise(3, 4, seed=2), noise(3, seed=3), noise(3, 4, seed=4)
    factor = blocks.affine_factor(blocks.gram(V), rho=RHO, alpha=ALPHA, tau=tau)
    found = blocks.affine(
        factor, V, U, V @ W.T + b, W, b, target if tau else None, rho=RHO, tau=tau
    )

    def cost(w, c):
        near = ALPHA * (half(w - W) + half(c - b)) + tau * half(w - target)
        return RHO * half(U - V @ w.T - c) + near

    assert_minimises(cost, found)


def test_the_bias_is_the_stated_formula_at_the_new_weights():
    V, U, W, b = noise(9, 4), noise(9, 3, seed=1), noise(3, 4, seed=2), noise(3, seed=3)
    factor = blocks.affine_factor(blocks.gram(V), rho=RHO, alpha=ALPHA, tau=0.0)
    W_new, b_new = blocks.affine(factor, V, U, V @ W.T + b, W, b, None, rho=RHO, tau=0.0)
    want = (ALPHA * b + RHO * (U - V @ W_new.T).sum(axis=0)) / (RHO * 9 + ALPHA)
    assert np.allclose(b_new, want, atol=1e-12)


def test_keeping_the_largest_beats_every_other_support():
    from itertools import combinations

    W, M = noise(2, 3), noise(2, 3, seed=1)
    found = blocks.keep_largest(W, M, 3, tau=TAU, alpha=ALPHA)

    def cost(m):
        return TAU * half(W - m) + ALPHA * half(m - M)

    best, mean = np.inf, (TAU * W + ALPHA * M) / (TAU + ALPHA)
    for support in combinations(range(6), 3):
        mask = np.zeros(6, bool)
        mask[list(support)] = True
        best = min(best, cost(np.where(mask.reshape(2, 3), mean, 0.0)))
    assert cost(found) == pytest.approx(best, rel=1e-12)
    assert np.count_nonzero(found) == 3
    assert cost(np.where(found != 0, W, 0.0)) > best + 1e-6


def test_the_pruned_matrix_is_a_copy():
    W = noise(3, 4)
    kept = W.copy()
    for k in (4, 12):
        M = blocks.keep_largest(W, W, k, tau=1.0, alpha=1.0)
        assert not np.shares_memory(M, W)
        M[:] = 7.0
        assert np.array_equal(W, kept)


def test_ties_keep_the_first():
    M = blocks.keep_largest(np.ones((2, 2)), np.ones((2, 2)), 3, tau=1.0, alpha=1.0)
    assert np.array_equal(M, [[1.0, 1.0], [1.0, 0.0]])


def test_streaming_gives_what_one_block_gives(monkeypatch):
    W, b = noise(3, 7), noise(3, seed=1)
    V, U_next, U = noise(50, 7, seed=4), noise(50, 3, seed=2), noise(50, 7, seed=3)
    whole = blocks.hidden_post(W, b, U_next, U, gamma=GAMMA, rho=RHO)[0], blocks.gram(V)
    slices = list(blocks.row_blocks(50, 56, 400))
    assert len(slices) == 8
    assert sorted(i for s in slices for i in range(50)[s]) == list(range(50))
    monkeypatch.setattr(blocks, "row_blocks", lambda n, *_: [slice(0, 17), slice(17, n)])
    parts = blocks.hidden_post(W, b, U_next, U, gamma=GAMMA, rho=RHO)[0], blocks.gram(V)
    for p, q in zip(whole, parts, strict=True):
        assert np.allclose(p, q, atol=1e-12)
    X = np.column_stack([V, np.ones(50)])
    assert np.allclose(whole[1], X.T @ X)


def test_a_singular_system_is_named():
    with pytest.raises(ValueError, match="4 unknowns is singular to float32"):
        blocks.spd_factor(-np.eye(4, dtype=np.float32), 0.0)
