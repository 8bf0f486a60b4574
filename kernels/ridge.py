"""The closed form: ridge regression from moments, certified, and its path over a grid."""

import time

import numpy as np

from edgesolve.kernels import gap
from edgesolve.kernels.losses import SquaredMoments
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.solution import Solution, Status

ACCEPT_GAP = 1e-6
_EPS = np.finfo(np.float64).eps


def ridge_absolute(moments: Moments, ridge_relative: float) -> float:
    """ridge_relative x mean feature variance: a ridge that follows the units of x."""
    if not (np.isfinite(ridge_relative) and ridge_relative >= 0):
        raise ValueError(f"ridge_relative must be finite and not negative, got {ridge_relative}.")
    mu_x, _ = moments.means()
    variance = np.diag(moments.sxx) / moments.n - mu_x * mu_x
    return ridge_relative * max(float(variance.mean()), 0.0)


def ridge(moments: Moments, ridge_relative: float) -> Solution:
    """argmin of E||t - U'x - b||^2 / 2 + (ridge/2)||U||^2, ridge = `ridge_absolute`.

    Cholesky with one step of iterative refinement; where the features are dependent at rounding
    level, the minimum-norm solution by eigenvalues. `kkt` is the gradient relative to ||grad(0)||.
    Status: CONVERGED if the certificate accepts (relative gap <= 1e-6), NOT_FINITE, or
    ILL_CONDITIONED. ValueError: a negative or non-finite ridge_relative.
    """
    began = time.perf_counter()
    absolute = ridge_absolute(moments, ridge_relative)
    if not np.isfinite([absolute, moments.sxx.sum(), moments.stx.sum(), moments.stt]).all():
        return _not_finite(moments, began)
    return ridge_of_loss(SquaredMoments.of(moments, absolute), began)


def ridge_of_loss(loss: SquaredMoments, began: float | None = None) -> Solution:
    """The same for a loss whose ridge is absolute; began : `time.perf_counter()` at the start."""
    began = time.perf_counter() if began is None else began
    solve = _cholesky_solver(loss) or _eigen_solver(loss)
    U = solve(loss.q)
    U += solve(-loss.grad(U))
    relative_gap = gap.relative_gap(loss, None, U)
    scale = np.linalg.norm(loss.q)
    kkt = float(np.linalg.norm(loss.grad(U)) / scale) if scale > 0 else 0.0
    accepted = relative_gap <= ACCEPT_GAP
    return Solution(
        weights=U,
        intercept=loss.intercept(U),
        status=Status.CONVERGED if accepted else Status.ILL_CONDITIONED,
        objective=loss.value(U),
        kkt=kkt,
        relative_gap=relative_gap,
        n_iter=1,
        seconds=time.perf_counter() - began,
    )


def ridge_path(fit: Moments, held_out: Moments, grid) -> list[tuple[float, float]]:
    """[(ridge_relative, held-out E||t - prediction||^2)] for every value of `grid`, in its order.

    One eigendecomposition serves all of them; the held-out error is exact, from moments.
    """
    unit = ridge_absolute(fit, 1.0)
    loss = SquaredMoments.of(fit, 0.0)
    values, vectors = np.linalg.eigh(loss.Q)
    along = vectors.T @ loss.q
    path = []
    for ridge_relative in grid:
        if not (np.isfinite(ridge_relative) and ridge_relative >= 0):
            raise ValueError(f"the grid must be finite and not negative, got {ridge_relative}.")
        U = vectors @ (_inverse(values, ridge_relative * unit, _rounding(loss))[:, None] * along)
        error = held_out.mean_squared_error(U, loss.intercept(U))
        path.append((float(ridge_relative), error))
    return path


def _cholesky_solver(loss):
    """B -> (Q + ridge)^-1 B, or None where the factor does not exist or is made of rounding."""
    H = loss.Q.copy()
    H.flat[:: len(H) + 1] += loss.ridge
    try:
        L = np.linalg.cholesky(H)
    except np.linalg.LinAlgError:
        return None
    if np.diag(L).min() ** 2 <= _rounding(loss):
        return None
    return lambda B: _solve_lower_transposed(L, _solve_lower(L, B))


def _eigen_solver(loss):
    values, vectors = np.linalg.eigh(loss.Q)
    inverse = _inverse(values, loss.ridge, _rounding(loss))[:, None]
    return lambda B: vectors @ (inverse * (vectors.T @ B))


def _rounding(loss):
    """Variances below this are noise: centring blurs them by the squared means they come from."""
    return 1e-12 * float(np.max(np.diag(loss.Q) + loss.mean_x**2))


def _inverse(values, ridge, rounding):
    """1 / (values + ridge), and 0 where that is below rounding: the pseudo-inverse."""
    shifted = np.maximum(values, 0.0) + ridge
    keep = shifted > max(rounding, len(values) * _EPS * shifted[-1])
    inverse = np.zeros_like(shifted)
    inverse[keep] = 1.0 / shifted[keep]
    return inverse


def _solve_lower(L, B, block=64):
    """L^-1 B. NumPy has no triangular solve: small diagonal blocks by LU, the rest by products."""
    X = B.copy()
    for a in range(0, len(L), block):
        b = a + block
        X[a:b] = np.linalg.solve(L[a:b, a:b], X[a:b] - L[a:b, :a] @ X[:a])
    return X


def _solve_lower_transposed(L, B, block=64):
    """L'^-1 B."""
    X = B.copy()
    for a in range((len(L) - 1) // block * block, -1, -block):
        b = a + block
        X[a:b] = np.linalg.solve(L[a:b, a:b].T, X[a:b] - L[b:, a:b].T @ X[b:])
    return X


def _not_finite(moments, began):
    nan = float("nan")
    seconds = time.perf_counter() - began
    weights, intercept = np.zeros((moments.d, moments.c)), np.full(moments.c, nan)
    return Solution(weights, intercept, Status.NOT_FINITE, nan, nan, nan, 0, seconds)
