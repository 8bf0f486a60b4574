"""Distil the original into its compressed network by gradient descent: no labels, minutes, and only if it helps."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgesolve.host.adaptable import Preprocess
from edgesolve.host.capture import Progress, batches
from edgesolve.host.errors import ModelError
from edgesolve.host.sensitivity import divergence
from edgesolve.host.sites import folded_run
from edgesolve.host.splice import Compressed, Dense, Factored

BATCH = 64


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """How long, how fast, and what counts.

    epochs : over the frames, with Adam, or SGD (Nesterov, momentum .9), which wants about ten times the `lr`.
    lr : falls along half a cosine to 0. seconds : the descent ends then; where that is before the epochs end, `lr`
        falls along the time. Without it the same input gives the same bytes.
    temperature : of the logits. features : weight of the relative squared error at the call sites `at`.
    flip, shift : mirror frames and move them by at most so many pixels, at random, where that leaves their meaning.
    """

    epochs: int = 10
    lr: float = 1e-4
    optimiser: str = "adam"
    seconds: float | None = None
    temperature: float = 1.0
    features: float = 0.0
    at: tuple[str, ...] = ()
    flip: bool = False
    shift: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.optimiser not in ("adam", "sgd"):
            raise ValueError(f"optimiser must be adam or sgd, got {self.optimiser!r}.")
        for name in ("epochs", "lr", "temperature"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}.")
        if self.features > 0.0 and not self.at:
            raise ValueError("features takes call sites to compare at; name them in `at`.")


@dataclass(frozen=True, slots=True, eq=False)
class Finetuned:
    """The network after the last epoch that improved on the best before it: held out, its divergence fell and its
    agreement didn't. Epoch 0 is as it was.

    `loss`: mean of each epoch; `divergence` (nats), `agreement`: held out, before and after each epoch.
    """

    module: Compressed
    epoch: int
    loss: tuple[float, ...]
    divergence: tuple[float, ...]
    agreement: tuple[float, ...]
    seconds: float

    @property
    def accepted(self) -> bool:
        return self.epoch > 0


def finetune(
    module: Compressed,
    preprocess: Preprocess,
    x: np.ndarray,
    held: np.ndarray,
    options: FinetuneOptions | None = None,
    progress: Progress = lambda done, total: None,
) -> Finetuned:
    """Frames x (n, h, w, c) teach, `held` judge. `module` stays as it is; identity blocks stay identities.

    The loss is T² KL(original || compressed) of logits over T, plus the features' term. No label is read.
    """
    options = options or FinetuneOptions()
    unknown = set(options.at) - {n.name for n in module.network.nodes}
    if unknown:
        raise ModelError(f"{sorted(unknown)[0]}: no such call site in the traced network.")
    student = _Student(module)
    began = time.perf_counter()
    expected = torch.cat([student.original(preprocess(b)) for b in batches(held, BATCH)])
    best = student.kept()
    judged, losses, epoch = [_judged(student, preprocess, held, expected)], [], 0
    optimiser = _optimiser(student, options)
    draw = np.random.default_rng(options.seed)
    for done in range(options.epochs):
        spent = time.perf_counter() - began
        if options.seconds is not None and spent >= options.seconds:
            break
        losses.append(_epoch(student, preprocess, x, options, optimiser, draw, done, began))
        judged.append(_judged(student, preprocess, held, expected))
        # A few frames carry most of a mean divergence, so it alone can fall while answers get worse; NaN never wins.
        if judged[-1][0] < judged[epoch][0] and judged[-1][1] >= judged[epoch][1]:
            epoch, best = done + 1, student.kept()
        progress(done + 1, options.epochs)
    student.restore(best)
    return Finetuned(
        student.shipped() if epoch else module,
        epoch,
        tuple(losses),
        tuple(j[0] for j in judged),
        tuple(j[1] for j in judged),
        time.perf_counter() - began,
    )


class _Student:
    """The compressed network with every weight and bias open to gradients."""

    def __init__(self, module: Compressed):
        self.module, self.network = module, module.network
        self.sites = [place.site for place in module.places.values()]
        self.teacher_layers, self.norm = folded_run(self.network, self.sites)
        self.places = {node: copy.deepcopy(p) for node, p in module.places.items()}
        self.masks = {}
        for node, place in self.places.items():
            for name, value in place.named_buffers():
                value.requires_grad_()
                mask = _stored(place, name)
                if mask is not None:
                    self.masks[node, name] = mask
        self.parameters = [v for p in self.places.values() for v in p.buffers()]

    def original(self, x: Tensor, watch=None) -> Tensor:
        with torch.no_grad():
            return self.network.run(x, norm=self.norm, layers=self.teacher_layers, watch=watch)

    def __call__(self, x: Tensor, watch=None) -> Tensor:
        return self.network.run(x, norm=self.norm, layers=self.places, watch=watch)

    def mask_gradients(self) -> None:
        for (node, name), mask in self.masks.items():
            gradient = getattr(self.places[node], name).grad
            if gradient is not None:
                gradient.mul_(mask)

    def kept(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def restore(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for p, v in zip(self.parameters, values, strict=True):
                p.copy_(v)

    def shipped(self) -> Compressed:
        """A network of its own, without gradients, whose chains are those of its weights."""
        layers = {node: _closed(place) for node, place in self.places.items()}
        return Compressed(self.network, self.sites, layers).eval()


def _stored(place: nn.Module, name: str) -> Tensor | None:
    """0 where the factor behind a buffer is the identity by its structure, 1 elsewhere; None: 1 everywhere."""
    if not isinstance(place, Factored) or not name.startswith("weight_"):
        return None
    factor = place.chain.factors[int(name.removeprefix("weight_"))]
    if not factor.pivots:
        return None
    mask = np.ones(factor.weight.shape)
    if factor.narrows:
        mask[:, factor.pivots] = 0.0
    else:
        mask[factor.pivots, :] = 0.0
    return torch.from_numpy(place.site.laid_out(mask)).float()


def _closed(place: nn.Module) -> nn.Module:
    bias = _array(place.bias)
    if isinstance(place, Dense):
        return Dense(place.site, _array(place.weight), bias)
    factors = tuple(
        replace(f, weight=_array(getattr(place, f"weight_{i}")).reshape(f.weight.shape))
        for i, f in enumerate(place.chain.factors)
    )
    return Factored(place.site, replace(place.chain, factors=factors), bias)


def _array(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy().copy()


def _optimiser(student: _Student, options: FinetuneOptions):
    if options.optimiser == "adam":
        return torch.optim.Adam(student.parameters, lr=options.lr)
    return torch.optim.SGD(student.parameters, lr=options.lr, momentum=0.9, nesterov=True)


def _epoch(student, preprocess, x, options, optimiser, draw, done, began) -> float:
    order, total = draw.permutation(len(x)), 0.0
    starts = range(0, len(x), BATCH)
    for i, start in enumerate(starts):
        share = (done + i / len(starts)) / options.epochs
        if options.seconds is not None:
            share = max(share, (time.perf_counter() - began) / options.seconds)
        for group in optimiser.param_groups:
            group["lr"] = options.lr * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
        pick = np.sort(order[start : start + BATCH])
        frames = _moved(preprocess(torch.from_numpy(x[pick])), options, draw)
        loss = _loss(student, frames, options)
        optimiser.zero_grad()
        loss.backward()
        student.mask_gradients()
        optimiser.step()
        total += float(loss.detach()) * len(pick)
    return total / len(x)


def _moved(frames: Tensor, options: FinetuneOptions, draw: np.random.Generator) -> Tensor:
    """frames (n, c, h, w), each mirrored or not and shifted with its edge repeated."""
    if options.flip:
        mirrored = torch.from_numpy(draw.random(len(frames)) < 0.5)
        frames = torch.where(mirrored[:, None, None, None], frames.flip(3), frames)
    if options.shift:
        s, (h, w) = options.shift, frames.shape[2:]
        wide = F.pad(frames, (s, s, s, s), mode="replicate")
        at = draw.integers(0, 2 * s + 1, (len(frames), 2))
        frames = torch.stack(
            [f[:, a : a + h, b : b + w] for f, (a, b) in zip(wide, at, strict=True)]
        )
    return frames


def _loss(student: _Student, frames: Tensor, options: FinetuneOptions) -> Tensor:
    theirs, ours = {}, {}
    watch = [
        (lambda node, value, args, seen=seen: seen.update({node.name: value}) if node.name in options.at else None)
        for seen in (theirs, ours)
    ]  # fmt: skip
    wanted = student.original(frames, watch[0])
    logits = student(frames, watch[1])
    T = options.temperature
    p, q = (wanted / T).log_softmax(1), (logits / T).log_softmax(1)
    loss = T * T * (p.exp() * (p - q)).sum(1).mean()
    for name in options.at if options.features > 0.0 else ():
        scale = theirs[name].var().clamp(min=1e-12)
        loss = loss + options.features * ((ours[name] - theirs[name]) ** 2).mean() / scale
    return loss


def _judged(student, preprocess, held, expected) -> tuple[float, float]:
    """(divergence, agreement) with the original's logits on the held-out frames."""
    with torch.no_grad():
        logits = torch.cat([student(preprocess(b)) for b in batches(held, BATCH)])
    agreed = (logits.argmax(1) == expected.argmax(1)).double().mean()
    return divergence(expected, logits), float(agreed)


def chains(module: Compressed) -> Mapping[str, tuple]:
    """(chain, bias) by call site of every factored layer: what a report or a checkpoint keeps."""
    return {
        node: (place.chain, _array(place.bias))
        for node, place in module.places.items()
        if isinstance(place, Factored)
    }
