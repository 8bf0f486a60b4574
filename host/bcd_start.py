"""Where block coordinate descent begins: a network whose layers are set in closed form, one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgesolve.host import bcd_blocks as blocks
from edgesolve.host.bcd_problem import Problem, Settings, State, at, compress, forward, full


@dataclass(frozen=True, slots=True)
class Start:
    """How a network begins.

    directions : leading principal axes that a hidden layer sees. labels : weight of the directions that a
        ridge regression of Y finds, against that of the principal ones; 0 leaves Y out.
    smooth, ridge : ridges of that regression and of the output layer. spread : of the biases.
    """

    directions: int = 30
    labels: float = 0.5
    smooth: float = 100.0
    ridge: float = 1.0
    spread: float = 0.5


def closed_form(
    problem: Problem, settings: Settings, start: Start | None = None, *, seed: int
) -> State:
    """A feasible state: random features of what each layer's input says, the output by ridge regression.

    The first layer of a convolution is random (He 2015). A hidden W_i ~ G P + labels H R, G and H
    random normal, P the leading principal axes of V_{i-1} and R (c, d) the ridge regression of Y on it, both
    scaled to rows of size 1; b_i random normal less the mean. Compressed at once, so that W_i = C_i and no
    format pulls. W_N, b_N: ridge regression of Y. All constraints hold: L is the loss of this network.
    """
    start = start or Start()
    rng, dtype = np.random.default_rng(seed), np.dtype(settings.dtype)
    Y, V, W, b, C = np.asarray(problem.y, dtype), np.asarray(problem.x, dtype), [], [], []
    for i in range(1, problem.n_layers):
        d_out, d_in = problem.shape(i)
        if i == 1 and problem.positions > 1:
            weight = rng.standard_normal((d_out, d_in)) * np.sqrt(2.0 / d_in)
            bias = np.zeros(d_out)
        else:
            weight = _features(V, Y, d_out, start, rng)
            bias = start.spread * rng.standard_normal(d_out) - weight @ V.mean(axis=0)
        weight, bias = weight.astype(dtype), bias.astype(dtype)
        C.append(compress(weight, problem.formats.get(i)))
        if C[-1] is not None:
            bias = bias + (weight - full(C[-1])) @ V.mean(axis=0)
            weight = full(C[-1])
        W.append(weight)
        b.append(bias)
        V = np.maximum(V @ weight.T + bias, 0.0).reshape(len(Y), -1)
    weight, bias = readout(V, Y, start.ridge)
    C.append(compress(weight, problem.formats.get(problem.n_layers)))
    return at(problem, settings, [*W, weight], [*b, bias], tuple(C))


def _features(V, Y, d_out, start, rng):
    axes, scale = leading(V, min(start.directions, V.shape[1]), rng)
    weight = rng.standard_normal((d_out, len(axes))) @ axes / scale
    if not start.labels:
        return weight
    found = readout(V, Y, start.smooth)[0]
    seen = V @ found.T
    size = np.sqrt(np.mean(np.sum((seen - seen.mean(axis=0)) ** 2, axis=1)))
    by_label = rng.standard_normal((d_out, len(found))) @ found / size
    return (weight + start.labels * by_label) / np.hypot(1.0, start.labels)


def output_again(problem: Problem, weights, biases, ridge: float):
    """The same weights and biases with W_N, b_N fitted anew, by ridge, to what the others give."""
    last = problem.n_layers - 1
    V = np.maximum(forward(problem.x, problem.positions, weights, biases, last), 0.0)
    W, b = readout(V, np.asarray(problem.y, V.dtype), ridge)
    return (*weights[:last], W), (*biases[:last], b)


def readout(V: np.ndarray, Y: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """W (c, d), b (c,): argmin ||Y - V W' - b||² + ridge (||W||² + ||b||²)."""
    factor = blocks.affine_factor(blocks.gram(V), rho=1.0, alpha=ridge, tau=0.0)
    W, b = np.zeros((Y.shape[1], V.shape[1]), V.dtype), np.zeros(Y.shape[1], V.dtype)
    return blocks.affine(factor, V, Y, np.zeros_like(Y), W, b, None, rho=1.0, tau=0.0)


def leading(V: np.ndarray, r: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """(r, d) leading principal axes of the rows V, and the size of the rows along them.

    Subspace iteration with a few directions to spare (Halko, Martinsson, Tropp 2011).
    """
    n, d = V.shape
    mean = V.mean(axis=0)
    basis = np.linalg.qr(rng.standard_normal((d, min(d, r + 20))).astype(V.dtype))[0]
    for _ in range(4):
        seen = V @ basis - mean @ basis
        basis = np.linalg.qr(V.T @ seen - np.outer(mean, seen.sum(axis=0)))[0]
    seen = V @ basis - mean @ basis
    values, turn = np.linalg.eigh(seen.T @ seen / n)
    axes = (basis @ turn[:, ::-1][:, :r]).T
    return axes, float(np.sqrt(values[::-1][:r].sum()))
