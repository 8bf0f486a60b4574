"""Makes cones.npz beside it. Needs cvxpy and Clarabel, which no test does: run it by hand."""

from pathlib import Path

import cvxpy as cp
import numpy as np

TIGHT = {"solver": cp.CLARABEL, "tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "tol_feas": 1e-9}
N, DIM, M = 60, 4, 8

rng = np.random.default_rng(60)
X = np.round(rng.standard_normal((N, DIM)), 3)
G = np.round(rng.standard_normal((DIM, M)), 3)
hidden = np.maximum(X @ rng.standard_normal((DIM, 3)), 0)
Y = hidden @ rng.standard_normal((3, 2)) + 1 + 0.1 * rng.standard_normal((N, 2))
Y = np.round(Y, 3)
U = np.round(rng.standard_normal((DIM, M)), 3)
D = X @ G >= 0
S = np.where(D, 1.0, -1.0)
assert (np.abs(X @ G) > 1e-5).all()


def solved(value, *constraints):
    problem = cp.Problem(cp.Minimize(value), list(constraints))
    problem.solve(**TIGHT)
    assert problem.status == "optimal", problem.status
    return problem.value


def optimum(y, lam, intercept):
    v, w, b = cp.Variable((DIM, M)), cp.Variable((DIM, M)), cp.Variable()
    fit = cp.sum(cp.multiply(D, X @ (v - w)), axis=1) + (b if intercept else 0.0)
    penalty = lam * cp.sum(cp.norm(v, axis=0) + cp.norm(w, axis=0))
    inside = (cp.multiply(S, X @ part) >= 0 for part in (v, w))
    return solved(cp.sum_squares(fit - y) / (2 * N) + penalty, *inside)


def least_norm(i):
    v, signed = cp.Variable(DIM), S[:, [i]] * X
    return solved(cp.norm(v) + cp.norm(v - U[:, i]), signed @ v >= 0, signed @ (v - U[:, i]) >= 0)


lams = [0.02, 0.2]
np.savez(
    Path(__file__).with_name("cones.npz"),
    **dict(zip("XGYU", (X, G, Y, U), strict=True)),
    lams=lams,
    objectives=[[[optimum(y, lam, b) for y in Y.T] for b in (False, True)] for lam in lams],
    norms=[least_norm(i) for i in range(M)],
)
