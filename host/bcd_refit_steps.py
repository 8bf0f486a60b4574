"""The updates of host/bcd_refit.py: each the exact minimiser of its block, or conjugate gradients that never ascend."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgesolve.host.chain import Chain, Factor, dense
from edgesolve.host.metric import Metric
from edgesolve.host.refit_problem import (
    Point,
    Problem,
    adjoint,
    affine,
    conv,
    kernel,
    matrix,
    put,
    square,
)
from edgesolve.host.sites import Site
from edgesolve.host.survey import factorise
from edgesolve.kernels.moments import Moments


def updated_u(problem: Problem, p: Point, i: int) -> tuple[Tensor, ...]:
    """argmin over U_i, exact entry by entry (`clamp_prox`), with α/2 ||U - U_i||²."""
    o, follow = problem.options, problem.block.follow[i]
    last = i == problem.n_layers - 1
    after = problem.flow.target if last else p.V[i + 1]
    outer, weight = 1.0 if last else o.gamma, o.rho + o.alpha
    found = []
    for k, (u, a) in enumerate(zip(p.U[i], after, strict=True)):
        linear = affine(problem, i, p.W[i], p.bias[i], p.V[i][k]) + problem.skip(i, k)
        b = (o.rho * linear + o.alpha * u) / weight
        found.append(clamp_prox(a, b, weight / outer, follow.low, follow.high))
    return tuple(found)


def clamp_prox(a: Tensor, b: Tensor, g: float, low: float, high: float) -> Tensor:
    """argmin over u of (clamp(u, low, high) - a)²/2 + g/2 (u - b)², entry by entry; g > 0.

    The cheapest of the minimisers inside the range, below it and above it.
    """
    best = ((a + g * b) / (1.0 + g)).clamp(low, high)
    cost = (best - a) ** 2 + g * (best - b) ** 2
    for beyond, level in ((b.clamp(max=low), low), (b.clamp(min=high), high)):
        if np.isfinite(level):
            other = (level - a) ** 2 + g * (beyond - b) ** 2
            best, cost = torch.where(other < cost, beyond, best), torch.minimum(cost, other)
    return best


def updated_v(problem: Problem, p: Point, i: int) -> tuple[Tensor, ...]:
    """argmin over V_i: γ/2 ||V - σ(U)||² + ρ/2 ||U' - s - W * V - b||² by conjugate gradients from V_i.

    Norms are means over positions, and a stride leaves layer i fewer of them than the layer before it.
    """
    o, site, d = problem.options, problem.block.sites[i], problem.scale(i)
    before = problem.block.follow[i - 1]
    near, far = o.gamma / problem.rows(i - 1), o.rho / problem.rows(i)
    weight = kernel(problem, i, p.W[i])
    found = []
    for k, v in enumerate(p.V[i]):
        lack = p.U[i][k] - problem.skip(i, k) - affine(problem, i, p.W[i], p.bias[i], v)
        pull = p.U[i - 1][k].clamp(before.low, before.high) - v
        right = near * pull + far * adjoint(site, weight, d * lack, v.shape)

        def normal(x, shape=v.shape):
            return near * x + far * adjoint(site, weight, d * conv(site, weight, x), shape)

        found.append(v + conjugate_gradients(normal, right, *o.cg))
    return tuple(found)


def conjugate_gradients(normal, right: Tensor, tol: float, most: int) -> Tensor:
    """x with normal(x) = right, from 0, to a residual of `tol` of its first; every iterate lowers ½x'Nx - x'right."""
    x, r = torch.zeros_like(right), right.clone()
    p, energy = r.clone(), square(r)
    goal = tol * tol * energy
    for _ in range(most):
        if not energy > goal:
            break
        q = normal(p)
        step = energy / float((p * q).sum(dtype=torch.float64))
        x += step * p
        r -= step * q
        new = square(r)
        p = r + (new / energy) * p
        energy = new
    return x


def updated_layer(problem: Problem, p: Point, i: int) -> Point:
    """Layer i's weight, bias and factors by least squares on its patches; what doesn't lower L isn't taken."""
    o, site, chain = problem.options, problem.block.sites[i], p.chains[i]
    metric = Metric.of(layer_moments(problem, p, i))
    if o.tau is None:
        made = _factors(metric.ridged(p.W[i], o.ridge), site, chain, o, problem, i)
        W = matrix(made)
        if not _distortion(metric, W, problem, i) <= _distortion(metric, p.W[i], problem, i):
            made, W = chain, p.W[i]
        return _with(p, i, W, metric.bias(W), made)
    # d scales rows of W, whose least squares it doesn't change but for what pulls at them.
    d = problem.weights if i == problem.n_layers - 1 else np.ones(len(site.bias))
    G = matrix(chain)
    prox = o.ridge * np.trace(metric.S) / metric.D
    W = np.empty_like(G)
    for value in np.unique(d):
        at = d == value
        lam, tau = prox, problem.tau / (o.rho * value)
        S = metric.S + (lam + tau) * np.eye(metric.D)
        right = metric.C[at] + lam * p.W[i][at] + tau * G[at]
        W[at] = np.linalg.solve(S, right.T).T
    near = Metric.weight_space(W)
    made = _refactored(near, site, chain, o.factor_sweeps)
    if not near.distortion(matrix(made)) <= near.distortion(G):
        made = chain
    return _with(p, i, W, metric.bias(W), made)


def _factors(metric, site, chain, o, problem, i) -> Chain:
    if i < problem.n_layers - 1 or np.ptp(problem.weights) == 0.0:
        return _refactored(metric, site, chain, o.factor_sweeps)
    root = np.sqrt(problem.weights)
    scaled = _scaled(chain, root)
    return _scaled(
        _refactored(metric.weighted(np.diag(root)), site, scaled, o.factor_sweeps), 1.0 / root
    )


def _refactored(metric: Metric, site: Site, chain: Chain, sweeps: int) -> Chain:
    """The chain's format and ranks fitted in `metric`, from where it is: no step ascends."""
    if chain.format == "dense":
        return dense(metric.least_squares().reshape(site.shape))
    return factorise(metric, site.shape, chain, sweeps, chain)


def _scaled(chain: Chain, by: np.ndarray) -> Chain:
    last = chain.factors[-1]
    scaled = Factor(last.weight * by[:, None, None, None], last.axes, last.groups)
    return replace(chain, factors=(*chain.factors[:-1], scaled))


def _distortion(metric: Metric, W: np.ndarray, problem: Problem, i: int) -> float:
    """Σ d_t E(t - W x - bias)², up to a constant of the target."""
    d = problem.weights if i == problem.n_layers - 1 else np.ones(len(W))
    return float(np.sum(d[:, None] * W * (W @ metric.S - 2.0 * metric.C)))


def layer_moments(problem: Problem, p: Point, i: int) -> Moments:
    """Of layer i's patches and of what they should give, U_i - s_i; products in the activations' type."""
    site = problem.block.sites[i]
    (kh, kw), total = site.weight.shape[2:], None
    for k, (v, u) in enumerate(zip(p.V[i], p.U[i], strict=True)):
        x = F.unfold(v, (kh, kw), site.dilation, site.padding, site.stride)
        x = x.transpose(1, 2).flatten(0, 1)
        t = (u - problem.skip(i, k)).flatten(2).transpose(1, 2).flatten(0, 1)
        parts = (x.sum(0), x.T @ x, t.T @ x, t.sum(0))
        found = Moments(len(x), *(a.double().numpy() for a in parts), square(t))
        total = found if total is None else total + found
    return total


def _with(p: Point, i: int, W, bias, chain) -> Point:
    return replace(p, W=put(p.W, i, W), bias=put(p.bias, i, bias), chains=put(p.chains, i, chain))
