"""Ranks by gradient descent over softmax mixtures: the published search, as a baseline beside `allocate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import khatri_rao

CP_SWEEPS = 20


@dataclass(frozen=True, slots=True)
class Format:
    """start(weight (T, c, K), rank) -> factors; product(*factors) -> their weight (T, c, K), in torch.

    full(T, c, K): the rank above which there is nothing to gain.
    """

    start: Callable[[np.ndarray, int], tuple[np.ndarray, ...]]
    product: Callable[..., torch.Tensor]
    full: Callable[[int, int, int], int]


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """`gamma`, `beta`: of the rank loss. `divide`: the step of the next round's range is this one's over it.

    `lr`: of both Nesterov SGD optimisers. `clip`: largest norm of a gradient. `spread`: standard deviation of the
    logits at the start, which `seed` draws: at the published `lr` they move by about 1e-3 in all, so that a spread
    of 1e-3 already decides the ranks.
    """

    gamma: float = 0.4
    beta: float = 0.8
    warmup: int = 20
    iterations: int = 100
    lr: float = 1e-3
    momentum: float = 0.9
    divide: int = 10
    clip: float = 1.0
    spread: float = 0.0
    seed: int = 0


def hosvd(weight: np.ndarray, rank: int) -> tuple[np.ndarray, ...]:
    """(u_out (T, r), core (r, r, K), u_in (c, r)) with r = `rank`, or the channels where those are fewer."""
    T, c, _ = weight.shape
    u_out = _left(weight.reshape(T, -1), rank)
    u_in = _left(weight.transpose(1, 0, 2).reshape(c, -1), rank)
    return u_out, np.einsum("ock,oa,cb->abk", weight, u_out, u_in, optimize=True), u_in


def cp3(weight: np.ndarray, rank: int) -> tuple[np.ndarray, ...]:
    """(u_out (T, r), u_in (c, r), u_k (K, r)) after 20 sweeps of least squares.

    From singular vectors plus a little seeded noise, which fills the columns that a short mode lacks: of 30 planted
    sums (12, 14, 9) of rank 7 it found 28, from noise alone 10.
    """
    rng = np.random.default_rng(0)
    unfolded = [np.moveaxis(weight, mode, 0).reshape(n, -1) for mode, n in enumerate(weight.shape)]
    factors = [0.1 / np.sqrt(n) * rng.standard_normal((n, rank)) for n in weight.shape]
    for factor, unfolding in zip(factors, unfolded, strict=True):
        U = _left(unfolding, rank)
        factor[:, : U.shape[1]] += U
    for _ in range(CP_SWEEPS):
        for mode in range(3):
            a, b = (factors[m] for m in range(3) if m != mode)
            gram = (a.T @ a) * (b.T @ b)
            ridge = max(1e-9 * np.trace(gram) / rank, 1e-300) * np.eye(rank)  # parallel columns
            factors[mode] = np.linalg.solve(gram + ridge, (unfolded[mode] @ khatri_rao(a, b)).T).T
            if mode < 2:
                factors[mode] /= np.maximum(np.linalg.norm(factors[mode], axis=0), 1e-300)
    return tuple(factors)


def _left(unfolding: np.ndarray, rank: int) -> np.ndarray:
    """The first left singular vectors, each one's largest entry positive."""
    U = np.linalg.svd(unfolding, full_matrices=False)[0][:, :rank]
    return U * np.sign(U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])])


def _tucker2_product(u_out, core, u_in):
    return torch.einsum("obk,cb->ock", torch.tensordot(u_out, core, 1), u_in)


def _cp3_product(u_out, u_in, u_k):
    return (u_out[:, None] * u_in) @ u_k.T


TUCKER2 = Format(hosvd, _tucker2_product, lambda T, c, K: min(T, c))
"""1×1, k×k, 1×1 with r_in = r_out; the paper's "TT"."""
CP3 = Format(cp3, _cp3_product, lambda T, c, K: min(T * c, T * K, c * K))


def search(
    weights: Mapping[str, torch.Tensor],
    ranges: Mapping[str, range] | range,
    loss: Callable[[dict[str, torch.Tensor]], torch.Tensor] | None = None,
    *,
    format: Format = TUCKER2,
    options: SearchOptions | None = None,
) -> dict[str, int]:
    """One rank per layer, by name.

    weights: (T, c, kh, kw), left alone. ranges: the candidate ranks of the first round, evenly spaced, of every
    layer or of each; a next round looks around the best one, ± half a step by ⌊step / divide⌋, while that is >= 1.
    loss: of the network with the given weights, of the same shapes; the paper's is the task's, ours the KL to the
    teacher. Without it the logits descend on the weights' error, which is data-free.

    Minimises, in turns, E · R over the factors and (loss or E) · R over the logits α, where
    W_mix = Σ_r p^r Ŵ^r, p = softmax(α), E = mean ‖W − W_mix‖² / ‖W‖², R = γ Σ_i (Σ_r p_i^r r / max r)^β.
    The same input and seed give the same ranks. No certificate and no budget: of a product γ only scales the step,
    so that β and the ranges are all there is to turn. A number that is not finite is a ValueError.
    (Aghababaei-Harandi & Amini 2024; E isn't divided by ‖W‖² there, where wide layers outweigh the others, and the
    factors' start is ours.)
    """
    options = options or SearchOptions()
    full = {name: _full(name, w, format) for name, w in weights.items()}
    ranges = {
        name: _fitting(name, ranges if isinstance(ranges, range) else ranges[name], full[name])
        for name in weights
    }
    generator = torch.Generator().manual_seed(options.seed)
    while True:
        mixtures = {
            name: _Mixture(weights[name], ranges[name], format, generator, options.spread)
            for name in weights
        }
        _descend(mixtures, loss, options)
        best = {name: m.best() for name, m in mixtures.items()}
        if all(r.step < options.divide for r in ranges.values()):
            return best
        ranges = {
            name: _finer(best[name], r, options.divide, full[name]) for name, r in ranges.items()
        }


class _Mixture:
    """One layer: the candidates' factors and their logits, all to be learnt."""

    def __init__(self, weight, ranks: range, format: Format, generator, spread: float):
        self.weight, self.ranks, self.product = weight.detach(), ranks, format.product
        T, c = weight.shape[:2]
        array = self.weight.double().cpu().numpy().reshape(T, c, -1)
        self.factors = [
            [torch.tensor(f).to(self.weight).requires_grad_() for f in format.start(array, rank)]
            for rank in ranks
        ]
        noise = torch.randn(len(ranks), generator=generator)
        self.logits = (spread * noise).to(self.weight).requires_grad_()
        self.scale = self.weight.square().sum().clamp_min(torch.finfo(weight.dtype).tiny)

    def shares(self) -> torch.Tensor:
        return self.logits.softmax(0)

    def weight_hat(self) -> torch.Tensor:
        each = torch.stack([self.product(*f) for f in self.factors])
        return torch.tensordot(self.shares(), each, 1).reshape(self.weight.shape)

    def error(self, mixed: torch.Tensor) -> torch.Tensor:
        return (self.weight - mixed).square().sum() / self.scale

    def relative_rank(self) -> torch.Tensor:
        ranks = torch.tensor(list(self.ranks)).to(self.weight)
        return self.shares() @ ranks / ranks.max()

    def best(self) -> int:
        return self.ranks[int(self.logits.argmax())]


def _descend(mixtures: dict[str, _Mixture], loss, options: SearchOptions) -> None:
    factors = [f for m in mixtures.values() for candidate in m.factors for f in candidate]
    logits = [m.logits for m in mixtures.values()]
    sgd = {"lr": options.lr, "momentum": options.momentum, "nesterov": options.momentum > 0}
    of_factors, of_logits = torch.optim.SGD(factors, **sgd), torch.optim.SGD(logits, **sgd)
    for iteration in range(options.warmup + options.iterations):
        _step(of_factors, factors, _objective(mixtures, None, options), mixtures, options)
        if iteration >= options.warmup:
            _step(of_logits, logits, _objective(mixtures, loss, options), mixtures, options)


def _objective(mixtures: dict[str, _Mixture], loss, options: SearchOptions) -> torch.Tensor:
    mixed = {name: m.weight_hat() for name, m in mixtures.items()}
    ranks = sum(m.relative_rank() ** options.beta for m in mixtures.values())
    if loss is None:
        value = sum(m.error(mixed[name]) for name, m in mixtures.items()) / len(mixtures)
    else:
        value = loss(mixed)
    return value * (options.gamma * ranks)


def _step(optimizer, parameters, objective, mixtures, options: SearchOptions) -> None:
    gradients = torch.autograd.grad(objective, parameters)
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
    # argmax of a NaN softmax is the first, that is the smallest rank: never go on with one.
    if not (objective.isfinite() and norm.isfinite()):
        raise ValueError(
            f"rank search: the objective is {objective.item()} and its gradient has norm {norm.item()}, not finite; "
            "check the loss on its batch, or lower the learning rate."
        )
    scale = (options.clip / norm.clamp_min(options.clip)).detach()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient * scale
    optimizer.step()


def _full(name: str, weight: torch.Tensor, format: Format) -> int:
    if weight.ndim != 4 or not torch.isfinite(weight).all():
        raise ValueError(
            f"{name}: rank search takes a finite weight (T, c, kh, kw), got shape {tuple(weight.shape)}, "
            f"{int((~torch.isfinite(weight)).sum())} numbers not finite."
        )
    T, c, kh, kw = weight.shape
    return format.full(T, c, kh * kw)


def _fitting(name: str, ranks: range, full: int) -> range:
    """The candidates, those above the layer's full rank left out."""
    fitting = range(ranks.start, min(ranks.stop, full + 1), ranks.step)
    if not len(fitting) or ranks.start < 1 or ranks.step < 1:
        raise ValueError(f"{name}: no candidate of {ranks} lies in 1..{full}.")
    return fitting


def _finer(best: int, ranks: range, divide: int, full: int) -> range:
    """best ± half the step, by the step over `divide`; only `best` where that is nothing."""
    half, step = ranks.step // 2, ranks.step // divide
    if step < 1:
        return range(best, best + 1)
    return range(max(best - half, 1), min(best + half, full) + 1, step)
