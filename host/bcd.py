"""Training without gradients: block coordinate descent over a layered network (NN-BCD).

Samples are rows. V_0 = X, U_i = before and V_i = after the ReLU of layer i, identity output, one-hot Y:

    L = ½||V_N - Y||² + γ/2 Σ_{i<N} ||V_i - relu(U_i)||² + γ/2 ||V_N - U_N||²
        + ρ/2 Σ_i ||U_i - V_{i-1} W_i' - b_i||² + τ/2 Σ_{i in T} ||W_i - C_i||²

C_i is a tensor train of given modes and ranks, or a matrix of at most k_i entries. Every update is an exact
minimiser of its block (host/bcd_blocks.py; of W_i and b_i together), the tensor train's one pass of
least squares over its cores, so that L never rises. Zeng et al. 2019; compression.md, section 6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from edgesolve.host import bcd_blocks as blocks
from edgesolve.host.bcd_problem import Problem, Settings, Sparse, State, affine, full, square
from edgesolve.host.tensor_train_cores import tt_als, tt_svd

Watch = Callable[[str, State, State, float], None]


def sweep(
    problem: Problem, settings: Settings, state: State, cache: dict, watch: Watch | None = None
) -> State:
    """Every block once: V_N, U_N, W_N; then V_i, U_i, W_i (with b_i) and C_i down to the first layer.

    cache : a dict kept between sweeps of one problem and settings, for what they share (the factor of the
        first layer's normal equations, whose input never changes).
    watch : called as watch(block, before, after, moved) after each; `moved` is the squared change. A of
        both states is then up to date for every block, at the price of a product per layer.
    """
    g, r, a = settings.gamma, settings.rho, settings.alpha
    y, N = np.asarray(problem.y, state.V[-1].dtype), problem.n_layers
    tell = _teller(watch)
    V = blocks.output(y, state.U[-1], state.V[-1], gamma=g, alpha=a)
    state = tell(f"V{N}", state, _put(state, "V", N, V))
    U = blocks.output_pre(state.V[-1], state.A[-1], gamma=g, rho=r)
    state = tell(f"U{N}", state, _put(state, "U", N, U))
    state = _weights(problem, settings, state, N, cache, tell)
    for i in range(N - 1, 0, -1):
        V, A = blocks.hidden_post(
            state.W[i], state.b[i], state.U[i], state.U[i - 1], gamma=g, rho=r
        )
        state = tell(f"V{i}", state, _put(_put(state, "V", i, V), "A", i + 1, A))
        U = blocks.hidden_pre(
            state.V[i - 1], state.A[i - 1], state.U[i - 1], gamma=g, rho=r, alpha=a
        )
        state = tell(f"U{i}", state, _put(state, "U", i, U))
        state = _weights(problem, settings, state, i, cache, tell)
    if watch is None:
        state = _put(state, "A", 1, affine(problem, 0, state.V, state.W[0], state.b[0]))
    return replace(state, sweeps=state.sweeps + 1)


def _weights(problem, settings, state, i, cache, tell):
    """W_i and b_i, then C_i."""
    W, b, C = state.W[i - 1], state.b[i - 1], state.C[i - 1]
    tau = 0.0 if C is None else settings.tau
    before = problem.x if i == 1 else state.V[i - 2]
    width = W.shape[0]
    U, A = (v.reshape(-1, width) for v in (state.U[i - 1], state.A[i - 1]))
    factor = cache.get("first") if i == 1 else None
    if factor is None:
        gram = blocks.gram(np.asarray(before, W.dtype))
        factor = blocks.affine_factor(gram, rho=settings.rho, alpha=settings.ridge, tau=tau)
        if i == 1:
            cache["first"] = factor
    W, b = blocks.affine(factor, before, U, A, W, b, full(C), rho=settings.rho, tau=tau)
    if settings.published:
        b = np.zeros_like(b)
    after = _put(_put(state, "W", i, W), "b", i, b)
    if tell.watched:
        after = _put(after, "A", i, affine(problem, i - 1, state.V, W, b))
    state = tell(f"W{i}", state, after)
    return state if C is None else _compressed(problem, settings, state, i, tell)


def _compressed(problem, settings, state, i, tell):
    spec = problem.formats[i]
    W, C = state.W[i - 1], state.C[i - 1]
    if isinstance(spec, Sparse):
        if settings.published:
            new = blocks.keep_largest(W, W, spec.keep, tau=1.0, alpha=1.0)
            # The authors' mask is written into the weight itself.
            after = _put(_put(state, "W", i, new), "C", i, new)
            A = affine(problem, i - 1, state.V, new, state.b[i - 1])
            return tell(f"C{i}", state, _put(after, "A", i, A))
        new = blocks.keep_largest(W, C, spec.keep, tau=settings.tau, alpha=settings.alpha)
        return tell(f"C{i}", state, _put(state, "C", i, new))
    if settings.published:
        new, moved = tt_svd(W, spec.modes, spec.rank), 0.0
    else:
        new, moved = tt_als(W, C)
    return tell(f"C{i}", state, _put(state, "C", i, new), moved)


def _put(state, name, i, value):
    values = getattr(state, name)
    return replace(state, **{name: (*values[: i - 1], value, *values[i:])})


class _teller:
    def __init__(self, watch):
        self.watch, self.watched = watch, watch is not None

    def __call__(self, block, before, after, moved=None):
        if self.watched:
            if moved is None:
                moved = distance(before, after, block)
            self.watch(block, before, after, moved)
        return after


def distance(before: State, after: State, block: str) -> float:
    """Squared change of a block, V2 or W1 (with its bias), in float64."""
    name, i = block[0], int(block[1:]) - 1
    pairs = [(getattr(before, name)[i], getattr(after, name)[i])]
    if name == "W":
        pairs.append((before.b[i], after.b[i]))
    return sum(square(full(q) - full(p)) for p, q in pairs)
