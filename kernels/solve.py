"""One entrance to the solvers: the fastest that fits the problem and the budgets.

Chosen by measurement (`make bench-solvers`): for group-l2, `variational` where rows are few and
weights many, else `newton`; closed forms where there is no penalty; `fista` for all other penalties,
and where memory is too small for the others.
"""

import math
import time
from dataclasses import replace

import numpy as np

from edgesolve.kernels.fista import fista
from edgesolve.kernels.losses import SquaredRows
from edgesolve.kernels.newton import newton
from edgesolve.kernels.penalties import GroupL2
from edgesolve.kernels.ridge import ridge_of_loss
from edgesolve.kernels.sample_space import ridge_rows
from edgesolve.kernels.solution import Solution, Status
from edgesolve.kernels.variational import variational

FEW_ROWS = 600
"""Up to here, and with fewer rows than weights, n x n factors beat products with the rows."""

METHODS = ("newton", "variational", "fista", "ridge")


def solve(
    loss,
    penalty=None,
    U0=None,
    *,
    method: str = "auto",
    tol: float = 1e-6,
    seconds: float = math.inf,
    memory_mib: float = math.inf,
) -> Solution:
    """argmin of loss(U) + penalty(U), with a certificate whatever the method.

    loss : `SquaredMoments` or `SquaredRows`. penalty : any of `penalties.py`, or None for the ridge
    alone. U0 (D, c) : warm start. method : "auto" or one of `METHODS`. tol : on the relative duality
    gap. seconds : the best point so far is returned when they are over, status OUT_OF_TIME.
    memory_mib : peak beside the loss itself, computed by `peak_mib` before anything is allocated;
    "auto" takes the first method that fits.

    ValueError, before any work: what doesn't fit together, a budget of zero, or no method that
    fits the memory.
    """
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}.")
    if not (seconds > 0 and memory_mib > 0):
        raise ValueError(f"budgets must be positive, got {seconds} s and {memory_mib} MiB.")
    if method not in ("auto", *METHODS):
        raise ValueError(f"method must be auto or one of {', '.join(METHODS)}, got {method!r}.")
    _finite(loss)
    if penalty is not None and penalty.lam == 0.0:
        penalty = None
    fits = [m for m in _able(loss, penalty) if peak_mib(loss, m) <= memory_mib]
    if method != "auto":
        if method not in _able(loss, penalty):
            raise ValueError(f"{method} can't solve {_name(loss)} with {_name(penalty)}.")
        fits = [m for m in fits if m == method]
    if not fits:
        tried = [method] if method != "auto" else _able(loss, penalty)
        least = min(peak_mib(loss, m) for m in tried)
        raise ValueError(
            f"{_name(loss)} of D = {loss.shape[0]} needs {least:.1f} MiB beside its data with "
            f"{' or '.join(tried)}, the budget is {memory_mib:g}: fewer gates, or more memory."
        )
    return _run(fits[0], loss, penalty, U0, tol, seconds)


def peak_mib(loss, method: str) -> float:
    """Peak memory of a method beside the loss, in MiB; measured against in tests."""
    D, c = loss.shape
    rows = isinstance(loss, SquaredRows)
    n = loss.n if rows else 0
    data = loss.design.nbytes if rows else loss.Q.nbytes
    numbers = {
        "fista": 8 * D * c,
        "newton": 16 * D * c,
        "variational": 5 * n * n + 4 * n * _gates(loss) * c + 3 * D * c,
        "ridge": 4 * n * n + 3 * D * c if rows else 3 * D * D + 4 * D * c,
    }[method]
    if method == "newton":
        # A float32 copy, and both restricted to the gates at work and to those that are on.
        numbers += (0.5 * data + (n * _gates(loss) / 8 * 2 if rows else 3 * data)) / 8
    tiles = 4 * (1 << 18) + 2 * n * c if rows else 0
    return 8 * (numbers + tiles) / 2**20


def _gates(loss):
    return len(loss.design.starts) - 1 if isinstance(loss, SquaredRows) else 0


def _able(loss, penalty):
    """The methods for such a problem, the fastest first."""
    rows = isinstance(loss, SquaredRows)
    if penalty is None:
        if rows:
            few = loss.ridge > 0 and loss.n <= 4 * FEW_ROWS
            return (
                ["ridge", "fista"] if few else ["fista", "ridge"] if loss.ridge > 0 else ["fista"]
            )
        return ["ridge", "fista"]
    if not isinstance(penalty, GroupL2):
        return ["fista"]
    if not rows:
        return ["newton", "fista"]
    few = loss.n <= FEW_ROWS and loss.n < loss.shape[0]
    return ["variational", "newton", "fista"] if few else ["newton", "fista", "variational"]


def _run(method, loss, penalty, U0, tol, seconds):
    if method == "ridge":
        return ridge_rows(loss) if isinstance(loss, SquaredRows) else ridge_of_loss(loss)
    if method == "fista":
        return _fista(loss, penalty, U0, tol, seconds)
    solver = newton if method == "newton" else variational
    return solver(loss, penalty, U0, tol=tol, seconds=seconds)


def _fista(loss, penalty, U0, tol, seconds):
    """FISTA stops on its residual: go on with a smaller one until the gap is small as well."""
    began, goal, n_iter = time.perf_counter(), math.sqrt(tol) * 0.1, 0
    while True:
        left = seconds - (time.perf_counter() - began)
        found = fista(loss, penalty, U0, tol=goal, max_iter=5000, seconds=max(left, 1e-9))
        n_iter += found.n_iter
        done = found.relative_gap <= tol or found.status is not Status.CONVERGED or goal < 1e-14
        if done:
            status = found.status
            if found.relative_gap <= tol:
                status = Status.CONVERGED
            elif status is Status.CONVERGED:
                status = Status.ILL_CONDITIONED
            spent = time.perf_counter() - began
            return replace(found, status=status, n_iter=n_iter, seconds=spent)
        U0, goal = found.weights, goal * 0.1


def _finite(loss):
    arrays = [getattr(loss, name) for name in ("Y", "Q", "q") if hasattr(loss, name)]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(
            f"{_name(loss)} holds NaN or inf: look at the features first, a saturated backbone is "
            "the usual cause."
        )


def _name(thing):
    return "no penalty" if thing is None else type(thing).__name__
