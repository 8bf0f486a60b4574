"""Tensor train in a layer's own metric: 1×1, kh×1, 1×kw, 1×1, a chain that runs as it is stored."""

from __future__ import annotations

import numpy as np

from edgesolve.host.chain import Chain, Factor
from edgesolve.host.lowrank import checked, in_range, reduced_rank
from edgesolve.host.metric import Metric
from edgesolve.host.tucker import input_basis, narrowed, orthonormal, refitted


def tensor_train(
    metric: Metric,
    shape: tuple[int, ...],
    ranks: tuple[int, int, int],
    *,
    sweeps: int = 10,
    tol: float = 1e-4,
) -> Chain:
    """A train over the modes (c, kh, kw, T) of a weight of `shape` (T, c, kh, kw): 1×1 (c to r1), kh×1 (r1 to
    r2), 1×kw (r2 to r3), 1×1 (r3 to T).

    ranks : (r1, r2, r3), in 1..c, 1..min(r1 kh, kw r3), 1..T. r1 = c and r3 = T drop an outer factor; both give
        the separable pair kh×1 then 1×kw.
    sweeps, tol : as in `tucker2`; 0 with Metric.weight_space is the TT-SVD (Oseledets 2011).

    Laws: given the first two cores the last two are jointly optimal; more sweeps never give a higher
    distortion; a 1×1 layer gets the global optimum. (compression.md, section 6.)
    """
    T, c, kh, kw = checked(metric, shape)
    r1, r2, r3 = ranks
    in_range("tensor_train", shape, r1=(r1, c), r2=(r2, min(r1 * kh, kw * r3)), r3=(r3, T))
    first = input_basis(metric, c)[:, :r1] if r1 < c else np.eye(c)
    inner = narrowed(metric, first) if r1 < c else metric
    second = input_basis(inner, r1 * kh)[:, :r2]
    best = np.inf
    for sweep in range(sweeps + 1):
        small = narrowed(inner, second)
        last, third = reduced_rank(small, r3)
        error = small.distortion(last @ third)
        if error < best:
            kept = first, second, third, last
        if sweep == sweeps or not error < (1.0 - tol) * best:
            break
        best = error
        if r1 < c:
            first, carry = _first(metric, first, second, third, last)
            inner = narrowed(metric, first)
            second = np.einsum("pa,ahq->phq", carry, second.reshape(r1, kh, r2)).reshape(-1, r2)
        cores = third.reshape(r3, r2, kw).transpose(1, 2, 0)
        second = orthonormal(refitted(inner.S, inner.C.T @ last, second, cores))
    return _chain(shape, *kept)


def _first(metric, first, second, third, last):
    """The best first core given the others, as an orthonormal one and what its neighbour takes up."""
    (_, r1), (r3, r2) = first.shape, (len(third), second.shape[1])
    pair = np.einsum("phq,sqw->phws", second.reshape(r1, -1, r2), third.reshape(r3, r2, -1))
    u = refitted(metric.S, metric.C.T @ last, first, pair.reshape(r1, -1, r3))
    basis = orthonormal(u)
    return basis, basis.T @ u


def _chain(shape, first, second, third, last):
    T, c, kh, kw = shape
    (_, r1), r2, r3 = first.shape, second.shape[1], len(third)
    vertical = second.reshape(r1, kh, r2).transpose(2, 0, 1)
    factors = [
        Factor(vertical[:, :, :, None], "h"),
        Factor(third.reshape(r3, r2, 1, kw), "w"),
    ]
    if r1 < c:
        factors.insert(0, Factor(first.T[:, :, None, None]))
    if r3 < T:
        factors.append(Factor(last[:, :, None, None]))
    return Chain("tensor_train", (r1, r2, r3), tuple(factors))
