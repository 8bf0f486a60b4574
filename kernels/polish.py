"""One-vs-all with a polished second layer: Convex Distillation's way, kept as the reference.

It is what the joint solve is compared with (docs: convex.md, section 1); nothing else uses it.
"""

from typing import NamedTuple

import numpy as np

from edgesolve.kernels.designs import Design, Explicit
from edgesolve.kernels.losses import SquaredRows
from edgesolve.kernels.penalties import GroupL2, GroupL2Output, lam_max
from edgesolve.kernels.solution import Solution
from edgesolve.kernels.solve import solve


class Polished(NamedTuple):
    """weights (D, c), intercept (c,): both layers folded into one head; and the two solves."""

    weights: np.ndarray
    intercept: np.ndarray
    first: Solution
    second: Solution


def one_vs_all_polish(
    design: Design,
    t: np.ndarray,
    *,
    ratio: float,
    polish_ratio: float,
    ridge: float = 0.0,
    polish_ridge: float = 0.0,
    tol: float = 1e-4,
) -> Polished:
    """c scalar solves with the gates shared, then a second layer over their hidden units.

    t (n, c). ratio, polish_ratio : lam of either solve as a share of its own lam_max, > 0; ridges
    are absolute. tol : on both relative duality gaps.

    Law: hidden unit (i, k) is A_i u_ik, so the second layer mixes the columns of each U_i and
    `weights` is again a gated head, U_i W_i with W_i (c, c). The joint solve ranges over all of these.
    """
    loss, starts = SquaredRows.of(design, t, ridge), design.starts
    top = lam_max(loss, GroupL2Output(1.0, starts))
    first = solve(loss, GroupL2Output(ratio * top, starts), tol=tol)
    H = hidden_units(design, first.weights)
    on = np.flatnonzero(H.any(axis=0))
    if not len(on):
        return Polished(first.weights, first.intercept, first, first)
    units = np.arange(len(on) + 1)
    loss = SquaredRows.of(Explicit(np.ascontiguousarray(H[:, on]), units), t, polish_ridge)
    top = lam_max(loss, GroupL2(1.0, units))
    second = solve(loss, GroupL2(polish_ratio * top, units), tol=tol)
    W = np.zeros((H.shape[1], loss.shape[1]))
    W[on] = second.weights
    return Polished(folded(starts, first.weights, W), second.intercept, first, second)


def hidden_units(design: Design, U: np.ndarray) -> np.ndarray:
    """H (n, m c) float64: column i c + k is A_i U_i[:, k], for U (D, c)."""
    starts = design.starts
    return np.hstack(
        [
            design.restrict(np.array([i])).forward(U[starts[i] : starts[i + 1]])
            for i in range(len(starts) - 1)
        ]
    )


def folded(starts: np.ndarray, U: np.ndarray, W: np.ndarray) -> np.ndarray:
    """The one head (D, c) that equals two layers: U_i W_i for U (D, c), W (m c, c).

    Law: A(folded) = hidden_units(A, U) W.
    """
    c = U.shape[1]
    return np.vstack(
        [U[starts[i] : starts[i + 1]] @ W[i * c : (i + 1) * c] for i in range(len(starts) - 1)]
    )
