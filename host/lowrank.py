"""Low rank in a layer's own metric: the closed form that every other format leans on."""

from __future__ import annotations

import numpy as np

from edgesolve.host.chain import Chain, Factor
from edgesolve.host.metric import Metric


def lowrank_curve(metric: Metric) -> np.ndarray:
    """Distortion (min(T, D) + 1,) of the best weight of every rank 0, 1, ..., from one eigenproblem.

    Law: curve[r] = metric.distortion(lowrank(metric, shape, r).full()), and no weight of rank r has less.
    It never rises. (Reduced-rank regression; compression.md, section 3.)
    """
    _, _, M = metric.whitened()
    wide = M.shape[0] <= M.shape[1]
    energy = np.linalg.eigvalsh(M @ M.T if wide else M.T @ M)[::-1]
    curve = np.empty(min(metric.C.shape) + 1)
    curve[:] = floor = max(metric.v - float(np.vdot(M, M)), 0.0)
    n = min(energy.size, curve.size)
    curve[:n] = floor + np.maximum(energy, 0.0)[::-1].cumsum()[::-1][:n]
    return curve


def lowrank(metric: Metric, shape: tuple[int, ...], rank: int) -> Chain:
    """A kh×kw convolution to `rank` channels, then a 1×1: the global optimum for a weight of `shape`.

    shape : (T, c, kh, kw) of the layer; kh = kw = 1 is a 1×1 convolution or Linear.
    Law: no weight of rank at most `rank` has less `metric.distortion`. The last factor is orthonormal.
    ValueError: `shape` isn't the metric's, or `rank` is out of 1..min(T, D).
    """
    T, c, kh, kw = checked(metric, shape)
    in_range("lowrank", shape, rank=(rank, min(T, metric.D)))
    U, B = reduced_rank(metric, rank)
    narrow = Factor(B.reshape(rank, c, kh, kw), "hw")
    return Chain("lowrank", (rank,), (narrow, Factor(U[:, :, None, None])))


def reduced_rank(metric: Metric, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(U (T, rank) orthonormal, B (rank, D)): W = U B has the least distortion of its rank.

    B = U' C S⁺, so at rank = T (U is then the identity) B is the least-squares weight.
    """
    if rank == metric.T:
        return np.eye(rank), metric.least_squares()
    _, P, M = metric.whitened()
    U = leading(M, rank)
    return U, (U.T @ M) @ P


def leading(M: np.ndarray, rank: int) -> np.ndarray:
    """The `rank` first left singular vectors (m, rank) of M (m, n), signs fixed; any orthonormal ones past
    its own rank."""
    m, n = M.shape
    if m <= n:
        U = np.linalg.eigh(M @ M.T)[1][:, ::-1]
    else:
        U = np.linalg.svd(M, full_matrices=n < rank)[0]
    return oriented(U[:, :rank])


def oriented(U: np.ndarray) -> np.ndarray:
    """U (m, r) with every column's largest entry positive, so that equal input gives equal bytes."""
    peaks = np.argmax(np.abs(U), axis=0)
    return U * np.where(U[peaks, np.arange(U.shape[1])] < 0, -1.0, 1.0)


def checked(metric: Metric, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """shape as (T, c, kh, kw). ValueError: it isn't that of a weight of the metric's layer."""
    if len(shape) != 4 or (shape[0], int(np.prod(shape[1:]))) != (metric.T, metric.D):
        raise ValueError(
            f"shape must be (T, c, kh, kw) with T = {metric.T} and c kh kw = {metric.D}, got "
            f"{tuple(shape)}."
        )
    T, c, kh, kw = (int(n) for n in shape)
    return T, c, kh, kw


def in_range(name: str, shape: tuple[int, ...], **ranks: tuple[int, int]) -> None:
    """ValueError unless every (rank, most) has 1 <= rank <= most, in one sentence."""
    if all(1 <= rank <= most for rank, most in ranks.values()):
        return
    allowed = ", ".join(f"{key} in 1..{most}" for key, (_, most) in ranks.items())
    found = ", ".join(f"{key}={rank}" for key, (rank, _) in ranks.items())
    raise ValueError(f"{name} of a {tuple(shape)} weight takes {allowed}, got {found}.")
