"""The closed-form updates of block coordinate descent: each the exact minimiser of its block.

Samples are rows: V, U, A (n, d), A = V_before W' + b. W (d_out, d_in), b (d_out,). All of one float dtype.
The objective is stated in host/bcd.py. `alpha` weighs the squared distance to the value before, which
is written with a ring in the papers (V°). Zeng et al. 2019; compression.md, section 6.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.linalg import cho_factor, cho_solve

BLOCK_BYTES = 1 << 24
"""Temporaries of a streamed update are held below a few of this."""


def row_blocks(n: int, row_bytes: int, bound: int = BLOCK_BYTES) -> Iterator[slice]:
    """Slices that cover n rows, each of at most `bound` bytes."""
    step = max(1, bound // max(row_bytes, 1))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def relu_prox(a: np.ndarray, b: np.ndarray, g: float) -> np.ndarray:
    """argmin over u of (relu(u) - a)²/2 + g/2 (u - b)², entry by entry; g > 0.

    The better of u = max(0, (a + gb)/(1 + g)) and u = min(0, b). NaN stays NaN.
    """
    up = g * b
    up += a
    up *= 1.0 / (1.0 + g)
    np.maximum(up, 0.0, out=up)
    down = np.minimum(b, 0.0)
    # cost(up) - cost(down) = up (up/2 - a) + g (up - down) ((up + down)/2 - b), since relu(down) = 0.
    gain = 0.5 * up
    gain -= a
    gain *= up
    far = 0.5 * (up + down)
    far -= b
    far *= up - down
    far *= g
    gain += far
    return np.where(gain > 0.0, down, up)


def output(Y, U, V, *, gamma: float, alpha: float) -> np.ndarray:
    """V_N: argmin ½||v - Y||² + γ/2 ||v - U||² + α/2 ||v - V||²."""
    return (Y + gamma * U + alpha * V) / (1.0 + gamma + alpha)


def output_pre(V, A, *, gamma: float, rho: float) -> np.ndarray:
    """U_N: argmin γ/2 ||V - u||² + ρ/2 ||u - A||²."""
    return (gamma * V + rho * A) / (gamma + rho)


def hidden_pre(V, A, U, *, gamma: float, rho: float, alpha: float) -> np.ndarray:
    """Hidden U_i: argmin γ/2 ||V - relu(u)||² + ρ/2 ||u - A||² + α/2 ||u - U||²."""
    out = np.empty_like(U)
    weight = rho + alpha
    for rows in row_blocks(*_rows(U), BLOCK_BYTES // 32):
        b = (rho / weight) * A[rows]
        b += (alpha / weight) * U[rows]
        out[rows] = relu_prox(V[rows], b, weight / gamma)
    return out


def hidden_post(W, b, U_next, U, *, gamma: float, rho: float) -> tuple[np.ndarray, np.ndarray]:
    """V_i: argmin γ/2 ||v - relu(U)||² + ρ/2 ||U_next - v W' - b||²; and A_next = V_i W' + b.

    v = z + ρ (U_next - z W' - b) K W with z = relu(U), K = (γI + ρWW')⁻¹ or, where that system is the
    smaller one, W (γI + ρW'W)⁻¹. One Cholesky factor serves all rows.
    """
    d_out, d_in = W.shape
    wide = d_out <= d_in
    gram = W @ W.T if wide else W.T @ W
    factor = spd_factor(rho * gram, gamma)
    V, A = np.empty_like(U), np.empty_like(U_next)
    for rows in row_blocks(*_rows(U)):
        z = np.maximum(U[rows], 0.0)
        now = z @ W.T + b
        lack = rho * (U_next[rows] - now)
        if wide:
            lack = spd_solve(factor, lack.T).T
            V[rows] = z + lack @ W
            A[rows] = now + lack @ gram
        else:
            V[rows] = z + spd_solve(factor, (lack @ W).T).T
            A[rows] = V[rows] @ W.T + b
    return V, A


def gram(V: np.ndarray) -> np.ndarray:
    """[V 1]'[V 1] (d + 1, d + 1), streamed over rows."""
    d = V.shape[1]
    out = np.zeros((d + 1, d + 1), V.dtype)
    for rows in row_blocks(*_rows(V), 8 * BLOCK_BYTES):
        out[:d, :d] += V[rows].T @ V[rows]
        out[d, :d] += V[rows].sum(axis=0)
    out[:d, d] = out[d, :d]
    out[d, d] = len(V)
    return out


def affine_factor(gram_, *, rho: float, alpha: float, tau: float):
    """The Cholesky factor of ρ[V 1]'[V 1] + diag(α + τ, ..., α + τ, α), for `affine`."""
    system = rho * gram_
    system.flat[:: len(system) + 1] += alpha
    system.flat[: -1 : len(system) + 1] += tau
    return spd_factor(system, 0.0)


def affine(factor, V, U, A, W, b, target, *, rho: float, tau: float):
    """W, b together: argmin ρ/2 ||U - V w' - b||² + τ/2 ||w - target||² + α/2 (||w - W||² + ||b - b°||²).

    A = V W' + b with the old W, b. `target`: the layer's compressed weight, or None (τ is then 0).
    Solved for the change, which is what single precision can afford.
    """
    d = V.shape[1]
    pull = np.zeros((len(W), d + 1), W.dtype)
    for rows in row_blocks(*_rows(V), 8 * BLOCK_BYTES):
        lack = rho * (U[rows] - A[rows])
        pull[:, :d] += lack.T @ V[rows]
        pull[:, d] += lack.sum(axis=0)
    if target is not None:
        pull[:, :d] += tau * (target - W)
    change = spd_solve(factor, pull.T).T
    return W + change[:, :d], b + change[:, d]


def keep_largest(W: np.ndarray, M: np.ndarray, k: int, *, tau: float, alpha: float) -> np.ndarray:
    """M: argmin τ/2 ||W - m||² + α/2 ||m - M||² with at most k entries: the k largest of the mean.

    A new array, never a view of W. Of equal entries the first are kept.
    """
    mean = (tau * W + alpha * M) / (tau + alpha)
    flat = mean.ravel()
    if k < flat.size:
        order = np.argsort(-np.abs(flat), kind="stable")
        flat[order[k:]] = 0.0
    return mean


def spd_factor(system: np.ndarray, ridge: float):
    """Cholesky factor of system + ridge I; `system` is overwritten."""
    system.flat[:: len(system) + 1] += ridge
    try:
        return cho_factor(system, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError as err:
        raise ValueError(
            f"a normal system of {len(system)} unknowns is singular to {system.dtype}. "
            "Raise alpha, or train in float64."
        ) from err


def spd_solve(factor, right: np.ndarray) -> np.ndarray:
    return cho_solve(factor, right, check_finite=False)


def _rows(a):
    return len(a), a.itemsize * a.shape[1]
