"""An independent certificate: how far a point can be from the optimum, whoever found it.

The dual point is the scaled residual of the point itself or of another, feasible by construction;
the form is a sum of brackets that are each >= 0, so that no two large numbers are subtracted (docs:
convex.md, section 3; for the screening literature, Fercoq, Gramfort, Salmon 2015). All in float64.
"""

from typing import NamedTuple

import numpy as np

from edgesolve.kernels.designs import TILE_FLOATS
from edgesolve.kernels.losses import SquaredMoments

OBJECTIVE_FLOOR = 1e-9
"""`relative_gap` divides by no less than this share of P(0): rounding blurs P(U) by about 1e-15
P(0), so that below it no point could be told from the optimum to the 1e-6 that we accept at."""

GRAM_WEIGHTS = 512
"""Most weights D whose Q is made from rows to certify least squares: 5 D^2 numbers, 10 MiB."""


class _Residual(NamedTuple):
    """R = Y - A U at some weights U, as far as the certificate needs it; R itself stays unformed."""

    U: np.ndarray
    V: np.ndarray  # A'R/n
    rr: float  # ||R||^2/n
    ry: float  # <R, Y>/n


def duality_gap(loss, penalty, U: np.ndarray, dual: np.ndarray | None = None):
    """(gap, P(U)): P(U) - P* lies in [0, gap], up to rounding of about 1e-16 P(0).

    loss : `SquaredMoments` or `SquaredRows`, ridge included; any other, such as `Softmax`, is asked
    for its own `duality_gap`. penalty : a `Penalty`, or None for the ridge alone. U : (D, c),
    float64. dual : (D, c), any other weights, whose scaled residual is tried as dual point too; the
    smaller gap is returned, so that a bad `dual` costs time and nothing else. The gap shrinks with
    the distance of `dual` to the optimum: with the point that a Newton step on U's support leads to
    it is about the error itself.

    With no penalty at all the gap is exact. Without a ridge it then needs an eigendecomposition of
    Q, which is made for rows of at most `GRAM_WEIGHTS` columns; beyond it is the trivial bound P(U).
    """
    if hasattr(loss, "duality_gap"):
        return loss.duality_gap(penalty, U, dual)
    U = np.asarray(U, np.float64)
    here = _Residual(U, *loss.residual(U))
    if penalty is None or penalty.lam == 0.0:
        objective = loss.value(U)
        return _smooth_gap(loss, U, here.V, objective), objective
    objective = loss.value(U) + penalty.value(U)
    gap = _ray_gap(loss, penalty, here, here)
    if dual is not None:
        dual = np.asarray(dual, np.float64)
        other = _ray_gap(loss, penalty, here, _Residual(dual, *loss.residual(dual)))
        gap = other if other < gap else gap
    return gap, objective


def relative_gap(loss, penalty, U: np.ndarray, dual: np.ndarray | None = None) -> float:
    """gap / P(U), with P(U) taken as at least 1e-9 P(0); 0 when the gap is 0. Accept at 1e-6.

    Targets that don't vary leave P(0) to the rounding of their centring, eps ||mean_t||^2: that is
    then the scale, since nothing below it can be resolved.
    """
    return relative(loss, *duality_gap(loss, penalty, U, dual))


def gap_of_residual(loss, penalty, U: np.ndarray, residual) -> float:
    """The gap at U of a solver that has `loss.residual(U)` at hand already; lam > 0."""
    here = _Residual(U, *residual)
    return _ray_gap(loss, penalty, here, here)


def relative(loss, gap: float, objective: float) -> float:
    """What `relative_gap` makes of a gap and an objective."""
    if gap <= 0.0:  # below zero by rounding
        return 0.0
    rounding = np.finfo(np.float64).eps * float(np.sum(np.square(loss.mean_t)))
    at_zero = loss.value(np.zeros(loss.shape))
    scale = max(objective, OBJECTIVE_FLOOR * at_zero, rounding)
    return gap / scale if scale > 0 else np.inf


def _ray_gap(loss, penalty, here, ray):
    """P(here.U) less the best dual value found at Theta = s R_W/n, R_W the residual `ray`.

    With <R_W, Y> = <R_W, R_U> + <A'R_W, U> it is, for every s for which Theta is feasible,

        ||R_U - s R_W||^2/(2n) + sum_g [limit_g N(U_g) - s <U_g, V_g>],   V = A'R_W/n.

    R_U - s R_W = (1 - s) R_U + s A(W - U) leaves products with W - U: for W = U nothing but
    (1 - s)^2 ||R_U||^2/(2n).
    """
    move = ray.U - here.U
    along = float(np.vdot(here.V, move))  # <R_U, A(W - U)>/n
    across = float(np.vdot(move, here.V - ray.V))  # ||A(W - U)||^2/n

    def at(s):
        fit = (1.0 - s) ** 2 * here.rr + 2.0 * s * (1.0 - s) * along + s * s * across
        return 0.5 * fit + group_gap(penalty, loss.ridge, here.U, s * ray.V)

    return min(at(s) for s in _scales(loss, penalty, ray))


def group_gap(penalty, ridge: float, U: np.ndarray, pull: np.ndarray) -> float:
    """What the groups add to the gap of U at a dual point Theta with A'Theta = pull (D, c).

    sum_g limit_g N(U_g) - <U_g, pull_g>, each term >= 0 where N°(pull_g) <= limit_g. A ridge makes
    every Theta feasible; the bracket of group g is then

        limit_g N(U_g) - <U_g, pull_g - E_g> + ||E_g - ridge U_g||^2/(2 ridge),   E = prox(pull),

    where N°(pull_g - E_g) <= limit_g: again two terms that are each >= 0, for every norm N.
    """
    square = 0.0
    if ridge > 0:
        shrunk = penalty.prox(pull, 1.0)
        beyond = shrunk - ridge * U
        pull, square = pull - shrunk, np.vdot(beyond, beyond) / ridge
    paid = penalty.limit * penalty.norms(U)
    return float(0.5 * square + np.sum(paid - penalty.inner(U, pull)))


def _scales(loss, penalty, ray):
    """The best feasible scale; with a ridge two, since s = 1 is useless where the ridge is tiny."""
    s_max = largest_scale(penalty, ray.V - loss.ridge * ray.U)
    if loss.ridge > 0:
        return 1.0, min(1.0, s_max)
    return (np.clip(ray.ry / ray.rr if ray.rr > 0 else 1.0, -s_max, s_max),)


def _smooth_gap(loss, U, V, objective):
    if loss.ridge > 0:
        grad = loss.ridge * U - V
        return float(np.vdot(grad, grad)) / (2.0 * loss.ridge)
    if not V.any():
        return 0.0
    # With fewer rows than weights P(U) is nearly always the gap itself.
    if not np.isfinite(V).all() or (
        not isinstance(loss, SquaredMoments) and len(U) > min(loss.n, GRAM_WEIGHTS)
    ):
        return objective
    # P(U) - P* = <V, pinv(Q) V>/2. Directions below rounding count as if they were at it.
    values, vectors = np.linalg.eigh(_gram(loss))
    floor = max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    if floor == 0.0:
        return np.inf
    along = ((vectors.T @ V) ** 2).sum(axis=1)
    return float(0.5 * (along / np.maximum(values, floor)).sum())


def _gram(loss):
    """Q (D, D); from rows some columns at a time, so that no copy of all rows is made."""
    if isinstance(loss, SquaredMoments):
        return loss.Q
    step = max(1, TILE_FLOATS // loss.n)
    unit = np.eye(loss.shape[0])
    return np.hstack([loss.product(unit[:, a : a + step]) for a in range(0, len(unit), step)])


def largest_scale(penalty, V: np.ndarray) -> float:
    """The largest s with N°(s V_g) <= limit_g for every group."""
    norms = penalty.dual_norms(V)
    some = norms > 0
    limit = np.broadcast_to(penalty.limit, norms.shape)
    return float(np.min(limit[some] / norms[some], initial=np.inf))
