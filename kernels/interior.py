"""Inside the cones {v : (2 D_i - I) X v >= 0}: an interior direction for each, and the way back in.

Arrays of weights here are (d, s, m): s vectors for each of m gates; signs (n, m) are +-1.
"""

import numpy as np

TOUCHING = 1e-12
"""A row nearer to a gate's hyperplane than this (unit row, unit gate) lies on it."""

DISAGREES = 1e-6
"""A row this far on the wrong side isn't the rounding of float32 gates: D belongs to other gates."""

STEPS = 60
"""Newton steps to an analytic centre; 10 to 25 are typical, and any iterate is interior."""


def signs(D: np.ndarray) -> np.ndarray:
    """2 D - 1 as float64, (n, m)."""
    return np.where(D, 1.0, -1.0)


def interior(X: np.ndarray, D: np.ndarray, G: np.ndarray) -> np.ndarray:
    """Unit vectors (d, m), each well inside the cone of its gate.

    X (n, d), D (n, m) bool, G (d, m) : the gates that made D. Each column is near the analytic
    centre of the cone cut by the unit ball: argmax of sum_r log |x_r'h| - n ||h||^2/2 over the cone
    (rows scaled to unit norm, zero rows left out). A gate passes some row at 1e-5 or less; the
    centre keeps it at a distance, and `repair` adds that much less. Cost: n d^2 per gate and step.

    Rows that lie on a gate's hyperplane (exact zeros of x_r'g) make the gate a boundary point: it
    is first moved off them, by least squares. ValueError: a gate that disagrees with its pattern,
    or whose zeros can't be left that way.
    """
    norm = np.linalg.norm(X, axis=1)
    rows = X[norm > 0] / norm[norm > 0, None]
    open_rows = D[norm > 0]
    out = np.empty((X.shape[1], D.shape[1]))
    for i in range(D.shape[1]):
        A = np.where(open_rows[:, i, None], rows, -rows)
        out[:, i] = _centre(A, _strictly_inside(A, G[:, i], i))
    return out


def repair(X, S, inside, V, lower=0.0, size=None):
    """V (d, s, m) moved along `inside` until S * (X V) >= lower, by a margin that covers rounding.

    S (n, m) : signs. inside (d, m) : from `interior`. lower (n, s, m) or 0 : >= 0. size (s, m) :
    whose rounding the margin must cover besides V's, as a norm. The margin bounds the rounding of a
    product of length d in any order, so that another BLAS finds V feasible too. Zero columns stay.
    """
    eps = 4.0 * (X.shape[1] + 2) * np.finfo(np.float64).eps
    length = np.linalg.norm(X, axis=1)[:, None, None]
    towards = (S * (X @ inside))[:, None, :]
    usable = towards > 0
    for _ in range(20):  # a longer V has a larger margin: two rounds, rarely three
        extent = np.linalg.norm(V, axis=0) + (0.0 if size is None else size)
        short = lower + eps * length * extent - S[:, None, :] * product(X, V)
        t = np.max(np.divide(short, towards, out=np.zeros_like(short), where=usable), axis=0)
        if not (t > 0).any():
            break
        V = V + np.maximum(t, 0.0) * inside[:, None, :]
    return V


def product(X, V):
    """X V for weights V (d, s, m), (n, s, m)."""
    return (X @ V.reshape(len(V), -1)).reshape(len(X), *V.shape[1:])


def _strictly_inside(A, g, i):
    """A unit vector with A h > 0, at or near g."""
    h = g / np.linalg.norm(g)
    margin = A @ h
    if len(A) and margin.min() < -DISAGREES:
        raise ValueError(
            f"D must be the pattern X G >= 0: column {i} disagrees with gate {i} by "
            f"{-margin.min():.1e} on a unit row; pass the gates that made D."
        )
    low = margin <= TOUCHING
    if low.any():
        away = np.linalg.lstsq(A[low], np.ones(low.sum()), rcond=None)[0]
        change = np.abs(A @ away)
        room = np.min(0.5 * margin[~low] / np.maximum(change[~low], 1e-300), initial=1.0)
        h = h + room * away
        if not (A @ h > TOUCHING * room).all():
            raise ValueError(
                f"gate {i} has {low.sum()} rows on its hyperplane and its cone shows no interior "
                "next to it: draw another gate."
            )
    return h


def _centre(A, h):
    """Damped Newton from the strictly feasible h; self-concordance keeps every step inside."""
    n, d = A.shape
    for _ in range(STEPS if n else 0):
        scaled = A / (A @ h)[:, None]
        grad = n * h - scaled.sum(axis=0)
        step = np.linalg.solve(scaled.T @ scaled + n * np.eye(d), grad)
        decrement = np.sqrt(max(grad @ step, 0.0))
        h = h - step / (1.0 + decrement)
        if decrement < 0.25:
            break
    return h / np.linalg.norm(h)
