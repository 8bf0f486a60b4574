"""The optimal brain surgeon: weights leave one at a time, the others make up for each exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import lapack

from edgesolve.host.metric import RANK_FLOOR, Metric
from edgesolve.host.prune import Pattern, PerLayer, refit

SINGULAR_RIDGE = 1e-8
"""Relative ridge toward the least-squares weight where S is rank-deficient, so that H⁻¹ exists."""
BLOCK = 48
"""Removals between two passes over H⁻¹: fewer passes, against longer sums for the columns between them."""


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The order in which weights leave, and what each costs.

    order (T, K) int: the inputs in the order in which they leave each row; loss (T, K) >= 0: by how much the
    distortion rises each time; floor: the distortion of the least-squares weight; D: inputs.

    Laws: the distortion after any numbers k_t of removals is floor + Σ_t Σ_{i<k_t} loss[t, i]: rows don't
    interact. (Where S is rank-deficient, to 1e-8 of it.)
    """

    order: np.ndarray
    loss: np.ndarray
    floor: float
    D: int

    def curve(self) -> np.ndarray:
        """(T K + 1,): the distortion after 0, 1, … removals in the whole layer, rising."""
        return self.floor + np.concatenate([[0.0], np.cumsum(self.loss.flat[self._merged()])])

    def mask(self, removed: int) -> np.ndarray:
        """(T, D) bool: what is left after `removed` removals in the whole layer."""
        T, K = self.order.shape
        if not 0 <= removed <= T * K:
            raise ValueError(f"the trace has 0..{T * K} removals, got {removed}.")
        gone = self._merged()[:removed]
        mask = np.ones((T, self.D), bool)
        mask[gone // K, self.order.flat[gone]] = False
        return mask

    def _merged(self) -> np.ndarray:
        """Flat indices into `order`: always the row whose next removal is the cheapest. As a sort: a removal
        waits for the most expensive one before it in its row, not longer."""
        waits = np.maximum.accumulate(self.loss, axis=1)
        return np.argsort(waits, axis=None, kind="stable")


def obs(metric: Metric, pattern: Pattern) -> np.ndarray:
    """Weight (T, D) within the pattern, by greedy elimination from the least-squares weight, refitted."""
    return refit(metric, eliminate(metric, pattern).mask(pattern.removed(metric.T, metric.D)))


def eliminate(metric: Metric, pattern: Pattern | None = None) -> Trace:
    """The trace of removals, as far as the pattern allows; without one, to the last weight.

    In each row the input p that costs least leaves: loss w_p²/[H⁻¹]_pp, w -= w_p/[H⁻¹]_pp H⁻¹[p],
    H⁻¹ -= H⁻¹[:, p] H⁻¹[p, :]/[H⁻¹]_pp. Hassibi & Stork 1993; Frantar & Alistarh 2022 (OBC), who
    give the same order. Each step is the best single removal; the whole is greedy. Dead inputs leave first.
    T D³/3 multiply-adds, most of them in matrix products; memory 2 D² floats.
    """
    group, quota = (pattern or PerLayer(1.0)).groups(metric.D)
    W = metric.least_squares()
    P = inverse(metric)
    least = _least_diagonal(metric)
    rows = [_eliminate_row(P, least, w, group, quota) for w in W]
    order, loss = (np.array(column) for column in zip(*rows, strict=True))
    return Trace(order, loss, metric.distortion(W), metric.D)


def inverse(metric: Metric) -> np.ndarray:
    """H⁻¹ (D, D), H = S, or a little more where S is rank-deficient. Symmetric to the bit."""
    factor, failed = lapack.dpotrf(metric.S, lower=1)
    if failed or np.diag(factor).min() ** 2 <= RANK_FLOOR * np.diag(metric.S).max():
        factor, _ = lapack.dpotrf(metric.S + _ridge(metric) * np.eye(metric.D), lower=1)
    P, _ = lapack.dpotri(factor, lower=1)
    return np.tril(P) + np.tril(P, -1).T


def _ridge(metric: Metric) -> float:
    return SINGULAR_RIDGE * float(np.trace(metric.S)) / metric.D or 1.0


def _least_diagonal(metric: Metric) -> np.ndarray:
    """1/H_pp (D,): [H⁻¹]_pp never falls below, on any support."""
    return 1.0 / (np.diag(metric.S) + _ridge(metric))


def _eliminate_row(P, least, w, group, quota) -> tuple[np.ndarray, np.ndarray]:
    """(inputs in their order, losses), both (K,). P is copied before it is written."""
    w, quota = w.copy(), quota.copy()
    inputs, total = np.arange(w.size), int(quota.sum())
    order, loss = [], []
    while len(order) < total:
        n_block = min(BLOCK, total - len(order))
        U = np.empty((n_block, w.size))  # the block's updates: H⁻¹ is P - U' U
        diagonal, gone = P.diagonal().copy(), np.zeros(w.size, bool)
        may_leave = quota[group] > 0
        for j in range(n_block):
            p = int(np.argmin(np.where(may_leave, w * w / diagonal, np.inf)))
            u = P[p] - U[:j, p] @ U[:j]
            pivot = max(u[p], least[p])
            order.append(inputs[p])
            loss.append(w[p] * w[p] / pivot)
            w -= (w[p] / pivot) * u
            U[j] = u / np.sqrt(pivot)
            np.maximum(diagonal - U[j] * U[j], least, out=diagonal)
            gone[p], may_leave[p] = True, False
            quota[group[p]] -= 1
            if not quota[group[p]]:
                may_leave &= group != group[p]
        left = np.flatnonzero(~gone)
        P = P[np.ix_(left, left)] - U[:, left].T @ U[:, left]
        w, inputs, group, least = w[left], inputs[left], group[left], least[left]
    return np.array(order, np.intp), np.array(loss)
