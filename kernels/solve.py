"""One entrance to the solvers: the fastest that fits the problem and the budgets.

Chosen by measurement (`make bench-solvers`): for group-l2, `variational` where rows are few and
weights many, else `newton`; closed forms where there is no penalty; `fista` for all other penalties,
and where memory is too small for the others.
"""

import math
import time
from dataclasses import replace

import numpy as np

from edgesolve.kernels.designs import SAMPLE_ROWS, TILE_FLOATS, Masked, Pooled
from edgesolve.kernels.fista import fista
from edgesolve.kernels.gated import TILE_FLOATS as GATED_TILE_FLOATS
from edgesolve.kernels.losses import SquaredRows
from edgesolve.kernels.newton import newton
from edgesolve.kernels.penalties import GroupL2
from edgesolve.kernels.ridge import ridge_of_loss
from edgesolve.kernels.sample_space import ridge_rows
from edgesolve.kernels.solution import Solution, Status
from edgesolve.kernels.variational import variational

FEW_ROWS = 600
"""Up to here, and with fewer rows than weights, n x n factors beat products with the rows."""

FIXED_BYTES = 1 << 16
"""What small objects of a solve take."""

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
    _finite(loss, U0)
    _fitting(loss, penalty)
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
    return _in_turn(fits, loss, penalty, U0, tol, seconds)


def peak_mib(loss, method: str) -> float:
    """Peak memory of a method beside the loss, in MiB: an upper bound, against which tests measure."""
    D, c = loss.shape
    if not isinstance(loss, SquaredRows):
        square = D * D
        numbers = {
            "fista": 2 * square + 12 * D * c,  # the proof of its step size factors Q
            # A float32 copy, and both copies of the gates at work and of those that are on.
            "newton": 4.5 * square + 24 * D * c,
            "ridge": 3 * square + 4 * D * c,
        }[method]
        return (8 * numbers + FIXED_BYTES) / 2**20
    n, m, data = loss.n, len(loss.design.starts) - 1, loss.design.nbytes / 8
    numbers = {
        # The power iteration takes four columns at a time.
        "fista": 12 * D * max(c, 4) + _tiles(loss, max(c, 4)),
        "newton": 24 * D * c + _tiles(loss, c) + 0.5 * data + n * m / 4 + _surrogate(loss),
        "variational": 5 * n * n + 4 * n * m * c + 3 * m * m + 3 * D * c + _written_out(loss),
        "ridge": 4 * n * n + 3 * D * c + _tiles(loss, c) + _written_out(loss),
    }[method]
    if method == "newton" and not isinstance(loss.design, Masked):
        numbers += 2 * data  # the rows of the gates at work, in two precisions
    return (8 * (numbers + 6 * n * c) + FIXED_BYTES) / 2**20


def _tiles(loss, c):
    """Numbers that one product with the rows holds for a tile of them."""
    design = loss.design
    if isinstance(design, Pooled):
        (_, p, r), m = design.z.shape, design.D.shape[2]
        return 2 * min(GATED_TILE_FLOATS, loss.n * (p * (r + m) + m * r))
    if isinstance(design, Masked):
        return 3 * min(TILE_FLOATS, loss.n * (design.D.shape[1] * c + design.X.shape[1]))
    return 0 if design.A.dtype == np.float64 else min(TILE_FLOATS, loss.n * loss.shape[0])


def _surrogate(loss):
    """Gamma and S, their factors, and the sample of rows that pooled and explicit ones come from."""
    sizes = np.diff(loss.design.starts)
    D, k, r = loss.shape[0], len(sizes), int(sizes.max())
    sample = 0 if isinstance(loss.design, Masked) else 2 * min(loss.n, SAMPLE_ROWS) * D + 2 * D * D
    return 6 * k * k + 4 * r * r + sample + 3 * min(TILE_FLOATS, k * k * r)


def _written_out(loss):
    """Rows in float64, weighted rows, and what pooling made them from."""
    return 0 if isinstance(loss.design, Masked) else 3 * loss.n * loss.shape[0]


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


def _finite(loss, U0):
    if U0 is not None and np.shape(U0) != loss.shape:
        raise ValueError(f"U0 must be {loss.shape}, got {np.shape(U0)}.")
    if U0 is not None and not np.isfinite(U0).all():
        raise ValueError("U0 holds NaN or inf: start from None.")
    arrays = [getattr(loss, name) for name in ("Y", "Q", "q", "y2") if hasattr(loss, name)]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError(
            f"{_name(loss)} holds NaN or inf: look at the features first, a saturated backbone is "
            "the usual cause."
        )


def _name(thing):
    return "no penalty" if thing is None else type(thing).__name__
