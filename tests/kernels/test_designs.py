import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from edgesolve.kernels import designs as module
from edgesolve.kernels.designs import Explicit, Masked, Pooled, columns_of, kronecker_of

DTYPES = (np.float32, np.float64)


@pytest.fixture(autouse=True, params=[module.TILE_FLOATS, 40])
def tile(request, monkeypatch):
    """All rows at a time, and a few."""
    monkeypatch.setattr(module, "TILE_FLOATS", request.param)


def tolerance(dtype):
    return {"rtol": 2e-4, "atol": 2e-4} if dtype is np.float32 else {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("stored", DTYPES)
def test_both_products_are_those_of_the_dense_rows(rng, twin, make_design, accepts_only, stored):
    design, A = make_design(rng, 23, stored)
    assert design.n == 23 and design.starts[-1] == A.shape[1] and design.starts[0] == 0
    for dtype in DTYPES:
        close = tolerance(dtype)
        for c in (1, 3):
            U = rng.standard_normal((A.shape[1], c)).astype(dtype)
            R = rng.standard_normal((23, c)).astype(dtype)
            forward, adjoint = design.forward(U), design.adjoint(R)
            assert forward.dtype == adjoint.dtype == dtype
            for got, slow in ((forward, A @ U), (adjoint, A.T @ R)):
                accepts_only(lambda x, a=slow, close=close: assert_allclose(x, a, **close), got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_adjoint_law(rng, twin, make_design, dtype):
    design, A = make_design(rng, 31, dtype)
    for c in (1, 2):
        U = rng.standard_normal((A.shape[1], c)).astype(dtype)
        R = rng.standard_normal((31, c)).astype(dtype)
        left, right = np.vdot(design.forward(U), R), np.vdot(U, design.adjoint(R))
        scale = np.linalg.norm(A) * np.linalg.norm(U) * np.linalg.norm(R)
        assert abs(left - right) <= 4 * np.finfo(dtype).eps * scale
        backward = np.asfortranarray(R)[::-1]  # neither order nor strides matter
        plain = design.adjoint(np.ascontiguousarray(backward))
        assert_allclose(design.adjoint(backward), plain, **tolerance(dtype))


def test_restrict_keeps_gates_in_their_order(rng, twin, make_design):
    design, A = make_design(rng, 19, np.float64)
    m = len(design.starts) - 1
    for gates in ([0], np.arange(m), np.arange(m)[::-1], np.arange(m)[::2]):
        gates = np.array(gates)
        columns, starts = columns_of(design.starts, gates)
        part = design.restrict(gates)
        assert_array_equal(part.starts, starts)
        U, R = rng.standard_normal((len(columns), 2)), rng.standard_normal((19, 2))
        assert_allclose(part.forward(U), A[:, columns] @ U, rtol=1e-12, atol=1e-12)
        assert_allclose(part.adjoint(R), A[:, columns].T @ R, rtol=1e-12, atol=1e-12)
        twice = part.restrict(np.array([len(gates) - 1]))
        last = columns_of(starts, [len(gates) - 1])[0]
        assert_allclose(twice.adjoint(R), part.adjoint(R)[last], rtol=1e-12, atol=1e-12)


def test_astype_changes_the_storage_alone(rng, make_design):
    design, A = make_design(rng, 19, np.float64)
    half = design.astype(np.float32)
    assert half.nbytes < design.nbytes
    U = rng.standard_normal((A.shape[1], 2))
    assert_allclose(half.forward(U), A @ U, rtol=1e-5, atol=1e-5)
    assert_array_equal(half.starts, design.starts)
    assert design.astype(np.float64).nbytes == design.nbytes


def test_columns_of():
    columns, rank = columns_of(np.array([0, 1, 4, 9]), [2, 0])
    assert columns.tolist() == [4, 5, 6, 7, 8, 0] and rank.tolist() == [0, 5, 6]


def test_kronecker_is_exact_where_q_is_one(rng, accepts_only):
    B, C = rng.standard_normal((9, 4)), rng.standard_normal((8, 3))
    Gamma, S = B.T @ B, C.T @ C
    [(gates, found, block)] = kronecker_of(np.kron(Gamma, S), np.arange(5) * 3)
    assert gates.tolist() == [0, 1, 2, 3]
    slow = np.kron(Gamma, S)
    accepts_only(lambda got: assert_allclose(np.kron(got, block), slow, rtol=1e-11), found)


def test_kronecker_covers_every_gate_once_with_the_mean_trace(rng, make_design):
    design, A = make_design(rng, 40, np.float64)
    Q, seen = A.T @ A / 40, []
    for gates, Gamma, S in design.kronecker():
        seen += gates.tolist()
        assert_allclose(Gamma, Gamma.T, atol=1e-12)
        assert_allclose(S, S.T, atol=1e-12)
        assert np.linalg.eigvalsh(S)[0] >= -1e-12
        if isinstance(design, Masked):  # an average over rows that no gate has masked
            assert_allclose(S, design.X.T @ design.X / 40)
            assert_allclose(Gamma, design.D.T.astype(float) @ design.D / 40)
            continue
        own = [columns_of(design.starts, [g])[0] for g in gates]
        traces = [[np.trace(Q[np.ix_(a, b)]) for b in own] for a in own]
        assert_allclose(Gamma * np.trace(S), traces, rtol=1e-10, atol=1e-12)
        assert_allclose(S, np.mean([Q[np.ix_(a, a)] for a in own], axis=0), atol=1e-12)
    assert sorted(seen) == list(range(len(design.starts) - 1))


def test_kronecker_of_nothing_is_finite():
    [(_, Gamma, S)] = kronecker_of(np.zeros((4, 4)), np.array([0, 2, 4]))
    assert not Gamma.any() and not S.any()


def test_errors(rng):
    X, D = rng.standard_normal((5, 2)), np.ones((5, 3), bool)
    spoilt = X.copy()
    spoilt[3, 1] = np.nan
    bad = [
        (r"\(5, 2\) and \(4, 3\)", lambda: Masked(X, D[:4])),
        (r"\(0, 2\) and \(0, 3\)", lambda: Masked(X[:0], D[:0])),
        (r"\(5, 0\)", lambda: Masked(X, D[:, :0])),
        (r"\(5,\)", lambda: Masked(X[:, 0], D)),
        ("int64", lambda: Masked(X.astype(np.int64), D)),
        ("D bool", lambda: Masked(X, D.astype(float))),
        ("NaN", lambda: Masked(spoilt, D)),
        (r"\(5, 1, 2\) and \(4, 1, 3\)", lambda: Pooled(X[:, None], D[:4, None])),
        (r"\(0, 1, 2\)", lambda: Pooled(X[:0, None], D[:0, None])),
        (r"\(5, 2\) and \(5, 3\)", lambda: Pooled(X, D)),
        ("int64", lambda: Pooled(X[:, None].astype(np.int64), D[:, None])),
        ("NaN", lambda: Pooled(spoilt[:, None], D[:, None])),
        ("NaN", lambda: Pooled(X[:, None], np.full((5, 1, 3), np.inf))),
        (r"\(0, 2\)", lambda: Explicit(X[:0], [0, 2])),
        ("int64", lambda: Explicit(X.astype(np.int64), [0, 2])),
        ("NaN", lambda: Explicit(spoilt, [0, 2])),
        ("from 0 to 2", lambda: Explicit(X, [0, 3])),
        ("from 0 to 2", lambda: Explicit(X, [1, 2])),
        ("from 0 to 2", lambda: Explicit(X, [0, 1, 1, 2])),
    ]
    for message, make in bad:
        with pytest.raises(ValueError, match=message):
            make()
