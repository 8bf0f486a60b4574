"""Laws that every one of PENALTIES obeys, then the definition of each."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels.fista import fista
from edgesolve.kernels.losses import SquaredMoments
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.penalties import GroupL2, GroupL2Feature, GroupL2Output, Nuclear, lam_max

M, R, C = 4, 3, 2
STARTS, WEIGHTS = np.array([0, 2, 3, 6]), np.array([1.0, 2.0, 0.5])


def points(rng):
    return rng.standard_normal((M * R, C))


def halfway(make_penalty, V):
    """The penalty at a lam, as a step of 1, that switches some of V's groups off, but not all."""
    unit = make_penalty(1.0, M, R)
    return make_penalty(float(np.median(unit.dual_norms(V) / unit.weights)), M, R)


def test_prox_law(rng, twin, accepts_only, make_penalty):
    """V - U lies in step times the subdifferential at U."""
    V, step = points(rng), 0.7
    penalty = halfway(make_penalty, V / step)

    def check(U):
        pull, limit = V - U, step * penalty.limit
        assert (penalty.dual_norms(pull) <= limit + 1e-12).all()
        assert_allclose(penalty.inner(pull, U), limit * penalty.norms(U), rtol=1e-9, atol=1e-12)

    kept = V.copy()
    U = penalty.prox(V, step)
    on = penalty.norms(U) > 0
    assert on.any() and not on.all() and np.array_equal(V, kept)
    accepts_only(check, U)


def test_prox_at_the_edges(rng, twin, make_penalty):
    V = points(rng)
    assert_allclose(make_penalty(0.0, M, R).prox(V, 1.0), V, rtol=1e-12, atol=1e-14)
    assert not make_penalty(1e3, M, R).prox(V, 1.0).any()
    assert not make_penalty(0.0, M, R).prox(0 * V, 1.0).any()
    assert make_penalty(0.1, M, R).prox(V.astype(np.float32), 1.0).dtype == np.float32
    assert_allclose(
        make_penalty(0.1, M, R).prox(V.astype(np.float32), 1.0),
        make_penalty(0.1, M, R).prox(V, 1.0),
        atol=1e-6,
    )


def test_kkt_is_zero_exactly_at_an_optimum(rng, twin, make_penalty):
    """U = prox(V) minimises penalty + ||U - V||^2/2, whose smooth gradient is U - V."""
    V = points(rng)
    penalty = halfway(make_penalty, V)
    U = penalty.prox(V, 1.0)
    assert penalty.kkt(U, U - V) < 1e-14
    for other in (1.01 * U, U + 0.01, np.zeros_like(U)):
        assert penalty.kkt(other, other - V) > 1e-3


def test_kkt_is_the_distance_to_the_subdifferential(rng, make_penalty):
    """A vanishing proximal step moves U by step times that distance, at zero groups as well."""
    penalty, grad, step = halfway(make_penalty, points(rng)), points(rng), 1e-6
    V = points(rng)
    for U in (penalty.prox(V, 1.0), np.zeros_like(V), V):
        moved = np.linalg.norm(U - penalty.prox(U - step * grad, step)) / step
        assert_allclose(penalty.kkt(U, grad), moved, rtol=1e-4)


def test_the_dual_norm_is_dual(rng, make_penalty):
    """<U, V> <= N(U) N°(V), attained by what a prox just short of switching off leaves of V."""
    unit = make_penalty(1.0, M, R)
    for _ in range(20):
        U, V = points(rng), points(rng)
        assert (np.abs(unit.inner(U, V)) <= unit.norms(U) * unit.dual_norms(V) + 1e-12).all()
    dual = unit.dual_norms(V)
    limit = np.broadcast_to(unit.weights, dual.shape)
    for g in np.ndindex(dual.shape):
        U = unit.prox(V, 0.999 * dual[g] / limit[g])
        reached = unit.inner(U, V)[g] / unit.norms(U)[g]
        assert 0.998 * dual[g] <= reached <= dual[g] * (1 + 1e-12)


def test_zero_is_optimal_from_lam_max_on(rng, make_penalty):
    x = rng.standard_normal((50, M * R))
    loss = SquaredMoments.of(Moments.of(x, x[:, :C] + rng.standard_normal((50, C))), 0.1)
    zero = np.zeros(loss.shape)
    top = lam_max(loss, make_penalty(5.0, M, R))
    assert make_penalty(top * (1 + 1e-12), M, R).kkt(zero, loss.grad(zero)) == 0
    assert make_penalty(top * 0.99, M, R).kkt(zero, loss.grad(zero)) > 0


def test_nan_stays_visible(rng, twin, make_penalty):
    penalty, U = make_penalty(0.1, M, R), points(rng)
    for bad in (np.nan, np.inf):
        V = U.copy()
        V[4, 0] = bad
        with np.errstate(invalid="ignore"):
            assert not np.isfinite(penalty.prox(V, 1.0)[4]).all()
            assert not np.isfinite(penalty.value(V))
            assert not np.isfinite(penalty.kkt(V, U)) and not np.isfinite(penalty.kkt(U, V))
            assert not np.isfinite(penalty.dual_norms(V).max())


def test_figures_are_float64(rng, make_penalty):
    penalty = make_penalty(0.3, M, R)
    U, V = points(rng).astype(np.float32), points(rng).astype(np.float32)
    wide = U.astype(np.float64), V.astype(np.float64)
    assert_allclose(penalty.value(U), penalty.value(wide[0]), rtol=1e-14)
    assert_allclose(penalty.inner(U, V), penalty.inner(*wide), rtol=1e-12)
    assert_allclose(penalty.dual_norms(U), penalty.dual_norms(wide[0]), rtol=1e-14)


def gate_blocks(U):
    return [U[a:b] for a, b in pairwise(STARTS)]


def soft_rank(V, thresh):
    P, s, Qt = np.linalg.svd(V, full_matrices=False)
    return P @ np.diag(np.maximum(s - thresh, 0.0)) @ Qt


def soft(V, thresh):
    return max(1.0 - thresh / np.linalg.norm(V), 0.0) * V


def by_gate(step):
    return lambda V, thresh: np.vstack(
        [step(part, t) for part, t in zip(gate_blocks(V), thresh * WEIGHTS, strict=True)]
    )


def by_output(V, thresh):
    return np.hstack([by_gate(soft)(V[:, [k]], thresh) for k in range(V.shape[1])])


def by_input(V, thresh):
    out = V.copy()
    for j, w in enumerate(WEIGHTS):
        out[j::3] = soft(V[j::3], thresh * w)
    return out


# penalty, N by its definition, prox by a loop over groups: nothing of ours in either
DEFINITIONS = {
    "gates": (
        lambda lam: GroupL2(lam, STARTS, WEIGHTS),
        lambda U: WEIGHTS @ [np.sqrt(np.sum(part**2)) for part in gate_blocks(U)],
        by_gate(soft),
    ),
    "outputs": (
        lambda lam: GroupL2Output(lam, STARTS, WEIGHTS),
        lambda U: WEIGHTS @ [np.sqrt(np.sum(part**2, axis=0)).sum() for part in gate_blocks(U)],
        by_output,
    ),
    "inputs": (
        lambda lam: GroupL2Feature(lam, 2, WEIGHTS),
        lambda U: WEIGHTS @ [np.linalg.norm(U.reshape(2, 3, -1)[:, j]) for j in range(3)],
        by_input,
    ),
    "ranks": (
        lambda lam: Nuclear(lam, STARTS, WEIGHTS),
        lambda U: WEIGHTS @ [np.linalg.norm(part, "nuc") for part in gate_blocks(U)],
        by_gate(soft_rank),
    ),
}


@pytest.fixture(params=DEFINITIONS)
def definition(request):
    return DEFINITIONS[request.param]


def test_the_value_is_that_of_the_definition(rng, definition):
    make, norm, _ = definition
    U = rng.standard_normal((6, 3))
    assert_allclose(make(0.3).value(U), 0.3 * norm(U), rtol=1e-13)
    assert_allclose(make(0.3).kkt(U, -0.3 * slope(norm, U)), 0.0, atol=1e-7)


def slope(f, U, h=1e-6):
    """The gradient of f at U by differences."""
    out = np.empty_like(U)
    for i in np.ndindex(U.shape):
        move = np.zeros_like(U)
        move[i] = h
        out[i] = (f(U + move) - f(U - move)) / (2 * h)
    return out


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_an_orthonormal_design_has_a_closed_form(rng, twin, accepts_only, definition, ridge):
    """A'A/n = I: P(U) = (1 + ridge)/2 ||U - q/(1 + ridge)||^2 + penalty + a constant."""
    make, _, prox = definition
    x = rng.standard_normal((40, 6))
    A = np.sqrt(40) * np.linalg.qr(x - x.mean(axis=0))[0]
    t = rng.standard_normal((40, 3))
    loss = SquaredMoments.of(Moments.of(A, t), ridge)
    q = A.T @ (t - t.mean(axis=0)) / 40
    lam = 0.6 * lam_max(loss, make(1.0))
    expected = prox(q / (1 + ridge), lam / (1 + ridge))
    s = fista(loss, make(lam), tol=1e-12)
    assert s.relative_gap < 1e-9
    accepts_only(lambda U: assert_allclose(U, expected, rtol=1e-8, atol=1e-9), s.weights)


def test_nuclear_is_the_weight_decay_of_factors(rng, accepts_only):
    """||U||_* = min (||F||^2 + ||G||^2)/2 over U = FG': the same program, smooth, by L-BFGS."""
    optimize = pytest.importorskip("scipy.optimize", reason="no SciPy on a device")
    n, c = 60, 3
    x = rng.standard_normal((n, 6))
    t = x @ rng.standard_normal((6, 1)) @ rng.standard_normal((1, c)) + rng.standard_normal((n, c))
    loss = SquaredMoments.of(Moments.of(x, t), 0.0)
    penalty = Nuclear(0.2 * lam_max(loss, Nuclear(1.0, STARTS, WEIGHTS)), STARTS, WEIGHTS)
    xc, tc = x - x.mean(axis=0), t - t.mean(axis=0)

    def split(flat):
        F, G = flat[: 6 * c].reshape(6, c), flat[6 * c :].reshape(3, c, c)
        return F, G, np.vstack([part @ g.T for part, g in zip(gate_blocks(F), G, strict=True)])

    def smooth(flat):
        F, G, U = split(flat)
        rest = xc @ U - tc
        w = penalty.lam * WEIGHTS
        decay = w @ [np.sum(f * f) + np.sum(g * g) for f, g in zip(gate_blocks(F), G, strict=True)]
        V = gate_blocks(xc.T @ rest / n)
        dF = [v @ g + a * f for v, g, a, f in zip(V, G, w, gate_blocks(F), strict=True)]
        dG = [v.T @ f + a * g for v, g, a, f in zip(V, G, w, gate_blocks(F), strict=True)]
        grad = np.concatenate([np.vstack(dF).ravel(), np.stack(dG).ravel()])
        return np.sum(rest * rest) / (2 * n) + decay / 2, grad

    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10}
    start = rng.standard_normal(6 * c + 27)
    found = optimize.minimize(smooth, start, jac=True, method="L-BFGS-B", options=options)
    s = fista(loss, penalty, tol=1e-11)
    ranks = [np.linalg.matrix_rank(part, 1e-9) for part in gate_blocks(s.weights)]
    assert min(ranks) < 2 and max(ranks) > 0
    assert_allclose(s.objective, found.fun, rtol=1e-9)
    slow = split(found.x)[2]
    accepts_only(lambda U: assert_allclose(U, slow, atol=1e-4 * np.abs(slow).max()), s.weights)


def test_outputs_are_separate_problems(rng, twin):
    x, t = rng.standard_normal((50, 6)), rng.standard_normal((50, 3))
    loss = SquaredMoments.of(Moments.of(x, t), 0.01)
    lam = 0.3 * lam_max(loss, GroupL2Output(1.0, STARTS, WEIGHTS))
    joint = fista(loss, GroupL2Output(lam, STARTS, WEIGHTS), tol=1e-12)
    for k in range(3):
        one = SquaredMoments.of(Moments.of(x, t[:, [k]]), 0.01)
        alone = fista(one, GroupL2(lam, STARTS, WEIGHTS), tol=1e-12)
        assert_allclose(joint.weights[:, [k]], alone.weights, atol=1e-9)


def test_nuclear_kkt_takes_rounding_for_zero(rng):
    """A product of factors leaves singular values at rounding, whose directions mean nothing."""
    for scale in (1e-8, 1.0, 1e8):
        V = scale * rng.standard_normal((8, 1)) @ rng.standard_normal((1, 5))
        penalty = Nuclear(0.1, [0, 8])
        P, s, Qt = np.linalg.svd(V, full_matrices=False)
        assert s[1] > 0 or scale == 1.0
        assert penalty.kkt(V, -0.1 * P[:, :1] @ Qt[:1]) < 1e-14
        assert penalty.kkt(V, 0 * V) > 0.09


def test_restrict_is_the_penalty_with_other_groups_zeroed(rng):
    penalty = GroupL2(0.3, STARTS, WEIGHTS)
    U, grad = rng.standard_normal((6, 2)), rng.standard_normal((6, 2))
    rows = np.array([0, 1, 3, 4, 5])
    zeroed = U.copy()
    zeroed[2] = 0.0
    for groups in (np.array([0, 2]), np.array([True, False, True])):
        part = penalty.restrict(groups)
        assert part.starts.tolist() == [0, 2, 5] and part.weights.tolist() == [1.0, 0.5]
        assert_allclose(part.value(U[rows]), penalty.value(zeroed))
        assert_allclose(part.prox(U[rows], 0.7), penalty.prox(U, 0.7)[rows])
        assert part.kkt(U[rows], grad[rows]) < penalty.kkt(U, grad)
    turned = penalty.restrict(np.array([2, 0]))
    assert turned.starts.tolist() == [0, 3, 5] and turned.limit.tolist() == [0.15, 0.3]
    with pytest.raises(ValueError, match="starts"):
        penalty.restrict(np.array([], int))


@pytest.mark.parametrize("kind", [GroupL2, GroupL2Output, Nuclear])
def test_errors_of_row_groups(kind):
    for lam in (-1.0, np.nan):
        with pytest.raises(ValueError, match="lam"):
            kind(lam, STARTS)
    for starts in ([1, 2], [0, 2, 2], [0], [[0, 1]]):
        with pytest.raises(ValueError, match="starts"):
            kind(1.0, np.array(starts))
    for weights in ([1.0, 1.0], [1.0, 0.0, 1.0], [[1.0, 1.0, 1.0]], [1.0, np.nan, 1.0]):
        with pytest.raises(ValueError, match="weights must be 3 positive"):
            kind(1.0, STARTS, np.array(weights))


def test_errors_of_inputs(rng):
    with pytest.raises(ValueError, match="lam"):
        GroupL2Feature(-1.0, 2)
    for n_gates in (0, 2.0):
        with pytest.raises(ValueError, match="n_gates"):
            GroupL2Feature(1.0, n_gates)
    for weights in ([], [1.0, -1.0]):
        with pytest.raises(ValueError, match="weights"):
            GroupL2Feature(1.0, 2, np.array(weights))
    with pytest.raises(ValueError, match="7 rows can't be shared evenly by 2 gates"):
        GroupL2Feature(1.0, 2).value(rng.standard_normal((7, 2)))
