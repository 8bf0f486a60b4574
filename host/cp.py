"""Canonical polyadic decomposition in a layer's own metric: 1×1, depthwise, 1×1."""

from __future__ import annotations

from functools import reduce

import numpy as np

from edgesolve.host.chain import Chain, Factor
from edgesolve.host.lowrank import checked, in_range, leading, oriented, reduced_rank
from edgesolve.host.metric import Metric
from edgesolve.host.tucker import descent_step, input_marginal

CANCELLATION = 1e4
"""Most Σ_a ||term_a||² / ||W||²: terms beyond it cancel each other instead of describing the layer."""


def cp(
    metric: Metric,
    shape: tuple[int, ...],
    rank: int,
    *,
    separable: bool = True,
    sweeps: int = 20,
    tol: float = 1e-4,
    seeds: int = 1,
    start: Chain | None = None,
) -> Chain:
    """CP-4: 1×1 (c to rank), kh×1 and 1×kw depthwise, 1×1 (rank to T), for a weight of `shape` (T, c, kh, kw).

    rank : in 1..kh kw min(c, T), where any weight is reached.
    separable : False keeps the kernel whole (CP-3: one depthwise kh×kw); a kernel with one row or column always
        is. A 1×1 layer is `lowrank`: two factors.
    sweeps, tol : at most so many rounds of updates from each start; they end where one lowers the distortion by
        a share < tol. seeds : random starts beside the one of slices; the best answer counts.
    start : a chain of the same shape and rank whose input modes replace all these starts.

    Laws: each update is an exact least-squares solve, so none ascends; the distortion is at most that of the
    slice start, hence zero excess at full rank. Terms grow at most to CANCELLATION: a best CP need not exist.
    (compression.md, section 5; its u_out is Eq. 30 of Kalle et al. 2025.)
    """
    T, c, kh, kw = checked(metric, shape)
    in_range("cp", shape, rank=(rank, kh * kw * min(c, T)))
    separable = separable and min(kh, kw) > 1
    if kh * kw == 1:
        U, B = reduced_rank(metric, rank)
        return _chain(shape, [B.T, np.ones((1, rank))], U)
    dims = (c, kh, kw) if separable else (c, kh * kw)
    weight = metric.least_squares()
    energy = float(np.vdot(weight, weight))
    best, kept = np.inf, None
    if start is None:
        starts = [_slices(metric, weight, dims, rank), *_random(dims, rank, seeds)]
    else:
        starts = [[f.weight.reshape(rank, -1).T for f in start.factors[:-1]]]
    for modes in starts:
        error, *found = _alternate(metric, modes, energy, sweeps, tol)
        bounded = _sizes(*found) <= CANCELLATION * energy
        if kept is None or (bounded and error < best):
            best, kept = error, found
    return _chain(shape, *kept)


def khatri_rao(modes: list[np.ndarray]) -> np.ndarray:
    """Column-wise Kronecker product (m1 m2 ..., r) of matrices (m1, r), (m2, r), ...; the first is slowest."""
    return reduce(lambda a, b: (a[:, None] * b[None]).reshape(-1, a.shape[1]), modes)


def refitted_output(metric: Metric, modes: list[np.ndarray]) -> np.ndarray:
    """The best u_out (T, r) given the input modes: C Z (Z'SZ)⁻¹, Z their Khatri-Rao product."""
    Z = khatri_rao(modes)
    C = metric.C @ Z
    return Metric(
        Z.T @ metric.S @ Z, C, metric.v, np.zeros(C.shape[1]), metric.mu_t
    ).least_squares()


def refitted_mode(
    metric: Metric, modes: list[np.ndarray], u_out: np.ndarray, at: int
) -> np.ndarray:
    """The best modes[at] (m, r) given the other modes and u_out."""
    dims, r = [len(u) for u in modes], u_out.shape[1]
    u, B = modes[at], khatri_rao([u for i, u in enumerate(modes) if i != at])
    m, o, gram = len(u), len(B), u_out.T @ u_out
    S = metric.S.reshape(*dims, *dims)
    S = np.moveaxis(S, (at, len(dims) + at), (0, len(dims))).reshape(m * o, m * o)
    target = np.moveaxis((metric.C.T @ u_out).reshape(*dims, r), at, 0).reshape(m, o, r)

    def contracted(V):
        return np.einsum("moa,oa->ma", V.reshape(m, o, r), B).ravel()

    def normal(x):
        V = (x.reshape(m, 1, r) * B).reshape(m * o, r)
        return contracted((S @ V) @ gram)

    def matrix():
        half = np.einsum("skzl,lb->szbk", S.reshape(m, o, m, o), B, optimize=True)
        return (np.einsum("szbk,ka->sazb", half, B, optimize=True) * gram[:, None, :]).reshape(
            m * r, m * r
        )

    residual = contracted(target) - normal(u.ravel())
    return u + descent_step(normal, matrix, residual, input_marginal(S, m), gram * (B.T @ B))


def _alternate(metric, modes, energy, sweeps, tol):
    """(distortion, modes, u_out) after at most `sweeps` rounds, the last state with bounded terms."""
    u_out = refitted_output(metric, modes)
    error = metric.distortion(u_out @ khatri_rao(modes).T)
    for _ in range(sweeps):
        before, state = error, (modes, u_out)
        for at in range(len(modes)):
            modes = [
                refitted_mode(metric, modes, u_out, at) if i == at else u
                for i, u in enumerate(modes)
            ]
        u_out = refitted_output(metric, modes)
        modes, u_out = balanced(modes, u_out)
        error = metric.distortion(u_out @ khatri_rao(modes).T)
        if not error < before or _sizes(modes, u_out) > CANCELLATION * energy:
            return before, *state
        if error > (1.0 - tol) * before:
            break
    return error, modes, u_out


def balanced(modes, u_out):
    """The same terms with equal column norms in every mode, the signs of the input modes fixed."""
    every = [*modes, u_out]
    norms = np.stack([np.linalg.norm(u, axis=0) for u in every])
    level = np.prod(norms, axis=0) ** (1.0 / len(every))
    every = [
        u * np.where(n > 0, level / np.where(n > 0, n, 1.0), 0.0)
        for u, n in zip(every, norms, strict=True)
    ]
    fixed = [oriented(u) for u in every[:-1]]
    flips = np.prod(
        [np.sign(np.sum(a * b, axis=0)) for a, b in zip(fixed, every, strict=False)], axis=0
    )
    return fixed, every[-1] * flips


def _sizes(modes, u_out):
    return float(np.sum(np.prod([np.sum(u * u, axis=0) for u in [*modes, u_out]], axis=0)))


def _slices(metric, weight, dims, rank):
    """A start that is exact at full rank: the kernel in an orthonormal basis, each of its coefficients, a
    matrix (T, c), by its SVD under the marginal S_in, and the largest terms of all."""
    c, *kernel = dims
    white = weight.reshape(-1, *dims)
    marginal = Metric.symmetric(white.reshape(-1, c), input_marginal(metric.S, c))
    R, P = marginal.root()
    white = np.einsum("tc...,cp->tp...", white, R)
    bases = [leading(np.moveaxis(white, 2 + i, 0).reshape(k, -1), k) for i, k in enumerate(kernel)]
    picture = np.einsum("tpk,kj->jtp", white.reshape(*white.shape[:2], -1), reduce(np.kron, bases))
    _, values, V = np.linalg.svd(picture, full_matrices=False)
    order = np.resize(np.argsort(-values.ravel(), kind="stable"), rank)
    j, i = np.unravel_index(order, values.shape)
    which = np.unravel_index(j, kernel)
    return [P.T @ V[j, i].T, *(basis[:, k] for basis, k in zip(bases, which, strict=True))]


def _random(dims, rank, seeds):
    for seed in range(seeds):
        draw = np.random.default_rng(seed)
        yield [draw.standard_normal((m, rank)) for m in dims]


def _chain(shape, modes, u_out):
    kh, kw = shape[2:]
    first, *kernel = modes
    rank = u_out.shape[1]
    factors = [Factor(first.T[:, :, None, None])]
    if kh * kw == 1:
        factors = [Factor(first.T[:, :, None, None], "hw")]
    elif len(kernel) == 1:
        factors.append(Factor(kernel[0].T.reshape(rank, 1, kh, kw), "hw", rank))
    else:
        factors.append(Factor(kernel[0].T[:, None, :, None], "h", rank))
        factors.append(Factor(kernel[1].T[:, None, None, :], "w", rank))
    factors.append(Factor(u_out[:, :, None, None]))
    return Chain("cp", (rank,), tuple(factors))
