"""Gated to ReLU: each gated weight as a difference of two vectors of its gate's cone.

    minimise ||v|| + ||w||   subject to   v - w = u,   (2 D_i - I) X v >= 0, the same for w

The model doesn't change on the training rows, and needs no gates: `cones.relu_network`. Separable
over gates and outputs, d variables each (Mishkin, Sahiner, Pilanci 2022, "cone decomposition").
"""

import math
import time

import numpy as np

from edgesolve.kernels import barrier
from edgesolve.kernels.cones import check_gates
from edgesolve.kernels.interior import interior, repair, signs

CHUNK_FLOATS = 1 << 23
"""Columns are taken in chunks of about this many numbers (64 MiB)."""

NEAR_BOUNDARY = 0.99


def decompose(X, D, G, U, *, tol=1e-3, max_iter=50, seconds=math.inf):
    """(v, w), each (m, d, c): v - w = U to rounding, both in the cones, of nearly least norm.

    X (n, d), D (n, m) bool = X G >= 0, G (d, m), U (m, d, c). tol : for every gate and output
    ||v|| + ||w|| is within this share of the least possible, by a dual bound, unless max_iter steps
    or the budget of `seconds` end first; (v, w) is in the cones all the same. Never longer than
    `trivial_decomposition`. A zero u stays zero. ValueError: bad input, as for the solvers.

    Interior-point Newton, many columns at once: n d^2 + d^3 a column and step, 10 to 20 steps.
    """
    began = time.perf_counter()
    X, D, G, u, on = _columns(X, D, G, U)
    S, inside = signs(D), interior(X, D, G)
    V = np.zeros_like(u)
    chunk = max(1, CHUNK_FLOATS // (4 * X.shape[1] ** 2 + 8 * len(X)))
    columns = np.flatnonzero(on)
    for first in range(0, len(columns), chunk):
        at = columns[first : first + chunk]
        gate = at % len(U)
        start = _trivial(X, S[:, gate], inside[:, gate], G[:, gate], u[:, at])
        deadline = began + seconds
        V[:, at] = _shorten(
            X, S[:, gate], inside[:, gate], u[:, at], start, tol, max_iter, deadline
        )
    return _pair(V, U)


def trivial_decomposition(X, D, G, U):
    """The same without the minimisation: v = u + t g, w = t g with the least t that is feasible.

    Where a row lies on the gate's hyperplane no t is: the interior direction replaces g.
    """
    X, D, G, u, _ = _columns(X, D, G, U)
    gate = np.arange(u.shape[1]) % len(U)
    V = _trivial(X, signs(D)[:, gate], interior(X, D, G)[:, gate], G[:, gate], u)
    return _pair(V, U)


def _columns(X, D, G, U):
    """Checked input; U as columns u (d, c m), output-major, and which of them aren't zero."""
    X, D, G = check_gates(X, D, G)
    U = np.asarray(U, np.float64)
    m, d = D.shape[1], X.shape[1]
    if U.ndim != 3 or U.shape[:2] != (m, d) or not np.isfinite(U).all():
        raise ValueError(f"U must be ({m}, {d}, c) and finite, got shape {U.shape}.")
    u = U.transpose(1, 2, 0).reshape(d, -1)
    return X, D, G, u, u.any(axis=0)


def _pair(V, U):
    v = np.ascontiguousarray(V.reshape(len(V), -1, len(U)).transpose(2, 0, 1))
    return v, v - U


def _trivial(X, S, inside, G, u):
    along_gate = _into_both(X, S, G / np.linalg.norm(G, axis=0), u, u)
    again = _into_both(X, S, inside, u, along_gate)
    # A gate on some row's hyperplane gets nowhere along itself: then `inside` had work left.
    stuck = (again != along_gate).any(axis=0)
    return np.where(stuck, _into_both(X, S, inside, u, u), along_gate)


def _into_both(X, S, direction, u, v):
    """v (d, k) moved along its direction until v and v - u lie in the cone."""
    lower = np.maximum(S * (X @ u), 0.0)[:, None, :]
    size = np.linalg.norm(u, axis=0)[None]
    return repair(X, S, direction, v[:, None, :], lower, size)[:, 0]


def _length(v, u):
    return np.linalg.norm(v, axis=0) + np.linalg.norm(v - u, axis=0)


def _shorten(X, S, inside, u, start, tol, max_iter, deadline):
    """The best feasible v (d, k) found for columns u != 0, no longer than `start`."""
    size = np.linalg.norm(u, axis=0)
    u, best = u / size, start / size
    along = _into_both(X, S, inside, u, u)
    best = np.where(_length(along, u) < _length(best, u), along, best)
    v = along + 0.1 * np.linalg.norm(along, axis=0) * inside
    lower = np.maximum(S * (X @ u), 0.0)
    s = np.where(X.any(axis=1)[:, None], S * (X @ v) - lower, 1.0)
    mu = _length(v, u) / len(X)
    eta = mu / s
    p, q = (barrier.SmoothNorm(x, x, 1.0, mu).pull for x in (v, v - u))
    on = np.arange(u.shape[1])  # the columns not yet within tol: all arrays but `best` hold these
    for _ in range(max_iter):
        better = _into_both(X, S, inside, u, v)
        shorter = _length(better, u) < _length(best[:, on], u)
        best[:, on[shorter]] = better[:, shorter]
        length = _length(best[:, on], u)
        left = length - _lower_bound(X.T @ (S * eta), p, q, u, np.einsum("ij,ij->j", eta, lower))
        keep = left > tol * length
        if not keep.any() or time.perf_counter() > deadline:
            break
        S, inside, u, v, lower, s, eta, p, q, mu, on = (
            a[..., keep] for a in (S, inside, u, v, lower, s, eta, p, q, mu, on)
        )
        try:
            v, s, eta, p, q, mu = _step(X, S, u, v, s, eta, p, q, mu, tol * length[keep])
        except np.linalg.LinAlgError:
            break
    return best * size


def _lower_bound(pushed, p, q, u, held):
    """Of ||v|| + ||v - u||, for any eta >= 0 with pushed = H'eta and held = <eta, lower>, (k,).

    <p, v> + <q, v - u> with p + q = H'eta is at least held - <q, u>; p and q are first made to add
    up, then all is scaled until neither is longer than 1.
    """
    rest = 0.5 * (pushed - p - q)
    p, q = p + rest, q + rest
    over = np.maximum(np.linalg.norm(p, axis=0), np.linalg.norm(q, axis=0))
    return (held - np.einsum("ij,ij->j", q, u)) / np.maximum(over, 1.0)


def _step(X, S, u, v, s, eta, p, q, mu, error):
    """One predictor-corrector step of every column, each with its own mu and lengths."""
    norm_v, norm_w = barrier.SmoothNorm(v, p, 1.0, mu), barrier.SmoothNorm(v - u, q, 1.0, mu)
    weight = eta / s
    root = barrier.inverse_factors(
        barrier.weighted_grams(X, weight) + norm_v.hessian() + norm_w.hessian()
    )

    def direction(mu, correction):
        target = mu / s - correction
        pull_v = barrier.SmoothNorm(v, p, 1.0, mu).pull
        pull_w = barrier.SmoothNorm(v - u, q, 1.0, mu).pull
        dv = barrier.divide(root, X.T @ (S * target) - pull_v - pull_w)
        ds = S * (X @ dv)
        dp, dq = pull_v - p + norm_v.times(dv), pull_w - q + norm_w.times(dv)
        return dv, ds, target - eta - weight * ds, dp, dq

    def lengths(ds, deta, dp, dq, share):
        primal = barrier.to_boundary(s, ds)
        dual = np.minimum(barrier.to_sphere(p, dp, 1.0), barrier.to_sphere(q, dq, 1.0))
        dual = np.minimum(dual, barrier.to_boundary(eta, deta))
        return np.minimum(share * primal, 1.0), np.minimum(share * dual, 1.0)

    gap = np.einsum("ij,ij->j", eta, s)
    average = (gap + _length(v, u) - np.sum(p * v + q * (v - u), axis=0)) / len(X)
    _, ds, deta, dp, dq = direction(0.01 * average, 0.0)
    a, b = lengths(ds, deta, dp, dq, 1.0)
    left = np.einsum("ij,ij->j", eta + b * deta, s + a * ds) / gap
    mu = np.maximum(np.clip(left**3, 1e-3, 0.5) * average, 0.05 * error / len(X))
    dv, ds, deta, dp, dq = direction(mu, deta * ds / s)
    a, b = lengths(ds, deta, dp, dq, NEAR_BOUNDARY)
    return v + a * dv, s + a * ds, eta + b * deta, p + b * dp, q + b * dq, mu
