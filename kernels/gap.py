"""An independent certificate: how far a point can be from the optimum, whoever found it.

The dual point is the scaled residual, feasible by construction; the form is a sum of brackets that
are each >= 0, so that no two large numbers are subtracted (docs: convex.md, section 3; for the
screening literature, Fercoq, Gramfort, Salmon 2015). All in float64.
"""

import numpy as np

from edgesolve.kernels.losses import SquaredMoments
from edgesolve.kernels.prox import group_norms, group_sums

OBJECTIVE_FLOOR = 1e-9
"""`relative_gap` divides by no less than this share of P(0): rounding blurs P(U) by about 1e-15
P(0), so that below it no point could be told from the optimum to the 1e-6 that we accept at."""


def duality_gap(loss, penalty, U: np.ndarray) -> tuple[float, float]:
    """(gap, P(U)): P(U) - P* lies in [0, gap], up to rounding of about 1e-16 P(0).

    loss : `SquaredMoments` or `SquaredGated`, ridge included.
    penalty : `GroupL2`, or None for the ridge alone. U : (D, c), float64.

    With no penalty at all the gap is exact; it then needs an eigendecomposition of Q, and without
    Q (rows only) it is the trivial bound P(U).
    """
    U = np.asarray(U, np.float64)
    V, rr, ry = loss.residual(U)
    if penalty is None or penalty.lam == 0.0:
        objective = loss.value(U)
        return _smooth_gap(loss, U, V, objective), objective
    objective = loss.value(U) + penalty.value(U)
    gap = _ridge_gap if loss.ridge > 0 else _plain_gap
    return gap(loss, penalty, U, V, rr, ry), objective


def relative_gap(loss, penalty, U: np.ndarray) -> float:
    """gap / P(U), with P(U) taken as at least 1e-9 P(0); 0 when the gap is 0. Accept at 1e-6.

    Targets that don't vary leave P(0) to the rounding of their centring, eps ||mean_t||^2: that is
    then the scale, since nothing below it can be resolved.
    """
    gap, objective = duality_gap(loss, penalty, U)
    if gap == 0.0:
        return 0.0
    rounding = np.finfo(np.float64).eps * float(np.sum(np.square(loss.mean_t)))
    at_zero = loss.value(np.zeros_like(U, dtype=np.float64))
    scale = max(objective, OBJECTIVE_FLOOR * at_zero, rounding)
    return gap / scale if scale > 0 else np.inf


def _plain_gap(loss, penalty, U, V, rr, ry):
    limit = penalty.lam * penalty.group_weights
    s_max = _largest_scale(group_norms(V, penalty.starts), limit)
    s = np.clip(ry / rr if rr > 0 else 1.0, -s_max, s_max)
    inner = group_sums(U * V, penalty.starts)
    brackets = limit * group_norms(U, penalty.starts) - s * inner
    return float(0.5 * (1.0 - s) ** 2 * rr + brackets.sum())


def _ridge_gap(loss, penalty, U, V, rr, ry):
    """Any scaled residual is feasible; for a tiny ridge s = 1 is useless, so two are tried."""
    limit = penalty.lam * penalty.group_weights
    norms = group_norms(V - loss.ridge * U, penalty.starts)
    scales = (1.0, min(1.0, _largest_scale(norms, limit)))
    u, v = group_norms(U, penalty.starts), group_norms(V, penalty.starts)
    inner = group_sums(U * V, penalty.starts)

    def at(s):
        excess = np.maximum(s * v - limit, 0.0)
        # lam u + ridge/2 u^2 + excess^2/(2 ridge) - s<U, V>, as a square plus Cauchy-Schwarz slack.
        square = (excess - loss.ridge * u) ** 2 / (2.0 * loss.ridge)
        slack = (excess + limit) * u - s * inner
        return 0.5 * (1.0 - s) ** 2 * rr + float((square + slack).sum())

    return min(at(s) for s in scales)


def _smooth_gap(loss, U, V, objective):
    if loss.ridge > 0:
        grad = loss.ridge * U - V
        return float(np.vdot(grad, grad)) / (2.0 * loss.ridge)
    if not V.any():
        return 0.0
    if not isinstance(loss, SquaredMoments) or not np.isfinite(V).all():
        return objective
    # P(U) - P* = <V, pinv(Q) V>/2. Directions below rounding count as if they were at it.
    values, vectors = np.linalg.eigh(loss.Q)
    floor = max(values[-1], 0.0) * len(values) * np.finfo(np.float64).eps
    if floor == 0.0:
        return np.inf
    along = ((vectors.T @ V) ** 2).sum(axis=1)
    return float(0.5 * (along / np.maximum(values, floor)).sum())


def _largest_scale(norms, limit):
    """The largest s with s norms <= limit."""
    some = norms > 0
    return float(np.min(limit[some] / norms[some], initial=np.inf))
