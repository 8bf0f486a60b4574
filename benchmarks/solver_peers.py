"""Every peer in its best documented form: (problem, level, clock) to weights (m, d, c) in the problem's scaling.

`level` is the tolerance in the peer's own unit; only what runs inside `with clock` is timed: no import, no
compilation, no copy into the design that the peer asks for. A peer with one output at a time solves c programs.
The conversions of `lam` and the peers' traps: design note, convex.md sections 1 and 8.
"""

from __future__ import annotations

import warnings

import numpy as np
from solver_clock import Skip
from solver_problems import lam_max

TOO_LARGE = 5e6
"""Entries of a design beyond which an interior point is not tried."""


def adelie(problem, level, clock, path=1):
    """C++ block coordinate descent on the implicit gated design; all outputs at once is its multigaussian."""
    import adelie as ad

    m, d, c = problem.shape
    design = ad.matrix.convex_relu(problem.X, problem.D, gated=True, n_threads=1)
    options = {
        "groups": np.arange(m) * d,
        "penalty": np.ones(m),
        "intercept": False,
        "early_exit": False,
        "progress_bar": False,
        "n_threads": 1,
        "tol": level,
    }

    def solve(glm, scale):
        top = problem.lam if path == 1 else ratio_of(problem) * problem.lam
        with clock:
            state = ad.grpnet(
                design, glm, lmda_path=np.geomspace(top, problem.lam, path) / scale, **options
            )
        if len(state.lmdas) < path:
            raise Skip(f"adelie stopped after {len(state.lmdas)} of {path} lam")
        return state.betas[-1].toarray().ravel()

    if c > 1 and not problem.by_output:
        return solve(ad.glm.multigaussian(np.asfortranarray(problem.Y)), c).reshape(m, d, c)
    return _each(problem, lambda y: solve(ad.glm.gaussian(y), 1))


def adelie_path(problem, level, clock):
    """The same on ten warm-started lam from lam_max down."""
    return adelie(problem, level, clock, path=10)


def ratio_of(problem) -> float:
    """lam_max / lam."""
    return lam_max(problem.X, problem.Y, problem.D, problem.by_output) / problem.lam


def celer(problem, level, clock):
    """Working sets with dual extrapolation on the materialised design."""
    from celer import GroupLasso

    _only_one_output(problem)
    design, d = materialised(problem), problem.shape[1]

    def solve(y):
        model = GroupLasso(d, problem.lam, tol=level, fit_intercept=False, max_iter=1000)
        with clock:
            model.fit(design, y)
        return model.coef_

    return _each(problem, solve)


def skglm(problem, level, clock):
    """Numba block coordinate descent with working sets and Anderson acceleration."""
    from skglm.datafits import QuadraticGroup
    from skglm.penalties import WeightedGroupL2
    from skglm.solvers import GroupBCD
    from skglm.utils.jit_compilation import compiled_clone

    _only_one_output(problem)
    m, d, _ = problem.shape
    design = materialised(problem)
    groups = np.arange(0, m * d + 1, d, dtype=np.int32), np.arange(m * d, dtype=np.int32)
    datafit = compiled_clone(QuadraticGroup(*groups))
    penalty = compiled_clone(WeightedGroupL2(problem.lam, np.ones(m), *groups))
    solver = GroupBCD(tol=level * problem.lam, max_iter=10_000, fit_intercept=False)

    def solve(y):
        with clock:
            return solver.solve(design, y, datafit, penalty)[0]

    return _each(problem, solve)


def pyscnn(problem, level, clock):
    """R-FISTA in float64; its penalty takes one output at a time, all of them in one run."""
    from scnn.metrics import Metrics
    from scnn.models import ConvexGatedReLU
    from scnn.optimize import optimize_model
    from scnn.regularizers import NeuronGL1
    from scnn.solvers import RFISTA

    _only_one_output(problem)
    c = problem.shape[2]
    model = ConvexGatedReLU(problem.G.copy(), c=c, bias=False)
    X, Y = np.ascontiguousarray(problem.X), np.ascontiguousarray(problem.Y)
    options = {"return_convex": True, "unitize_data": False, "dtype": "float64", "device": "cpu"}
    with clock:
        found, _ = optimize_model(
            model,
            RFISTA(model, max_iters=1_000_000, tol=level * (problem.lam / c) ** 2),
            Metrics(),
            X,
            Y,
            regularizer=NeuronGL1(problem.lam / c),
            **options,
        )
    # It sorts the gates: find each one's place again by its vector.
    place = {g.astype(np.float32).tobytes(): i for i, g in enumerate(problem.G.T)}
    order = [place[g.astype(np.float32).tobytes()] for g in np.asarray(found.G).T]
    U = np.zeros(problem.shape)
    U[order] = found.parameters[0].transpose(1, 2, 0)
    return U


def clarabel(problem, level, clock):
    """Interior point through cvxpy; the canonicalisation is not timed."""
    import cvxpy as cp

    m, d, c = problem.shape
    if problem.by_output:
        raise Skip("run on the joint penalty only")
    if len(problem.X) * m * d > TOO_LARGE:
        raise Skip(f"over {TOO_LARGE:.0e} entries of the design (33 s on digits, 0.1 lam_max)")
    U = cp.Variable((m * d, c))
    fit = cp.sum_squares(materialised(problem) @ U - problem.Y) / (2 * len(problem.X))
    norms = [cp.norm(U[i * d : (i + 1) * d], "fro") for i in range(m)]
    program = cp.Problem(cp.Minimize(fit + problem.lam * sum(norms)))
    data, chain, inverse = program.get_problem_data(cp.CLARABEL)
    names = ("tol_gap_abs", "tol_gap_rel", "tol_feas", "tol_ktratio")
    options = {**dict.fromkeys(names, level), "max_threads": 1}
    with clock:
        raw = chain.solve_via_data(program, data, solver_opts=options)
    program.unpack_results(raw, chain, inverse)
    return U.value.reshape(m, d, c)


def materialised(problem) -> np.ndarray:
    """[D_1 X, ..., D_m X] (n, m d), Fortran order."""
    m, d, _ = problem.shape
    out = np.empty((len(problem.X), m * d), order="F")
    for i in range(m):
        out[:, i * d : (i + 1) * d] = problem.D[:, i, None] * problem.X
    return out


def _each(problem, solve):
    """Weights from one (m d,) solution per output."""
    m, d, _ = problem.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # non-convergence: the referee will see
        found = [solve(np.ascontiguousarray(y)).reshape(m, d) for y in problem.Y.T]
    return np.stack(found, axis=2)


def _only_one_output(problem):
    if problem.shape[2] > 1 and not problem.by_output:
        raise Skip("no penalty over all outputs of a gate")
