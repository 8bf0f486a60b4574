"""Rows and classes come and go; the optimum follows, and equals that of a fresh start."""

import math
from dataclasses import dataclass, replace

import numpy as np

from edgesolve.kernels.losses import SquaredMoments
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.solution import Solution, Status
from edgesolve.kernels.solve import solve


@dataclass(frozen=True, slots=True, eq=False)
class Online:
    """Moments of the rows of a fixed design, and the weights that were optimal for them last.

    Every method returns a new record; nothing is written to. A batch of k rows costs k D^2/2, a
    solve from warm weights one or two rounds of `newton`, whatever the number of rows seen.
    Law: after any sequence of calls `solve` equals that of the moments of the rows that remain.
    """

    moments: Moments
    weights: np.ndarray | None = None

    def add(self, x: np.ndarray, t: np.ndarray) -> "Online":
        """With rows x (k, D) and targets t (k, c) as well."""
        return replace(self, moments=self.moments + Moments.of(x, t))

    def remove(self, x: np.ndarray, t: np.ndarray) -> "Online":
        """Without rows that were added before. ValueError: they can't have been."""
        return replace(self, moments=self.moments - Moments.of(x, t))

    def decay(self, factor: float) -> "Online":
        """Old rows count `factor` times as much, 0 < factor <= 1."""
        if not 0 < factor <= 1:
            raise ValueError(f"the factor must lie in (0, 1], got {factor}.")
        return replace(self, moments=self.moments.scaled(factor))

    def add_class(self, target: float = 0.0) -> "Online":
        """One more target column, which is the finite `target` in every row so far."""
        if not np.isfinite(target):
            raise ValueError(f"the target must be finite, got {target}.")
        m = self.moments
        grown = Moments(
            n=m.n,
            sx=m.sx,
            sxx=m.sxx,
            stx=np.vstack([m.stx, target * m.sx]),
            st=np.append(m.st, target * m.n),
            stt=m.stt + target * target * m.n,
        )
        weights = self.weights
        if weights is not None:
            weights = np.hstack([weights, np.zeros((len(weights), 1))])
        return Online(grown, weights)

    def remove_class(self, k: int, squares: float) -> "Online":
        """Without target column k; squares : the sum of its squared targets, which moments hold
        for all columns together only. For one-hot targets it is the class's number of rows."""
        m = self.moments
        if not (0 <= k < m.c and m.c > 1):
            raise ValueError(f"there are {m.c} classes and one must stay, got k = {k}.")
        if not (np.isfinite(squares) and 0 <= squares <= m.stt * (1 + 1e-9)):
            raise ValueError(f"squares must lie in 0..{m.stt:g}, got {squares}.")
        keep = np.arange(m.c) != k
        left = replace(m, stx=m.stx[keep], st=m.st[keep], stt=max(m.stt - squares, 0.0))
        return Online(left, None if self.weights is None else self.weights[:, keep])

    def solve(
        self, penalty, ridge: float = 0.0, *, tol=1e-6, seconds=math.inf
    ) -> tuple["Online", Solution]:
        """(the record with the new weights, the solution), started from the weights before."""
        loss = SquaredMoments.of(self.moments, ridge)
        found = solve(loss, penalty, self.weights, tol=tol, seconds=seconds)
        keep = self.weights if found.status is Status.NOT_FINITE else found.weights
        return replace(self, weights=keep), found
