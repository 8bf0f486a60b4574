"""Penalties: each knows its value, its proximal step and the distance to optimality."""

from dataclasses import dataclass

import numpy as np

from edgesolve.kernels.prox import group_norms, prox_group_l2


@dataclass(frozen=True, slots=True, eq=False)
class GroupL2:
    """lam sum_g w_g ||U_g||_F over ragged groups of rows: switches whole gates off.

    lam : >= 0, in the 1/(2n) scaling of `losses.py`. starts (n_groups + 1,) : rising strictly from
    0 to D; group g owns rows starts[g]:starts[g + 1]. weights (n_groups,) : > 0, default ones.
    Yuan and Lin 2006.
    """

    lam: float
    starts: np.ndarray
    weights: np.ndarray | None = None

    def __post_init__(self):
        if not (np.isfinite(self.lam) and self.lam >= 0):
            raise ValueError(f"lam must be finite and not negative, got {self.lam}.")
        starts = np.ascontiguousarray(self.starts, np.int64)
        if starts.ndim != 1 or len(starts) < 2 or starts[0] != 0 or (np.diff(starts) <= 0).any():
            raise ValueError(f"starts must rise strictly from 0, got {self.starts}.")
        object.__setattr__(self, "starts", starts)
        if self.weights is not None:
            weights = np.ascontiguousarray(self.weights, np.float64)
            if weights.shape != (len(starts) - 1,) or not (weights > 0).all():
                raise ValueError(
                    f"weights must be {len(starts) - 1} positive numbers, got {self.weights}."
                )
            object.__setattr__(self, "weights", weights)

    @property
    def group_weights(self) -> np.ndarray:
        """The weights w_g, (n_groups,)."""
        return np.ones(len(self.starts) - 1) if self.weights is None else self.weights

    def value(self, U: np.ndarray) -> float:
        """The penalty at U (D, c)."""
        return float(self.lam * (self.group_weights @ group_norms(U, self.starts)))

    def prox(self, V: np.ndarray, step: float) -> np.ndarray:
        """argmin over U of penalty(U) + ||U - V||^2 / (2 step), a new array."""
        V = np.ascontiguousarray(V)
        out = np.empty_like(V)
        prox_group_l2(V, self.starts, step * self.lam * self.group_weights, out)
        return out

    def kkt(self, U: np.ndarray, grad: np.ndarray) -> float:
        """Frobenius distance of -grad to the subdifferential at U; 0 exactly at an optimum."""
        limit = self.lam * self.group_weights
        norms = group_norms(U, self.starts)
        on = norms > 0
        pull = np.zeros_like(norms)
        pull[on] = limit[on] / norms[on]
        smooth = group_norms(grad + np.repeat(pull, np.diff(self.starts))[:, None] * U, self.starts)
        off = np.maximum(group_norms(grad, self.starts) - limit, 0.0)
        return float(np.linalg.norm(np.where(on, smooth, off)))


def lam_max(loss, starts: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The smallest lam at which U = 0 is optimal: max_g ||grad_g f(0)||_F / w_g."""
    penalty = GroupL2(0.0, starts, weights)
    norms = group_norms(loss.grad(np.zeros(loss.shape)), penalty.starts)
    return float(np.max(norms / penalty.group_weights))
