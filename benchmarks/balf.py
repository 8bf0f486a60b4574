"""Two baselines for low-rank compression without fine-tuning: BALF, rebuilt, and plain SVD of the weights.

BALF as its code has it: uncentred second moments, no bias refit, every layer's energy worth the same. Ungrouped layers.
"""

from __future__ import annotations

import numpy as np

DEAD = 1e-10
"""Directions of the input whose root eigenvalue is below this are dropped: an absolute number, as published."""
BISECTIONS = 300


def balf_spectrum(W: np.ndarray, Sigma: np.ndarray) -> np.ndarray:
    """The min(T, D) singular values of W Sigma^½, falling; W (T, D), Sigma (D, D) = E[x x'], not centred."""
    s = np.linalg.svd(_whitened(W, Sigma)[0], compute_uv=False)
    return np.pad(s, (0, min(W.shape) - len(s)))


def balf_factor(W: np.ndarray, Sigma: np.ndarray, rank: int | None) -> np.ndarray:
    """The best Ŵ (T, D) of `rank` for E||W x - Ŵ x||²; None: W itself. The bias is to be copied."""
    if rank is None:
        return np.array(W, np.float64)
    M, inverse = _whitened(W, Sigma)
    U, s, Vt = np.linalg.svd(M, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ (Vt[:rank] @ inverse)


def balf_allocate(spectra: list[tuple[np.ndarray, int, int]], budget: float) -> list[int | None]:
    """One rank per layer, None for a layer left dense; total weights <= `budget`.

    spectra: (singular values, T, D) per layer. Maximises Σ_l e_l(r) - λ Σ_l min(r (D + T), T D) layer by layer,
    e_l(r) the share of the energy in the first r; λ by 300 bisections, its feasible end. Whatever the budget has
    left over stays unused, as published.
    """
    layers = [_curve(*layer) for layer in spectra]
    least = sum(cost[0] for _, cost in layers)
    if least > budget:
        raise ValueError(f"the budget is {budget:g} weights, rank 1 everywhere takes {least:g}.")
    # At λ = 1 a weight outweighs all energy of a layer: rank 1 everywhere.
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _spent(layers, _chosen(layers, middle)) <= budget:
            high = middle
        else:
            low = middle
    chosen = _chosen(layers, high)
    return [_rank(j + 1, T, D) for j, (_, T, D) in zip(chosen, spectra, strict=True)]


def uniform_svd(shapes: list[tuple[int, int]], share: float) -> list[int | None]:
    """The largest rank per layer (T, D) that keeps at most `share` of each one's weights, at least 1; None: dense."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must lie in (0, 1], got {share}.")
    if share == 1.0:
        return [None] * len(shapes)
    return [_rank(max(int(share * T * D / (T + D)), 1), T, D) for T, D in shapes]


def _whitened(W: np.ndarray, Sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(W R (T, k), pinv(R) (k, D)) for Sigma = R R'."""
    values, vectors = np.linalg.eigh(np.asarray(Sigma, np.float64))
    root = np.sqrt(np.maximum(values, 0.0))
    keep = root > DEAD
    R = vectors[:, keep] * root[keep]
    return np.asarray(W, np.float64) @ R, (vectors[:, keep] / root[keep]).T


def _curve(s: np.ndarray, T: int, D: int) -> tuple[np.ndarray, np.ndarray]:
    """(energy (J,), cost (J,)) of ranks 1..J; a layer without energy is worth the same at every rank."""
    energy = np.cumsum(np.asarray(s, np.float64) ** 2)
    if energy[-1] > 0:
        energy = energy / energy[-1]
    return energy, np.minimum(np.arange(1, len(s) + 1) * (D + T), T * D)


def _chosen(layers, price: float) -> list[int]:
    return [int(np.argmax(energy - price * cost)) for energy, cost in layers]


def _spent(layers, chosen: list[int]) -> int:
    return sum(int(cost[j]) for (_, cost), j in zip(layers, chosen, strict=True))


def _rank(rank: int, T: int, D: int) -> int | None:
    return None if rank * (T + D) >= T * D else rank
