"""Ridge regression with few rows and many weights: an n x n system, and leave-one-out errors free.

With A (n, D) centred and K = AA', (K + n ridge I) alpha = Y and U = A'alpha. Whatever D is.
"""

import time

import numpy as np

from edgesolve.kernels import gap
from edgesolve.kernels.losses import SquaredRows
from edgesolve.kernels.solution import Solution, Status
from edgesolve.kernels.variational import kernel_of

ACCEPT_GAP = 1e-6


def ridge_rows(loss: SquaredRows) -> Solution:
    """argmin of the loss alone, ridge > 0. Costs n^3/3 and the n x n kernel; memory 3 n^2.

    Equal to `ridge` on the moments of the same rows up to rounding. Status as there.
    """
    began = time.perf_counter()
    H = _system(loss)
    alpha = _refined(H, loss.Y)
    U = loss.design.adjoint(alpha)
    found = gap.relative_gap(loss, None, U)
    scale = float(np.linalg.norm(loss.grad(np.zeros(loss.shape))))
    kkt = float(np.linalg.norm(loss.grad(U)))
    return Solution(
        weights=U,
        intercept=loss.intercept(U),
        status=_status(found),
        objective=loss.value(U),
        kkt=kkt / scale if scale > 0 else kkt,
        relative_gap=found,
        n_iter=1,
        seconds=time.perf_counter() - began,
    )


def leave_one_out(loss: SquaredRows) -> np.ndarray:
    """Residual (n, c) of each row under the ridge solution of the others, intercept refitted.

    alpha_r / [H^-1]_rr with H = K + n' ridge I held fixed, bordered by the intercept's column: exact
    when the penalty's weight n ridge stays what it is for n rows. So a ridge is chosen without a
    validation set. Allen 1974 (PRESS).
    """
    H = _system(loss)
    inverse = np.linalg.inv(H)
    if loss.centre:
        # The border's Schur complement takes the ones out: H acts on their complement alone.
        ones = inverse.sum(axis=1)
        inverse = inverse - np.outer(ones, ones) / ones.sum()
    return (inverse @ loss.Y) / np.diag(inverse)[:, None]


def _system(loss):
    if not loss.ridge > 0:
        raise ValueError("the sample-space ridge needs ridge > 0; without one use moments.")
    K = kernel_of(loss.design).gram(np.ones(len(loss.design.starts) - 1))
    if loss.centre:
        # Nothing is sought along the ones: any curvature there will do, and rounding needs some.
        K = K - K.mean(axis=0) - K.mean(axis=1)[:, None] + K.mean() + np.trace(K) / loss.n**2
    K.flat[:: loss.n + 1] += loss.n * loss.ridge
    return K


def _refined(H, Y):
    try:
        alpha = np.linalg.solve(H, Y)
        return alpha + np.linalg.solve(H, Y - H @ alpha)
    except np.linalg.LinAlgError:  # a ridge below rounding
        return np.linalg.pinv(H, hermitian=True) @ Y if np.isfinite(H).all() else np.nan * Y


def _status(found):
    if not np.isfinite(found):
        return Status.NOT_FINITE
    return Status.CONVERGED if found <= ACCEPT_GAP else Status.ILL_CONDITIONED
