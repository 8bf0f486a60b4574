from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels import decompose as module
from edgesolve.kernels.cones import ReluSolution, relu_network
from edgesolve.kernels.decompose import decompose, trivial_decomposition
from edgesolve.kernels.interior import signs
from edgesolve.kernels.solution import Status


@pytest.fixture(scope="module")
def reference():
    """Least norms by cvxpy and Clarabel, one gate each: see data/make_cones.py."""
    with np.load(Path(__file__).parent / "data" / "cones.npz") as file:
        return dict(file)


def problem(rng, n=60, d=4, m=6, c=2):
    X, G = rng.standard_normal((n, d)), rng.standard_normal((d, m))
    return X, X @ G >= 0, G, rng.standard_normal((m, d, c))


def worst(X, D, U):
    return -np.min(signs(D)[:, :, None] * np.einsum("nd,mdc->nmc", X, U))


def lengths(v, w):
    return np.linalg.norm(v, axis=1) + np.linalg.norm(w, axis=1)


def test_it_is_the_shortest_that_cvxpy_finds(reference, accepts_only):
    X, G, U = (reference[k] for k in ("X", "G", "U"))
    D = X @ G >= 0
    v, _ = decompose(X, D, G, U.T[:, :, None], tol=1e-8)

    def check(v):
        w = v - U.T[:, :, None]
        assert max(worst(X, D, v), worst(X, D, w)) <= 0
        assert_allclose(lengths(v, w)[:, 0], reference["norms"], rtol=1e-7)

    accepts_only(check, v)


@pytest.mark.parametrize("make", [decompose, trivial_decomposition])
def test_both_parts_are_in_the_cones_and_differ_by_u(rng, make):
    X, D, G, U = problem(rng)
    U[2, :, 0] = 0.0
    U[3] *= 1e-8
    U[4] *= 1e8
    v, w = make(X, D, G, U)
    assert max(worst(X, D, v), worst(X, D, w)) <= 0
    assert_allclose(v - w, U, rtol=1e-9, atol=1e-13 * np.abs(v).max())
    assert not v[2, :, 0].any() and not w[2, :, 0].any()
    small = lengths(v, w)[3] / np.linalg.norm(U[3], axis=0)
    assert (small >= 1 - 1e-12).all() and (small < 1e6).all()


def test_it_is_never_longer_than_its_start_and_mostly_much_shorter(rng):
    for _ in range(3):
        arguments = problem(rng, n=80, d=5, m=4)
        trivial = lengths(*trivial_decomposition(*arguments))
        for steps in (0, 2, 50):
            ours = lengths(*decompose(*arguments, max_iter=steps))
            assert (ours <= trivial * (1 + 1e-12)).all()
        assert np.median(ours / trivial) < 0.5


def test_the_bound_holds_for_any_multipliers_and_meets_the_length(rng, monkeypatch):
    X, D, G, U = problem(rng, c=1)
    seen = []
    bound = module._lower_bound

    def spied(*arguments):
        out = bound(*arguments)
        seen.append((out.copy(), np.linalg.norm(arguments[3], axis=0)))
        return out

    monkeypatch.setattr(module, "_lower_bound", spied)
    v, w = decompose(X, D, G, U, tol=1e-7)
    least = np.sort(lengths(v, w)[:, 0] / np.linalg.norm(U, axis=1)[:, 0])
    assert len(seen) > 5
    for out, _ in seen[:-1]:
        if len(out) == len(least):  # before the first column is done
            assert (np.sort(out) <= least * (1 + 1e-9)).all()
    for _ in range(20):
        eta = np.abs(rng.standard_normal((60, 6)))
        u = U[:, :, 0].T
        lower = np.maximum(signs(D) * (X @ u), 0.0)
        p, q = rng.standard_normal((2, 4, 6))
        any_bound = bound(X.T @ (signs(D) * eta), p, q, u, np.sum(eta * lower, axis=0))
        assert (any_bound <= lengths(v, w)[:, 0] * (1 + 1e-6)).all()


def test_chunks_do_not_change_the_answer(rng, monkeypatch):
    arguments = problem(rng)
    whole, _ = decompose(*arguments)
    monkeypatch.setattr(module, "CHUNK_FLOATS", 1)
    pieces, _ = decompose(*arguments)
    assert_allclose(pieces, whole, rtol=1e-6)


def test_the_network_predicts_as_the_gated_model(rng, accepts_only):
    X, D, G, U = problem(rng)
    v, w = decompose(X, D, G, U)
    wanted = np.einsum("nm,nd,mdc->nc", D, X, U)
    none = np.zeros(2)
    solved = ReluSolution(v, w, none, Status.CONVERGED, none, none, 0.0, 0, 0.0)
    W1, W2, _ = relu_network(solved)

    def check(W1):
        assert_allclose(np.maximum(X @ W1.T, 0) @ W2, wanted, atol=1e-11)

    accepts_only(check, W1)


def test_rows_on_a_hyperplane_and_zero_rows(rng):
    X, _, G, U = problem(rng)
    X[0] -= (X[0] @ G[:, 0]) / (G[:, 0] @ G[:, 0]) * G[:, 0]
    X[1], X[2, :] = 0.0, [0.5, -0.5, 0.25, -0.25]
    G[:, 1] = 1.0  # X[2] G[:, 1] is an exact zero
    D = X @ G >= 0
    D[0, 0] = True
    for make in (decompose, trivial_decomposition):
        v, w = make(X, D, G, U)
        assert max(worst(X, D, v), worst(X, D, w)) <= 0


def test_a_spent_budget_still_gives_a_feasible_answer(rng):
    X, D, G, U = problem(rng)
    v, w = decompose(X, D, G, U, seconds=0.0)
    assert max(worst(X, D, v), worst(X, D, w)) <= 0
    assert (lengths(v, w) <= lengths(*trivial_decomposition(X, D, G, U)) * (1 + 1e-12)).all()


@pytest.mark.parametrize("make", [decompose, trivial_decomposition])
def test_bad_input_is_refused(rng, make):
    X, D, G, U = problem(rng)
    for arguments, message in (
        ((X, D, G, U[:3]), r"U must be \(6, 4, c\)"),
        ((X, D, G, U[0]), "U must be"),
        ((X, D, G, np.where(U > 1, np.inf, U)), "U must be"),
        ((X[:0], D[:0], G, U), "X must be"),
        ((X, D.astype(int), G, U), "D must be"),
        ((X, ~D, G, U), "disagrees with gate"),
    ):
        with pytest.raises(ValueError, match=message):
            make(*arguments)
