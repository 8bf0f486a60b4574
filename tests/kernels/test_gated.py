import tracemalloc

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels import accel, gated
from edgesolve.kernels.gated import gated_adjoint, gated_forward, gated_pool

SHAPES = [(7, 1, 5, 3, 2), (6, 4, 5, 3, 1), (5, 20, 3, 4, 2)]  # n, p, r, m, c
KINDS = ["hard", "ramp", "any"]


def design(rng, shape, kind="hard", dtype=np.float64):
    n, p, r, m, c = shape
    z = rng.standard_normal((n, p, r)).astype(dtype)
    s = rng.standard_normal((n, p, m))
    D = {"hard": s >= 0, "ramp": np.clip(s + 0.5, 0, 1).astype(dtype), "any": s.astype(dtype)}[kind]
    return z, D, rng.standard_normal((m, r, c)).astype(dtype)


def dense(z, D):
    """The design by its definition."""
    n, p, _ = z.shape
    return np.einsum("npm,npr->nmr", D.astype(float), z.astype(float)).reshape(n, -1) / p


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_design_is_its_definition(rng, twin, accepts_only, shape, kind):
    z, D, U = design(rng, shape, kind)
    A = dense(z, D)
    accepts_only(lambda got: assert_allclose(got, A, rtol=1e-12, atol=1e-13), gated_pool(z, D))
    AU = A @ U.reshape(A.shape[1], -1)
    accepts_only(
        lambda got: assert_allclose(got, AU, rtol=1e-11, atol=1e-12), gated_forward(z, D, U)
    )
    R = rng.standard_normal(AU.shape)
    AR = (A.T @ R).reshape(U.shape)
    accepts_only(
        lambda got: assert_allclose(got, AR, rtol=1e-11, atol=1e-12), gated_adjoint(z, D, R)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_adjoint_law(rng, twin, shape):
    z, D, U = design(rng, shape, "ramp")
    R = rng.standard_normal((shape[0], shape[-1]))
    left, right = np.vdot(gated_forward(z, D, U), R), np.vdot(U, gated_adjoint(z, D, R))
    assert_allclose(left, right, rtol=1e-12)
    assert abs(np.vdot(1.01 * gated_forward(z, D, U), R) - right) > 1e-6


@pytest.mark.parametrize("tile", [1, 60, 200])
def test_tiles_change_nothing(rng, twin, monkeypatch, tile):
    z, D, U = design(rng, (23, 4, 5, 3, 2))
    R = rng.standard_normal((23, 2))
    whole = gated_pool(z, D), gated_forward(z, D, U), gated_adjoint(z, D, R)
    monkeypatch.setattr(gated, "TILE_FLOATS", tile)
    tiled = gated_pool(z, D), gated_forward(z, D, U), gated_adjoint(z, D, R)
    for a, b in zip(whole, tiled, strict=True):
        assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("p", [2, 32])
def test_memory_is_one_tile(rng, twin, monkeypatch, p):
    z, D, U = design(rng, (400, p, 16, 24, 2))
    gated_forward(z[:1], D[:1], U)  # compiles
    monkeypatch.setattr(gated, "TILE_FLOATS", 1 << 13)
    tracemalloc.start()
    gated_adjoint(z, D, gated_forward(z, D, U))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 250_000 < 8 * 400 * 24 * 16  # the design alone would be 1.2 MB


def test_twins_agree(rng, monkeypatch):
    if accel.compiled() is None:
        pytest.skip("no Numba")
    for dtype, tol in ((np.float64, 1e-15), (np.float32, 1e-6)):
        for kind in KINDS:
            z, D, _ = design(rng, (9, 4, 6, 5, 2), kind, dtype)
            monkeypatch.setattr(gated, "FUSED_POSITIONS", 16)
            fast = gated_pool(z, D)
            monkeypatch.setattr(gated, "FUSED_POSITIONS", 0)
            assert_allclose(fast, gated_pool(z, D), rtol=tol, atol=tol)
            assert fast.dtype == dtype


def test_rows_may_be_float32_and_weights_float64(rng, twin):
    z, D, U = design(rng, (9, 4, 6, 5, 2), "ramp", np.float32)
    out = gated_forward(z, D, U.astype(np.float64))
    assert out.dtype == np.float64
    assert_allclose(out, dense(z, D) @ U.reshape(30, -1).astype(float), rtol=1e-12, atol=1e-13)


def test_any_memory_layout(rng, twin):
    z, D, U = design(rng, (9, 4, 6, 5, 2))
    plain = gated_forward(z, D, U)
    zt = np.asfortranarray(z)
    zt.flags.writeable = False
    assert_allclose(gated_forward(zt, np.asfortranarray(D), np.asfortranarray(U)), plain)


def test_a_nan_is_seen_behind_a_closed_gate(twin):
    z = np.array([[[np.nan, 1.0]]])
    D = np.zeros((1, 1, 2), bool)
    assert np.isnan(gated_pool(z, D)).tolist() == [[True, False, True, False]]


def test_errors(rng):
    z, D, U = design(rng, (9, 4, 6, 5, 2))
    with pytest.raises(ValueError, match="z and D must be"):
        gated_pool(z, D[:, :3])
    with pytest.raises(ValueError, match=r"U must be \(5, 6, c\)"):
        gated_forward(z, D, U[:4])
    with pytest.raises(ValueError, match=r"R must be \(9, c\)"):
        gated_adjoint(z, D, np.zeros((8, 2)))
    with pytest.raises(ValueError, match="float32 or float64, got int64"):
        gated_pool(z.astype(np.int64), D)
