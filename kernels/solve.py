"""One entrance to the solvers: the fastest that fits the problem and the budgets.

Chosen by measurement (`make bench-solvers`): for group-l2, `variational` where rows are few and
weights many, else `newton` (`softmax_newton` for `Softmax`); closed forms where there is no penalty;
`fista` for all other penalties, and where memory is too small for the others.
"""

import math
import time
from dataclasses import replace

import numpy as np

from edgesolve.kernels.fista import fista
from edgesolve.kernels.losses import SquaredRows
from edgesolve.kernels.newton import newton
from edgesolve.kernels.peak import peak_mib
from edgesolve.kernels.penalties import GroupL2
from edgesolve.kernels.point import check_start
from edgesolve.kernels.ridge import ridge_of_loss
from edgesolve.kernels.sample_space import ridge_rows
from edgesolve.kernels.softmax import Softmax
from edgesolve.kernels.softmax_newton import softmax_newton
from edgesolve.kernels.solution import Solution, Status
from edgesolve.kernels.variational import variational

FEW_ROWS = 2400
"""Up to here a ridge is solved by an n x n factor."""

FEW_SHARE = 5.0
"""`variational` is taken where n (n + m c) is below this many times D c: twelve of its steps, 4 n^2 (n + m c)
in float64, then take less than the hundred products in float32, 4 n D c, that `newton` needs."""

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

    loss : `SquaredMoments`, `SquaredRows` or `Softmax`. penalty : any of `penalties.py`, or None for the ridge
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
    check_start(loss, U0)
    _finite(loss)
    _fitting(loss, penalty)
    if penalty is not None and penalty.lam == 0.0:
        penalty = None
    fits = [m for m in able(loss, penalty) if peak_mib(loss, m) <= memory_mib]
    if method != "auto":
        if method not in able(loss, penalty):
            raise ValueError(f"{method} can't solve {_name(loss)} with {_name(penalty)}.")
        fits = [m for m in fits if m == method]
    if not fits:
        tried = [method] if method != "auto" else able(loss, penalty)
        least = min(peak_mib(loss, m) for m in tried)
        raise ValueError(
            f"{_name(loss)} of D = {loss.shape[0]} needs {least:.1f} MiB beside its data with "
            f"{' or '.join(tried)}, the budget is {memory_mib:g}: fewer gates, or more memory."
        )
    return _in_turn(fits, loss, penalty, U0, tol, seconds)


def able(loss, penalty) -> list[str]:
    """The methods for such a problem, the fastest first."""
    if isinstance(loss, Softmax):
        return ["newton", "fista"] if isinstance(penalty, GroupL2) else ["fista"]
    if not isinstance(loss, SquaredRows):
        if penalty is None:
            return ["ridge", "fista"]
        return ["newton", "fista"] if isinstance(penalty, GroupL2) else ["fista"]
    if penalty is None:
        if not loss.ridge > 0:
            return ["fista"]
        return ["ridge", "fista"] if loss.n <= FEW_ROWS else ["fista", "ridge"]
    if not isinstance(penalty, GroupL2):
        return ["fista"]
    (D, c), n, m = loss.shape, loss.n, len(penalty.limit)
    if n * (n + m * c) <= FEW_SHARE * D * c:
        return ["variational", "newton", "fista"]
    return ["newton", "fista", "variational"]


def _run(method, loss, penalty, U0, tol, seconds):
    if method == "ridge":
        return ridge_rows(loss) if isinstance(loss, SquaredRows) else ridge_of_loss(loss)
    if method == "fista":
        return _fista(loss, penalty, U0, tol, seconds)
    if method == "variational":
        return variational(loss, penalty, U0, tol=tol, seconds=seconds)
    solver = softmax_newton if isinstance(loss, Softmax) else newton
    return solver(loss, penalty, U0, tol=tol, seconds=seconds)


def _in_turn(methods, loss, penalty, U0, tol, seconds):
    """The first method; where rounding ends `variational` early, `newton` from where it stands."""
    found = _run(methods[0], loss, penalty, U0, tol, seconds)
    again = found.status is Status.ILL_CONDITIONED and methods[:2] == ["variational", "newton"]
    if not (again and found.seconds < seconds):
        return found
    more = newton(loss, penalty, found.weights, tol=tol, seconds=seconds - found.seconds)
    return replace(more, n_iter=found.n_iter + more.n_iter, seconds=found.seconds + more.seconds)


def _fitting(loss, penalty):
    """ValueError where the penalty's groups are not those of the weights."""
    D = loss.shape[0]
    if hasattr(penalty, "starts") and penalty.starts[-1] != D:
        raise ValueError(f"starts must end at D = {D}, got {penalty.starts[-1]}.")
    if hasattr(penalty, "n_gates") and (
        D % penalty.n_gates or len(penalty.weights) not in (1, D // penalty.n_gates)
    ):
        raise ValueError(
            f"{D} weights of {penalty.n_gates} gates don't make {len(penalty.weights)} inputs."
        )


def _fista(loss, penalty, U0, tol, seconds):
    """FISTA stops on its residual: go on with a smaller one until the gap is small as well."""
    began, goal, n_iter = time.perf_counter(), math.sqrt(tol) * 0.1, 0
    penalty = GroupL2(0.0, [0, loss.shape[0]]) if penalty is None else penalty
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
    arrays = [getattr(loss, name) for name in ("Y", "T", "Q", "q", "y2") if hasattr(loss, name)]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(
            f"{_name(loss)} holds NaN or inf: look at the features first, a saturated backbone is "
            "the usual cause."
        )


def _name(thing):
    return "no penalty" if thing is None else type(thing).__name__
