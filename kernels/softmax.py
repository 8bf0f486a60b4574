"""Cross-entropy for labels or a teacher's probabilities: softmax, and logistic with one logit.

f(U) = min_b sum_r omega_r [lse(z_r) - <t_r, z_r>] + (MU_B/2) ||b||^2,   z = A(U) + 1b'
P(U) = f(U) + lam sum_g w_g N(U_g) + (ridge/2) ||U||_F^2,   omega_r = 1/n unless rows have weights

The intercept has no closed form: Newton's method finds it at every U, c x c. Its token ridge makes
any error of that harmless to the certificate, which stays a bound (docs: convex.md, section 4).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from edgesolve.kernels.designs import Design
from edgesolve.kernels.gap import group_gap, largest_scale
from edgesolve.kernels.losses import checked_ridge, top_eigenvalue
from edgesolve.kernels.penalties import GroupL2

MU_B = 1e-6
"""Ridge of the intercept, a part of the problem: it keeps classes without a row from -infinity."""

INTERCEPT_TOL = 1e-13
"""Newton's method for the intercept ends at this gradient: a few roundings of a mean over rows."""

MAX_NEWTON = 50
"""Four steps are usual. Logits in the hundreds may want more; the gap holds for what is reached."""

SUM_SLACK = 1e-3
"""Rows of targets may miss the sum of one by this much, as float16 does; they are then scaled."""


def one_hot(labels, n_classes: int) -> np.ndarray:
    """Targets (n, n_classes) float64 of labels (n,) int in 0..n_classes - 1; two classes at least.

    Column 1 of two, as (n, 1), gives the logistic loss with one logit. Classes may lack rows.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise ValueError(f"labels must be (n,) integers, got {labels.shape} {labels.dtype}.")
    if n_classes < 2 or labels.min() < 0 or labels.max() >= n_classes:
        raise ValueError(
            f"labels must lie in 0..{n_classes - 1} of at least two classes, "
            f"got {labels.min()}..{labels.max()}."
        )
    return np.eye(n_classes)[labels]


@dataclass(frozen=True, slots=True, eq=False)
class Softmax:
    """The loss of a design's rows. Like `SquaredRows`: `value` and `grad` include the ridge.

    design : `Masked`, `Pooled` or `Explicit` of `designs.py`. T (n, c) float64, rows in the simplex;
    with c = 1 in [0, 1], the probability of "yes" under one logit. omega (n,) float64, sum one.
    Weights are (D, c). Memory: about eight arrays (n, c) beside the rows.

    One class only is fine: weights zero out and the intercept settles near log(MU_B).
    """

    design: Design
    T: np.ndarray
    omega: np.ndarray
    ridge: float
    centre: bool = True

    @classmethod
    def of(
        cls, design: Design, t: np.ndarray, ridge: float, *, intercept: bool = True, weights=None
    ) -> "Softmax":
        """The loss with targets t (n, c) and an absolute `ridge` >= 0.

        t : labels as `one_hot` makes them, a teacher's or smoothed probabilities. weights (n,) : of
        the rows, >= 0, on any scale.
        """
        T = _checked_targets(t, design.n)
        omega = _checked_weights(weights, design.n)
        return cls(design, T, omega, checked_ridge(ridge), intercept)

    @property
    def n(self) -> int:
        return self.design.n

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (D, c) of the weights."""
        return int(self.design.starts[-1]), self.T.shape[1]

    @property
    def mean_t(self) -> np.ndarray:
        """The mean target (c,)."""
        return self.omega @ self.T

    def value(self, U: np.ndarray) -> float:
        """f(U) + (ridge/2)||U||^2, U (D, c)."""
        return self._objective(self.fit(U))

    def grad(self, U: np.ndarray) -> np.ndarray:
        """Gradient (D, c) of `value`: that of the intercept is zero at its optimum."""
        return self.ridge * U - self._adjoint(self.fit(U).R)

    def intercept(self, U: np.ndarray) -> np.ndarray:
        """The optimal intercept (c,) for weights U."""
        return self.fit(U).b

    def lipschitz(self) -> float:
        """2% above the power iteration's estimate of a bound on the Hessian.

        diag(p) - pp' <= 1/2, or p(1 - p) <= 1/4 with one logit; the intercept takes the mean away.
        """
        bound = 0.25 if self.shape[1] == 1 else 0.5

        def product(U):
            Z = self.design.forward(U)
            mean = self.omega @ Z if self.centre else 0.0
            return self._adjoint(bound * (Z - mean) + MU_B * mean)

        return 1.02 * top_eigenvalue(product, self.shape[0]) + self.ridge

    def duality_gap(self, penalty, U: np.ndarray, dual: np.ndarray | None = None):
        """(gap, P(U)) as `gap.duality_gap` promises, which asks here: one product with A and one A'.

        The dual point is Theta = s omega (T - Pi_W), W = U or `dual`, Pi the probabilities. With
        q_s = (1 - s) t + s p_W, in the simplex for s in [0, 1], P(U) less the dual value is

            sum_r omega_r KL(q_s || p_U) + ||MU_B b_U - s v_W||^2/(2 MU_B) + the groups' brackets,

        v_W = omega'(T - Pi_W): every term is >= 0. The first two vanish at W = U and s = 1.
        """
        penalty = GroupL2(0.0, [0, self.shape[0]]) if penalty is None else penalty
        here = self.fit(np.asarray(U, np.float64))
        gap = self._ray_gap(penalty, here, here)
        if dual is not None:
            other = self._ray_gap(penalty, here, self.fit(np.asarray(dual, np.float64)))
            gap = other if other < gap else gap
        return gap, self._objective(here) + penalty.value(here.U)

    def _ray_gap(self, penalty, here, ray):
        V = self._adjoint(ray.R)
        drift = self.omega @ ray.R if self.centre else 0.0 * ray.b
        T = _complete(self.T)

        def at(s):
            fit = _divergence((1.0 - s) * T + s * ray.p, here.p, here.logp) @ self.omega
            left = MU_B * here.b - s * drift
            fit += np.vdot(left, left) / (2.0 * MU_B)
            return float(fit) + group_gap(penalty, self.ridge, here.U, s * V)

        s = min(1.0, largest_scale(penalty, V - self.ridge * ray.U))
        return min(at(s), at(1.0)) if self.ridge > 0 else at(s)

    def _objective(self, fit):
        cross = -np.vdot(np.sum(_complete(self.T) * fit.logp, axis=0), self.omega)
        squares = MU_B * np.vdot(fit.b, fit.b) + self.ridge * np.vdot(fit.U, fit.U)
        return float(cross + 0.5 * squares)

    def _adjoint(self, R):
        return self.design.adjoint(self.omega[:, None] * R)

    def fit(self, U):
        """What is known at the weights U: one product with A, and Newton's method for b."""
        U = np.asarray(U, np.float64)
        Z, c, mean_t = _logits(self.design.forward(U)), self.shape[1], self.mean_t
        b = self._first_intercept(Z) if self.centre else np.zeros(c)
        for left in reversed(range(MAX_NEWTON)):
            p, logp = _softmax(Z, b)
            grad = MU_B * b - mean_t + p[-c:] @ self.omega
            if left == 0 or not (self.centre and np.linalg.norm(grad) > INTERCEPT_TOL):
                break
            b = b - _damped(np.linalg.solve(self.curvature(p), grad))
        return _Fit(U, b, p, logp, np.subtract(self.T, p[-c:].T, order="C"))

    def _first_intercept(self, Z):
        """Right but for the token ridge where rows of Z are equal, so at U = 0."""
        b = np.log(np.maximum(_complete(self.T) @ self.omega, MU_B)) - Z @ self.omega
        return b[1:] - b[0] if self.shape[1] == 1 else b - b.mean()

    def curvature(self, p):
        """Hessian (c, c) in the intercept."""
        weighted = p * self.omega
        H = np.diag(weighted.sum(axis=1) + MU_B) - weighted @ p.T
        return H[-self.shape[1] :, -self.shape[1] :]


class _Fit(NamedTuple):
    """What is known at weights U. Classes come first, k = max(c, 2) of them: sums over 2 are slow."""

    U: np.ndarray
    b: np.ndarray  # (c,) the intercept
    p: np.ndarray  # (k, n) probabilities
    logp: np.ndarray  # (k, n)
    R: np.ndarray  # (n, c) T - p


def _damped(step):
    """The part of a Newton step that surely descends, all of it in the limit.

    The third derivative along `step` is at most its spread times the second (they are moments of
    `step` under p): this minimises the bound that follows. Bach 2010, self-concordance.
    """
    spread = float(np.ptp(_logits(step[None])))
    return step * (np.log1p(spread) / spread if spread > 0 else 1.0)


def _logits(Z):
    """(n, c) -> (k, n): with one logit, "no" has the logit 0."""
    return np.ascontiguousarray(Z.T) if Z.shape[1] > 1 else np.vstack([0.0 * Z.T, Z.T])


def _complete(T):
    """(n, c) -> (k, n): with one column, "no" has the rest of the probability."""
    return np.ascontiguousarray(T.T) if T.shape[1] > 1 else np.vstack([1.0 - T.T, T.T])


def _softmax(Z, b):
    """Probabilities and their logarithms, both (k, n)."""
    Z = Z + _logits(b[None])
    Z -= Z.max(axis=0)
    p = np.exp(Z)
    total = p.sum(axis=0)
    p /= total
    Z -= np.log(total)
    return p, Z


def _divergence(q, p, logp):
    """KL(q || p) (n,) per column, as a sum of terms q log(q/p) - q + p that are each >= 0.

    By log1p, which keeps the square of a small q - p; by log p where p underflows.
    """
    more, seen = q - p, logp > -600.0
    share = np.maximum(more / np.where(seen, p, 1.0), np.finfo(np.float64).eps - 1.0)
    far = np.log(np.maximum(q, np.finfo(np.float64).tiny)) - logp
    return np.sum(q * np.where(seen, np.log1p(share), far) - more, axis=0)


def _checked_targets(t, n):
    t = np.asarray(t, np.float64)
    if t.ndim != 2 or len(t) != n or t.size == 0:
        raise ValueError(f"t must be ({n}, c) probabilities, got {t.shape}; labels: `one_hot`.")
    if not ((t >= 0) & (t <= 1 + SUM_SLACK)).all():  # NaN too
        raise ValueError(
            f"t must hold probabilities, got {t.min()}..{t.max()}: apply softmax to logits first."
        )
    if t.shape[1] == 1:
        return np.minimum(t, 1.0)
    total = t.sum(axis=1, keepdims=True)
    worst = int(np.argmax(np.abs(total - 1.0)))
    if abs(total[worst, 0] - 1.0) > SUM_SLACK:
        raise ValueError(f"Every row of t must sum to one, row {worst} has {total[worst, 0]:.6g}.")
    return t / total


def _checked_weights(weights, n):
    if weights is None:
        return np.full(n, 1.0 / n)
    weights = np.asarray(weights, np.float64)
    total = weights.sum()
    if weights.shape != (n,) or not (np.isfinite(total) and total > 0 and (weights >= 0).all()):
        raise ValueError(f"weights must be ({n},), finite, >= 0 and not all zero.")
    return weights / total
