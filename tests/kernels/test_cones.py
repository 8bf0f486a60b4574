from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels import barrier, cone_admm, cone_newton
from edgesolve.kernels.cone_admm import conjugate_gradients, relu_admm
from edgesolve.kernels.cone_newton import relu_newton
from edgesolve.kernels.cones import Incumbent, ReluProgram, relu_network, starting_point
from edgesolve.kernels.decompose import decompose
from edgesolve.kernels.gates import pattern
from edgesolve.kernels.interior import interior, product, repair, signs
from edgesolve.kernels.solution import Status

SOLVERS = pytest.mark.parametrize("solve", [relu_newton, relu_admm])


@pytest.fixture(scope="module")
def reference():
    """cvxpy 1.9.3 with Clarabel 0.11.1 on n=60, d=4, m=8: see data/make_cones.py."""
    with np.load(Path(__file__).parent / "data" / "cones.npz") as file:
        return dict(file)


def problem(rng, n=40, d=4, m=5, c=2):
    X, G = rng.standard_normal((n, d)), rng.standard_normal((d, m))
    hidden = np.maximum(X @ rng.standard_normal((d, 3)), 0.0)
    return X, X @ G >= 0, G, hidden @ rng.standard_normal((3, c)) + 1.0


def gated(X, D, U):
    return np.einsum("nm,nd,mdc->nc", D, X, U)


def objective(X, D, Y, lam, v, w, b):
    """P per output as the docstring of cones.py states it."""
    R = gated(X, D, v - w) + b - Y
    norms = np.linalg.norm(v, axis=1) + np.linalg.norm(w, axis=1)
    return 0.5 * np.mean(R**2, axis=0) + lam * norms.sum(axis=0)


def worst(X, D, U):
    """The largest violation of the cones by U (m, d, c), summed in another order than product."""
    return -np.min(signs(D)[:, :, None] * np.einsum("nd,mdc->nmc", X, U))


def lam_top(X, D, Y):
    rest = Y - Y.mean(axis=0)
    return np.max(np.linalg.norm(np.einsum("nm,nd,nc->mdc", D, X, rest), axis=1)) / len(X)


@pytest.mark.parametrize("lam", [0, 1])
@pytest.mark.parametrize("intercept", [False, True])
def test_newton_agrees_with_cvxpy(reference, lam, intercept, accepts_only):
    X, G, Y, value = (reference[k] for k in ("X", "G", "Y", "lams"))
    D, expected = X @ G >= 0, reference["objectives"][lam, int(intercept)]
    got = relu_newton(X, D, G, Y, value[lam], intercept=intercept, tol=1e-8)
    assert got.status is Status.CONVERGED and (got.relative_gap <= 1e-8).all()

    def check(v):
        assert max(worst(X, D, v), worst(X, D, got.w)) <= 0
        P = objective(X, D, Y, value[lam], v, got.w, got.intercept)
        assert_allclose(P, expected, rtol=1e-7)

    accepts_only(check, got.v)
    assert_allclose(got.objective, expected, rtol=1e-7)


def test_admm_agrees_with_cvxpy(reference):
    X, G, Y = (reference[k] for k in ("X", "G", "Y"))
    got = relu_admm(X, X @ G >= 0, G, Y, reference["lams"][1], max_iter=2000, tol=1e-3)
    assert got.status is Status.CONVERGED and (got.relative_gap <= 1e-3).all()
    error = got.objective / reference["objectives"][1, 1] - 1
    assert (error >= -1e-7).all() and (error <= got.relative_gap + 1e-7).all()


@SOLVERS
def test_every_figure_is_of_the_point_returned(rng, solve):
    X, D, G, Y = problem(rng)
    got = solve(X, D, G, Y, 0.05, max_iter=60, tol=1e-4)
    P = objective(X, D, Y, 0.05, got.v, got.w, got.intercept)
    assert_allclose(got.objective, P, rtol=1e-12)
    assert got.violation == 0.0 and max(worst(X, D, got.v), worst(X, D, got.w)) <= 0
    rest = Y - gated(X, D, got.v - got.w)
    assert_allclose(got.intercept, rest.mean(axis=0), rtol=1e-12)
    best = relu_newton(X, D, G, Y, 0.05, tol=1e-9).objective
    assert (P - best >= -1e-9 * P).all() and (P - best <= got.relative_gap * P).all()


@SOLVERS
def test_the_gap_bounds_the_error_along_the_way(rng, solve):
    X, D, G, Y = problem(rng, c=1)
    best = relu_newton(X, D, G, Y, 0.05, tol=1e-10)
    assert best.relative_gap <= 1e-10
    scale, before = 1 if solve is relu_newton else 40, 2.0
    for step in range(1, 10, 1 if solve is relu_newton else 2):
        got = solve(X, D, G, Y, 0.05, tol=1e-9, max_iter=scale * step)
        error = (got.objective - best.objective) / got.objective
        assert -1e-10 <= error <= got.relative_gap <= before
        before = got.relative_gap
    assert before < 0.05


BOUND_MUTANTS = {
    "R not centred": lambda R, push: (R + 1.0, push),
    "twice the multipliers": lambda R, push: (R, 2.0 * push),
    "multipliers of the other sign": lambda R, push: (R, -push),
    "permuted multipliers": lambda R, push: (R, np.roll(push, 1, axis=2)),
    "permuted residual": lambda R, push: (np.roll(R, 1, axis=0), push),
    "no multipliers": lambda R, push: (R, 0 * push),
}


@pytest.fixture(scope="module")
def at_optimum():
    """(program, P*, a residual, H'eta) where an ADMM run has converged from Newton's answer."""
    X, D, G, Y = problem(np.random.default_rng(7), n=24, d=3, m=3, c=1)
    program = ReluProgram.of(X, D, G, Y, 0.1)
    best = relu_newton(X, D, G, Y, 0.1, tol=1e-9)
    state = cone_admm._State(program, starting_point(program, (best.v, best.w)))
    for step in range(700):
        state.step(step in (20, 40, 80, 160, 320))
    R = program.Y - program.fit(product(program.X, state.z))
    return program, best.objective / program.scale**2, R, state.push()


@pytest.mark.parametrize("name", BOUND_MUTANTS)
def test_mutants_of_the_bound_are_caught(at_optimum, name):
    """At the optimum the true bound touches P*; a mutant exceeds it or falls short."""
    program, P, R, push = at_optimum
    assert_allclose(program.lower_bound(R, push), P, rtol=1e-4)
    mutant = program.lower_bound(*BOUND_MUTANTS[name](R, push))
    assert abs(mutant / P - 1) > 1e-3


def test_the_bound_holds_for_any_residual_and_multipliers(rng):
    X, D, G, Y = problem(rng)
    program = ReluProgram.of(X, D, G, Y, 0.05)
    P = relu_newton(X, D, G, Y, 0.05, tol=1e-8).objective / program.scale**2
    for size in np.geomspace(1e-3, 10, 20):
        R = program.project(program.Y + size * rng.standard_normal(Y.shape))
        eta = size * np.abs(rng.standard_normal((len(X), 4, 5)))
        push = program.back(program.S[:, None, :] * eta)
        assert (program.lower_bound(R, push) <= P * (1 + 1e-8)).all()


@SOLVERS
def test_the_network_needs_no_gates(rng, solve, accepts_only):
    X, D, G, Y = problem(rng, m=8)
    got = solve(X, D, G, Y, 0.02, max_iter=100, tol=1e-4)
    W1, W2, b = relu_network(got)
    model = gated(X, D, got.v - got.w) + got.intercept

    def check(W1):
        assert_allclose(np.maximum(X @ W1.T, 0.0) @ W2 + b, model, rtol=1e-12, atol=1e-12)

    accepts_only(check, W1)
    on = [(np.linalg.norm(part, axis=1) > 0).sum() for part in (got.v, got.w)]
    assert len(W1) == len(W2) == sum(on) > 0
    assert ((W2 != 0).sum(axis=1) == 1).all()
    assert_allclose(np.linalg.norm(W1, axis=1), np.abs(W2).sum(axis=1))
    # The weight decay of the network is the group penalty of the program.
    decay = 0.5 * (np.sum(W1**2) + np.sum(W2**2))
    assert_allclose(decay, sum(np.linalg.norm(p, axis=1).sum() for p in (got.v, got.w)))


def test_above_lam_max_there_is_no_network(rng):
    X, D, G, Y = problem(rng)
    for solve in (relu_newton, relu_admm):
        got = solve(X, D, G, Y, 1.01 * lam_top(X, D, Y))
        W1, W2, b = relu_network(got)
        assert got.status is Status.CONVERGED and got.n_iter == 0
        assert W1.shape == (0, 4) and W2.shape == (0, 2)
        assert_allclose(b, Y.mean(axis=0))
        assert_allclose(got.objective, 0.5 * Y.var(axis=0))


@pytest.mark.parametrize("n", [20, 120])
def test_a_tiny_lam_converges_too(rng, n):
    """Blocks singular without the fit: Woodbury alone loses every digit here."""
    X, D, G, Y = problem(rng, n=n, d=5, m=6, c=1)
    for share in (1e-3, 1e-5):
        got = relu_newton(X, D, G, Y, share * lam_top(X, D, Y), max_iter=40)
        assert got.status is Status.CONVERGED


def test_closed_gates_are_exactly_zero(rng):
    X, D, G, Y = problem(rng, m=12)
    got = relu_newton(X, D, G, Y, 0.2 * lam_top(X, D, Y))
    off = [(np.linalg.norm(part, axis=1) == 0).mean() for part in (got.v, got.w)]
    assert min(off) > 0.3 and (got.relative_gap <= 1e-6).all()


@SOLVERS
def test_outputs_are_solved_on_their_own(rng, solve):
    X, D, G, Y = problem(rng)
    both = solve(X, D, G, Y * [1.0, 1000.0], 0.05, max_iter=300, tol=1e-4)
    for k, y in enumerate((Y[:, 0], 1000.0 * Y[:, 1])):
        alone = solve(X, D, G, y, 0.05, max_iter=300, tol=1e-4)
        share = both.relative_gap[k] + alone.relative_gap[0] + 1e-9
        assert_allclose(both.objective[k], alone.objective[0], rtol=share)


@SOLVERS
def test_constant_targets_and_zero_rows(rng, solve):
    X, _, G, Y = problem(rng)
    X[3], Y[:, 0] = 0.0, 0.1
    got = solve(X, X @ G >= 0, G, Y, 0.1, max_iter=2000, tol=1e-3)
    assert got.status is Status.CONVERGED and got.relative_gap[0] == 0.0
    assert not got.v[:, :, 0].any() and not got.w[:, :, 0].any()


@SOLVERS
def test_a_wide_design_and_n_below_md(rng, solve):
    """n < d too: every pattern is then linear, and the program is nearly a linear one."""
    X, D, G, Y = problem(rng, n=6, d=9, m=4, c=1)
    got = solve(X, D, G, Y, 0.05, tol=1e-4, max_iter=4000)
    assert got.status is Status.CONVERGED and max(worst(X, D, got.v), worst(X, D, got.w)) <= 0


@SOLVERS
def test_a_budget_is_kept_and_a_warm_start_never_ends_higher(rng, solve):
    X, D, G, Y = problem(rng)
    start = decompose(X, D, G, 0.01 * rng.standard_normal((5, 4, 2)))
    R = Y - gated(X, D, start[0] - start[1])
    at_start = objective(X, D, Y, 0.01, *start, R.mean(axis=0))
    got = solve(X, D, G, Y, 0.01, U0=start, seconds=0.0)
    assert got.status is Status.OUT_OF_TIME and got.n_iter <= 1
    assert (got.objective <= at_start * (1 + 1e-9)).all()
    assert got.violation == 0.0 and np.isfinite(got.relative_gap).all()
    assert solve(X, D, G, Y, 0.01, tol=0.0, max_iter=3).status is Status.MAX_ITER
    good = relu_newton(X, D, G, Y, 0.05, tol=1e-7)
    again = solve(X, D, G, Y, 0.05, U0=(good.v, good.w), max_iter=40)
    assert (again.objective <= good.objective * (1 + 1e-12)).all()


def test_cg_and_the_inverse_take_the_same_step(rng, monkeypatch):
    X, D, G, Y = problem(rng)
    direct = relu_admm(X, D, G, Y, 0.05, max_iter=100)
    monkeypatch.setattr(cone_admm, "FACTOR_ROWS", 0)
    iterative = relu_admm(X, D, G, Y, 0.05, max_iter=100)
    assert_allclose(iterative.objective, direct.objective, rtol=1e-3)
    A = rng.standard_normal((9, 9))
    A, b = A @ A.T + np.eye(9), rng.standard_normal((9, 2))
    x = conjugate_gradients(lambda q: A @ q, b, 0 * b, 1e-12)
    assert_allclose(x, np.linalg.solve(A, b), rtol=1e-9)
    assert conjugate_gradients(lambda q: A @ q, b, x, 1.0) is x


def test_one_admm_step_minimises_its_quadratic(rng):
    """The shared factor and Woodbury against the matrix written out."""
    X, D, G, Y = problem(rng, n=15, d=3, m=4, c=1)
    program = ReluProgram.of(X, D, G, Y, 0.05)
    state = cone_admm._State(program, None)
    state.z, state.phi = rng.standard_normal((2, *state.z.shape))
    state.T, state.psi = rng.standard_normal((2, *state.T.shape))
    S, n = signs(D), len(X)
    design = np.hstack([s * D[:, [i]] * X for s in (1, -1) for i in range(4)])
    design -= design.mean(axis=0)
    H = np.zeros((8 * n, 24))
    for j in range(8):
        H[j * n : (j + 1) * n, 3 * j : 3 * j + 3] = S[:, [j % 4]] * X
    long = lambda a: a.transpose(1, 2, 0).ravel()  # noqa: E731
    signed = long(S[:, None, :] * (state.T - state.psi))
    M = design.T @ design / n + state.rho_z * np.eye(24) + state.rho_t * H.T @ H
    rhs = design.T @ program.Y[:, 0] / n + state.rho_z * long(state.z - state.phi)
    expected = np.linalg.solve(M, rhs + state.rho_t * H.T @ signed)
    relaxed = cone_admm.RELAXATION
    kept = (1 - relaxed) * state.z + state.phi
    state.step(False)
    assert_allclose(long(state.z + state.phi - kept) / relaxed, expected, rtol=1e-8)


@pytest.mark.parametrize("n", [30, 80])  # n below and above m d: both sides of Woodbury
def test_the_newton_system_is_solved(rng, n, accepts_only):
    X, D, G, Y = problem(rng, n=n, c=1, m=10)
    program = ReluProgram.of(X, D, G, Y, 0.05)
    S = np.hstack([program.S, program.S])
    u = rng.standard_normal((4, 20))
    norm = barrier.SmoothNorm(u, 0.01 * u, 0.05, 0.1)
    weight = np.exp(rng.standard_normal((n, 20)))
    system = cone_newton._System(program, S, norm, weight)
    assert (system.B is None) == (n == 30)
    dense = np.zeros((80, 80))
    for j in range(20):
        block = (S[:, [j]] * X).T @ (weight[:, [j]] * S[:, [j]] * X) + norm.hessian()[j]
        dense[4 * j : 4 * j + 4, 4 * j : 4 * j + 4] = block
    design = np.hstack([s * D[:, [i]] * X for s in (1, -1) for i in range(10)])
    design -= design.mean(axis=0)
    dense += design.T @ design / n
    rhs = rng.standard_normal((4, 20))
    long = system.solve(rhs).T.ravel()
    accepts_only(lambda x: assert_allclose(dense @ x, rhs.T.ravel(), rtol=1e-8, atol=1e-9), long)


def test_steps_end_at_the_boundary(rng, accepts_only):
    p, dp = 0.1 * rng.standard_normal((4, 30)), rng.standard_normal((4, 30))
    s, ds = np.abs(rng.standard_normal((9, 30))), rng.standard_normal((9, 30))
    assert 5 < (np.sum(p * dp, axis=0) > 0).sum() < 25  # both forms of the root

    def on_sphere(t):
        assert_allclose(np.linalg.norm(p + t * dp, axis=0), 2.0)
        assert (t > 0).all()

    def on_face(t):
        assert_allclose(np.min(s + t * ds, axis=0), 0.0, atol=1e-12)
        assert (t > 0).all()

    accepts_only(on_sphere, barrier.to_sphere(p, dp, 2.0))
    accepts_only(on_face, barrier.to_boundary(s, ds))
    assert np.isinf(barrier.to_boundary(s, np.abs(ds))).all()
    assert np.isinf(barrier.to_sphere(p, 0 * dp, 2.0)).all()


def test_the_smooth_norm_and_its_hessian_agree_with_differences(rng, accepts_only):
    u, x, mu = rng.standard_normal((3, 5)), rng.standard_normal((3, 5)), 0.1

    def pull(u):  # the gradient of the smoothed norm
        return barrier.SmoothNorm(u, u, 2.0, mu).pull

    norm = barrier.SmoothNorm(u, pull(u), 2.0, mu)
    slope = (pull(u + 1e-6 * x) - pull(u - 1e-6 * x)) / 2e-6
    accepts_only(lambda got: assert_allclose(got, slope, rtol=1e-6, atol=1e-8), norm.times(x))
    assert_allclose(barrier.times(norm.hessian(), x), norm.times(x), rtol=1e-12)
    assert np.linalg.eigvalsh(norm.hessian()).min() >= 0
    assert (np.linalg.norm(norm.pull, axis=0) < 2.0).all()


def test_balancing_keeps_the_multipliers(rng):
    X, D, G, Y = problem(rng, n=15, c=1)
    state = cone_admm._State(ReluProgram.of(X, D, G, Y, 0.05), None)
    for _ in range(5):
        state.step(False)
    before, push = state.rho_z * state.phi, state.push()
    rho = state.rho_z, state.rho_t
    state._balance(9.0, 0.04)
    assert_allclose([state.rho_z, state.rho_t], [3.0 * rho[0], 0.2 * rho[1]])
    assert_allclose(state.rho_z * state.phi, before)
    assert_allclose(state.push(), push)


def test_interior_directions_are_inside_and_repair_is_exact(rng, accepts_only):
    X, D, G, _ = problem(rng, n=200, d=6, m=10)
    S, inside = signs(D), interior(X, D, G)
    before = np.min(S * (X @ G) / np.linalg.norm(G, axis=0), axis=0)
    after = np.min(S * (X @ inside), axis=0)
    assert_allclose(np.linalg.norm(inside, axis=0), 1.0)
    assert (after > 0).all() and after.min() > 3 * before.min()
    V = rng.standard_normal((6, 2, 10))
    V[:, 0, 3] = 0.0
    fixed = repair(X, S, inside, V)
    assert not fixed[:, 0, 3].any()

    def check(V):
        assert np.min(S[:, None, :] * product(X, V)) >= 0
        assert worst(X, D, V.transpose(2, 0, 1)) <= 0
        assert np.linalg.norm(V) < 3e3 and (np.linalg.norm(V, axis=0) > 0).sum() == 19

    check(fixed)
    for mutant in (0 * fixed, -fixed, np.roll(fixed, 1, axis=2), V):
        with pytest.raises(AssertionError):
            check(mutant)
    assert_allclose(repair(X, S, inside, fixed), fixed, rtol=1e-12)


def test_rows_on_a_hyperplane_are_left_or_refused():
    X = np.array([[1.0, -1.0], [1.0, 2.0], [-1.0, 0.5], [0.0, 0.0]])
    G = np.array([[1.0], [1.0]])
    D = X @ G >= 0
    inside = interior(X, D, G)
    assert (signs(D)[:3] * (X[:3] @ inside) > 0).all()
    X[2] = [-1.0, 1.0]  # with row 0 an equality: the cone is a ray
    with pytest.raises(ValueError, match="gate 0 has 2 rows on its hyperplane"):
        interior(X, X @ G >= 0, G)


def test_offsets_are_a_column_of_ones(rng):
    x, G, b = rng.standard_normal((40, 3)), rng.standard_normal((3, 5)), rng.standard_normal(5)
    X, gates = np.hstack([x, np.ones((40, 1))]), np.vstack([G, b])
    D = pattern(x, G.T, b)
    got = relu_newton(X, D, gates, np.abs(x[:, :1]), 0.01)
    W1, W2, c = relu_network(got)
    assert got.status is Status.CONVERGED
    fit = np.maximum(x @ W1[:, :3].T + W1[:, 3], 0.0) @ W2 + c
    assert np.mean((fit - np.abs(x[:, :1])) ** 2) < 0.15


@SOLVERS
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: {"X": a["X"][:0], "D": a["D"][:0]}, "X must be"),
        (lambda a: {"X": np.where(a["X"] > 1, np.nan, a["X"])}, "X must be"),
        (lambda a: {"D": a["D"].astype(float)}, "D must be .* bool, got .* float64"),
        (lambda a: {"D": a["D"][1:]}, "D must be"),
        (lambda a: {"D": ~a["D"]}, "disagrees with gate 0"),
        (lambda a: {"G": a["G"].T}, "G must be"),
        (lambda a: {"G": 0 * a["G"]}, "no column zero"),
        (lambda a: {"Y": a["Y"][1:]}, "Y must be"),
        (lambda a: {"Y": a["Y"] / 0.0}, "Y must be"),
        (lambda a: {"lam": -1.0}, "lam must be finite and above 0, got -1"),
        (lambda a: {"lam": 0.0}, "lam must be"),
        (lambda a: {"lam": np.nan}, "lam must be"),
        (lambda a: {"U0": (np.zeros((5, 4, 1)),) * 2}, r"U0 must be \(v, w\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_bad_input_is_refused_in_one_sentence(rng, solve, change, message):
    arguments = dict(zip("XDGY", problem(rng), strict=True)) | {"lam": 0.1}
    arguments |= change(arguments)
    with pytest.raises(ValueError, match=message) as error:
        solve(**arguments)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_step_beyond_memory_is_refused(rng, monkeypatch):
    monkeypatch.setattr(cone_newton, "MOST_FLOATS", 1000)
    with pytest.raises(ValueError, match="use relu_admm"):
        relu_newton(*problem(rng), 0.1)


def test_wrong_answers_never_replace_the_best(rng):
    """Zeros, scaled, permuted and infeasible points are repaired, priced, and judged by price."""
    X, D, G, Y = problem(rng)
    good = relu_newton(X, D, G, Y, 0.05, tol=1e-8)
    program = ReluProgram.of(X, D, G, Y, 0.05)
    u = starting_point(program, (good.v, good.w))
    best = Incumbent(program)
    best.look(u)
    price = best.objective.copy()
    assert_allclose(price * program.scale**2, good.objective, rtol=1e-12)
    for mutant in (0 * u, 1.01 * u, np.roll(u, 1, axis=2), u[:, ::-1], u + 1e-3):
        best.look(mutant)
        assert (best.objective == price).all()
        worse = Incumbent(program)
        worse.look(mutant)
        assert (worse.objective >= price * (1 + 1e-7)).all()
        XU = product(X, worse.u)
        assert np.min(program.S[:, None, :] * XU) >= 0


def test_every_field_of_the_solution_is_described(rng):
    got = relu_newton(*problem(rng), 0.1)
    assert {f.name for f in fields(got)} >= {"v", "w", "status", "relative_gap", "violation"}
    assert got.v.dtype == got.w.dtype == np.float64 and got.v.shape == (5, 4, 2)
    assert replace(got, n_iter=0).seconds == got.seconds >= 0
