"""Is it a descent? Each block's guaranteed decrease, and a gradient, measured by themselves.

Nothing here trusts an update: every figure is taken from the arrays before and after it, in float64 sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgesolve.host.bcd_objective import ROUNDING, gap, relu_gap
from edgesolve.host.bcd_problem import Problem, Settings, State, full, square
from edgesolve.host.tensor_train_cores import TTCores, core_gradients


@dataclass(frozen=True, slots=True)
class Check:
    """One block of one sweep: L fell by `drop`, and had to by `constant` · `moved` (squared change)."""

    block: str
    drop: float
    constant: float
    moved: float
    slack: float

    @property
    def holds(self) -> bool:
        """drop >= constant · moved, up to the rounding of L itself."""
        return self.drop >= self.constant * self.moved - self.slack

    @property
    def fell(self) -> bool:
        return self.drop >= -self.slack


class Recorder:
    """`watch` of host/bcd.sweep: a Check of every block, in `checks`.

    spectra : with the smallest eigenvalues in the constants (an eigendecomposition per block: small
        networks); without them the constants are smaller, and still guaranteed.
    """

    def __init__(self, problem: Problem, settings: Settings, *, spectra: bool = False):
        self.problem, self.settings, self.spectra = problem, settings, spectra
        self.checks: list[Check] = []

    def __call__(self, block: str, before: State, after: State, moved: float) -> None:
        old = _local(self.problem, self.settings, before, block)
        new = _local(self.problem, self.settings, after, block)
        c = constant(self.problem, self.settings, before, block, spectra=self.spectra)
        # An update works on terms far larger than their difference: their rounding is the yardstick.
        size = c * square(full(getattr(before, block[0])[int(block[1:]) - 1]))
        slack = ROUNDING[self.settings.dtype] * max(old, new, size)
        self.checks.append(Check(block, old - new, c, moved, slack))


def constant(
    problem: Problem, settings: Settings, state: State, block: str, *, spectra: bool = False
) -> float:
    """c with L_old - L_new >= c ||change||² for a block, from the strong convexity of its subproblem.

    V_N (1+γ)/2 + α; U_N (γ+ρ)/2; hidden U_i α/2; V_i (γ + ρ λ(W_{i+1}'W_{i+1}))/2; W_i with b_i: half the
    smallest eigenvalue of their system + α/2, at least α, and α + τ/2 where b didn't move. C_i: a train
    τ/2 (moves summed over the cores), a pruned matrix α/2. λ: the smallest eigenvalue, 0 without `spectra`.
    """
    g, r, t, a = settings.gamma, settings.rho, settings.tau, settings.alpha
    name, i = block[0], int(block[1:])
    last = i == problem.n_layers
    if name == "V":
        if last:
            return 0.5 * (1.0 + g) + a
        W = np.asarray(state.W[i], np.float64)
        return 0.5 * (g + r * _least(W.T @ W)) if spectra else 0.5 * g
    if name == "U":
        return 0.5 * (g + r) if last else 0.5 * a
    if name == "C":
        return 0.5 * (t if isinstance(state.C[i - 1], TTCores) else a)
    a = settings.ridge
    if not spectra:
        return a
    X = np.asarray(problem.x if i == 1 else state.V[i - 2], np.float64)
    X = np.column_stack([X, np.ones(len(X))])
    held = 0.0 if state.C[i - 1] is None else t
    ridge = np.append(np.full(X.shape[1] - 1, a + held), a)
    return 0.5 * (_least(r * X.T @ X + np.diag(ridge)) + a)


def gradient_norm(problem: Problem, settings: Settings, state: State) -> float:
    """||g|| of one g in the limiting subdifferential of L at `state`, over all blocks.

    Where ReLU has its kink, the shortest of the values there. A pruned matrix: its support only, the
    entries held at 0 have any subgradient. A train: the gradient by each core.
    """
    g, r, t, N = settings.gamma, settings.rho, settings.tau, problem.n_layers
    last = N - 1
    lack = [r * (u - a) for u, a in zip(state.U, state.A, strict=True)]
    far = g * (state.V[last] - state.U[last])
    total = square(state.V[last] - problem.y + far) + square(lack[last] - far)
    for i in range(last):
        V, U = state.V[i], state.U[i]
        total += square(g * (V - np.maximum(U, 0.0)) - lack[i + 1] @ state.W[i + 1])
        total += square(_shortest(g, V, U, lack[i]))
    for i, (W, C) in enumerate(zip(state.W, state.C, strict=True)):
        rows = lack[i].reshape(-1, len(W))
        grad = -rows.T @ (problem.x if i == 0 else state.V[i - 1])
        total += square(rows.sum(axis=0))
        if C is not None:
            pull = t * (W - full(C))
            grad = grad + pull
            if isinstance(C, TTCores):
                total += sum(square(v) for v in core_gradients(C, -pull))
            else:
                total += square(pull[C != 0.0])
        total += square(grad)
    return math.sqrt(total)


def _local(problem, settings, state, block):
    """The terms of L that `block` is in."""
    g, r, t = settings.gamma, settings.rho, settings.tau
    name, i = block[0], int(block[1:])
    V, U, A = state.V[i - 1], state.U[i - 1], state.A
    last = i == problem.n_layers
    link = 0.0
    if name in "VU":
        link = 0.5 * g * (gap(V, U) if last else relu_gap(V, U))
    if name == "V":
        return link + 0.5 * (gap(V, problem.y) if last else r * gap(state.U[i], A[i]))
    if name == "U":
        return link + 0.5 * r * gap(U, A[i - 1])
    held = full(state.C[i - 1])
    pull = 0.0 if held is None else 0.5 * t * square(state.W[i - 1] - held)
    # C_i too: a step that changes W on the side (the alias of the published code) must be seen.
    return pull + 0.5 * r * gap(U, A[i - 1])


def _shortest(g, V, U, lack):
    """Of g (relu(u) - v) relu'(u) + lack, entry by entry, the shortest at the kink."""
    slope = np.where(U > 0.0, g * (U - V), 0.0) + lack
    kink = U == 0.0
    if kink.any():
        v, low = V[kink], lack[kink]
        # Left slope 0, right slope -gv. Convex (v <= 0): all between; concave: the two ends.
        right = low - g * v
        between = np.where((low < 0.0) & (right > 0.0), 0.0, np.minimum(abs(low), abs(right)))
        slope[kink] = np.where(v <= 0.0, between, np.minimum(abs(low), abs(right)))
    return slope


def _least(gram):
    return max(float(np.linalg.eigvalsh(gram)[0]), 0.0)
