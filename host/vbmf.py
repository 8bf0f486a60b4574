"""How many singular values stand out of the noise: empirical variational Bayes, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.optimize import brentq, minimize_scalar

GRID = 256
MUSCO_LEAST = 21


@dataclass(frozen=True, slots=True, eq=False)
class Vbmf:
    """rank: directions kept. sigma2: the noise's variance per entry. shrunk (rank,): posterior singular values."""

    rank: int
    sigma2: float
    shrunk: np.ndarray


def evbmf(
    values: np.ndarray, shape: tuple[int, int] | None = None, sigma2: float | None = None
) -> Vbmf:
    """The global optimum of fully observed empirical VBMF.

    values: a matrix, or with `shape` all min(shape) singular values of one. sigma2: the noise where it is known;
    without it, the one of least free energy. Transposing changes nothing; scaling by k scales sigma2 by k² and
    shrunk by k. (Nakajima et al., JMLR 14, 2013, theorems 2 and 3, with the exact threshold.)
    """
    values = np.asarray(values, np.float64)
    if shape is None:
        if values.ndim != 2 or not values.size:
            raise ValueError(
                f"evbmf takes a matrix, or singular values and its shape, got an array of shape {values.shape}."
            )
        shape = values.shape
        values = np.linalg.svd(_finite(values), compute_uv=False)
    L, M = sorted(shape)
    if values.shape != (L,) or L < 1:
        raise ValueError(f"a matrix of shape {shape} has {L} singular values, got {values.shape}.")
    if sigma2 is not None and not sigma2 > 0:
        raise ValueError(f"sigma2 must be positive, got {sigma2}.")
    g = np.sort(_finite(values))[::-1]
    if not g[0] > 0:
        return Vbmf(0, 0.0, np.zeros(0))
    sigma2 = _noise(g, L, M) if sigma2 is None else float(sigma2)
    kept = g[g > np.sqrt(M * sigma2 * threshold(L / M))]
    b = 1.0 - (L + M) * sigma2 / kept**2
    return Vbmf(
        len(kept), sigma2, kept / 2 * (b + np.sqrt(b**2 - 4.0 * L * M * sigma2**2 / kept**4))
    )


def tucker2_ranks(weight: np.ndarray) -> tuple[int, int]:
    """(r_out, r_in) of a weight (T, c, kh, kw), from its unfoldings (T, c kh kw) and (c, T kh kw); 0: only noise.

    (Kim et al. 2016.)
    """
    W = np.asarray(weight, np.float64)
    if W.ndim != 4:
        raise ValueError(f"tucker2_ranks takes a weight (T, c, kh, kw), got shape {W.shape}.")
    swapped = W.transpose(1, 0, 2, 3)
    return evbmf(W.reshape(len(W), -1)).rank, evbmf(swapped.reshape(len(swapped), -1)).rank


def weakened(rank: int, full: int, w: float) -> int:
    """Between `full` (w = 0) and `rank` (w = 1), at least 21 but never above `full`; rank 0 tells nothing: `full`.

    (MUSCO, Gusak et al. 2019; theirs returns 21 for a layer of fewer channels too.)
    """
    if not 0.0 <= w <= 1.0 or not 0 <= rank <= full:
        raise ValueError(f"w must lie in [0, 1] and rank in 0..{full}, got w = {w}, rank = {rank}.")
    if rank == 0:
        return full
    return min(full, max(MUSCO_LEAST, int(full - w * (full - rank))))


@cache
def tau_bar(a: float) -> float:
    """The root of phi(t) + phi(t / a), phi(z) = log(1 + z) / z - 1/2, for 0 < a <= 1: 2.5129 √a at a = 1 only."""
    guess = 2.5129 * np.sqrt(a)
    return float(
        brentq(lambda t: _phi(t) + _phi(t / a), guess / 2, guess * 2, xtol=1e-300, rtol=1e-14)
    )


def threshold(a: float) -> float:
    """The least g² / (M sigma²) of a singular value g that is kept."""
    tau = tau_bar(a)
    return (1.0 + tau) * (1.0 + a / tau)


def _phi(z: float) -> float:
    return np.log1p(z) / z - 0.5


def _noise_bounds(g: np.ndarray, L: int, M: int) -> tuple[float, float]:
    """The noise of least free energy lies between these: at most `most` values, the first ones, are kept."""
    a = L / M
    most = min(int(np.ceil(L / (1.0 + a))) - 1, L)
    tail = g[most:] ** 2 / M  # the paper's h > most, counted from 1
    return max(tail[0] / threshold(a), float(tail.mean())), float(np.sum(g**2)) / (L * M)


def _free_energy(sigma2: np.ndarray, g2: np.ndarray, a: float) -> np.ndarray:
    """At each sigma2 (n,), up to a constant; g2 (L,): squared singular values over M."""
    x = g2 / np.asarray(sigma2)[..., None]
    z = np.maximum(x, threshold(a))  # where x is kept
    b = z - (1.0 + a)
    tau = (b + np.sqrt(b**2 - 4.0 * a)) / 2
    kept = np.log1p(tau) + a * np.log1p(tau / a) - tau
    return np.sum(x - np.log(x) + np.where(x > threshold(a), kept, 0.0), axis=-1)


def _noise(g: np.ndarray, L: int, M: int) -> float:
    # Values at rounding level are noise of that level, so that an exactly low-rank matrix has its rank.
    g = np.maximum(g, g[0] * np.finfo(np.float64).eps)
    low, high = _noise_bounds(g, L, M)
    if not low < high:
        return high
    g2, a = g**2 / M, L / M
    # In log sigma2: Brent's absolute tolerance must not depend on the weights' unit. The grid: several minima.
    grid = np.linspace(np.log(low), np.log(high), GRID)
    at = int(np.argmin(_free_energy(np.exp(grid), g2, a)))
    around = grid[max(at - 1, 0)], grid[min(at + 1, GRID - 1)]
    found = minimize_scalar(
        lambda t: float(_free_energy(np.exp(t), g2, a)),
        bounds=around,
        method="bounded",
        options={"xatol": 1e-10},
    )
    return float(np.exp(found.x))


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError("evbmf takes finite numbers, got NaN or infinity.")
    return values
