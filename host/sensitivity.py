"""How much the network's answers suffer from an error in one layer, without labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from edgesolve.host.sites import Site
from edgesolve.host.splice import Dense
from edgesolve.host.walk import Walk


def divergence(teacher: Tensor, student: Tensor) -> float:
    """Mean KL(softmax(teacher) || softmax(student)) of logits (n, c), in nats."""
    p, q = teacher.double().log_softmax(1), student.double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def probe(
    walk: Walk,
    logits: dict[int, Tensor],
    site: Site,
    replacements: list[tuple[np.ndarray, np.ndarray]],
) -> list[float]:
    """KL of the whole network for each (weight, bias) put in the place of `site` alone.

    `logits`: the original network's answers by batch, for the batches of `walk` to be measured on; nothing may
    be replaced in it.
    """
    index, stop = walk.network.index(site.node), len(walk.network.nodes)
    sums, n = np.zeros(len(replacements)), 0
    for k, state in walk.before(site.node):
        if k not in logits:
            continue
        expected = logits[k]
        for i, (weight, bias) in enumerate(replacements):
            layers = {**walk.original, site.node: Dense(site, weight, bias)}
            values = dict(state.student)
            with torch.no_grad():
                walk.network.advance(values, index, stop, norm=walk.norm, layers=layers)
            sums[i] += len(expected) * divergence(expected, walk.network.result(values))
        n += len(expected)
    sums, n = walk.shards.arrays(sums, n)
    return [float(s) for s in sums / n]


def fisher(
    walk: Walk,
    n_frames: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda d, t: None,
) -> dict[str, np.ndarray]:
    """Gamma (T, T) of every layer: E[g g'] over positions, g the gradient of log p(y) by the layer's output.

    y is drawn from the original network's own softmax, by a seeded generator, so no labels are needed. To second
    order KL(original || changed) is half of sum e' Gamma e over positions, for errors e in one layer's output.
    """
    sums = {s.node: np.zeros((len(s.weight), len(s.weight))) for s in walk.found}
    chosen = [k for k in walk.mine if k * walk.size < n_frames]
    total = 0
    for i, k in enumerate(chosen):
        total += _add_gradients(walk, k, seed, sums)
        progress(i + 1, len(chosen))
    total, *merged = walk.shards.arrays(total, *sums.values())
    at = {s.node: s.at.after[0] * s.at.after[1] for s in walk.found}
    return {node: g / (total * at[node]) for node, g in zip(sums, merged, strict=True)}


def _add_gradients(walk: Walk, k: int, seed: int, sums: dict[str, np.ndarray]) -> int:
    """Add batch k's sums of g g' to `sums`; the number of its frames."""
    kinds = {s.node: s.kind for s in walk.found}
    seen: dict[str, Tensor] = {}

    def watch(node, value, args):
        if node.name in kinds:
            seen[node.name] = value

    frames = torch.from_numpy(np.ascontiguousarray(walk.x[k * walk.size : (k + 1) * walk.size]))
    x = walk.preprocess(frames).requires_grad_()
    logits = walk.network.run(x, norm=walk.norm, layers=walk.original, watch=watch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + k)
    drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
    loss = logits.log_softmax(1)[torch.arange(len(x)), drawn].sum()
    gradients = torch.autograd.grad(loss, list(seen.values()))
    for name, g in zip(seen, gradients, strict=True):
        last = kinds[name] == "linear"
        flat = g.reshape(-1, g.shape[-1]) if last else g.flatten(2).transpose(1, 2).flatten(0, 1)
        sums[name] += (flat.T @ flat).double().numpy()
    return len(x)


def damped(gamma: np.ndarray, share: float) -> np.ndarray:
    """(1 - share) Gamma / g + share I, g = tr(Gamma) / T; the identity if Gamma is zero."""
    T = len(gamma)
    mean = float(np.trace(gamma)) / T
    if mean <= 0.0:
        return np.eye(T)
    return (1.0 - share) * gamma / mean + share * np.eye(T)


def roots(gamma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Gamma^1/2, Gamma^-1/2) of a positive definite Gamma, both symmetric."""
    values, vectors = np.linalg.eigh(gamma)
    root = np.sqrt(np.maximum(values, 1e-12 * values[-1]))
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
