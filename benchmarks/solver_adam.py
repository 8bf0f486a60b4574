"""What the convex head is compared with: two-layer ReLU heads trained by Adam on the labels.

The loss is the cross-entropy, or the squared error that the convex head has; the grid holds both.
Rates, decays and stopping times are chosen by accuracy on held-out parts of one more draw of samples, so that Adam
gets more labels than the convex head, whose ridge comes from leaving one out of the samples it has. "Best of the
grid" is the setting with the highest accuracy on the *judges* in that draw: nobody could choose it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from solver_fewshot import CLASSES, PER_CLASS, Draw
from torch import nn

PILOT = 1000
"""Seed of the draw on which settings are chosen."""

EPOCHS = {10: 60, 25: 40, 50: 25, 100: 20}
FOLDS = {10: 3, 25: 2, 50: 1, 100: 1}
"""How often a fifth of the pilot's samples is held out: 50 judged samples at least."""


class Setting(NamedTuple):
    lr: float
    decay: float
    squared: bool
    half: bool
    """Stopped after half of the epochs."""


class Head(nn.Module):
    """1x1 convolution, ReLU, mean over positions, linear; z (n, d) is the vector head."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.first, self.second = nn.Linear(d, hidden), nn.Linear(hidden, CLASSES)

    def forward(self, z):
        h = torch.relu(self.first(z))
        return self.second(h.mean(dim=1) if z.ndim == 3 else h)


def hidden_of(stored: int, d: int) -> int:
    """The hidden units that a two-layer head of about `stored` numbers has."""
    return (stored - CLASSES) // (d + 1 + CLASSES)


def grid(quick: bool) -> list[tuple[float, float]]:
    """(rate, decay): AdamW's decoupled decay, times the rate at every step."""
    if quick:
        return [(1e-2, 1e-2)]
    return [(lr, decay) for lr in (3e-3, 1e-2, 3e-2) for decay in (1e-2, 1.0)]


def choose(pilot: Draw, z: np.ndarray, k: int, hidden: int, quick: bool) -> dict[str, Setting]:
    """Settings by name: `chosen`, `chosen_ce` and `chosen_sq` with either loss alone, `best`.

    z : all rows of the pilot, (n, p, d) or (n, d).
    """
    n, held_out, judged = CLASSES * k, {}, {}
    parts = np.array_split(np.random.default_rng(PILOT).permutation(k), 5)
    parts = parts[: 1 if quick else FOLDS[k]]
    for squared, (lr, decay) in itertools.product((False, True), grid(quick)):
        for part in parts:
            out = (np.asarray(part)[:, None] * CLASSES + np.arange(CLASSES)).ravel()
            fit = np.setdiff1d(np.arange(n), out)
            for half, head in train(z[fit], pilot.y[fit], hidden, lr, decay, squared, EPOCHS[k]):
                setting = Setting(lr, decay, squared, half)
                hit = logits_of(head, z[out]).argmax(axis=1) == pilot.y[out]
                held_out.setdefault(setting, []).append(float(hit.mean()))
                if setting not in judged:
                    judged[setting] = pilot.judged(logits_of(head, z[CLASSES * PER_CLASS :]))
    mean = {setting: float(np.mean(found)) for setting, found in held_out.items()}
    return {
        "chosen": max(mean, key=mean.get),
        "chosen_ce": max((s for s in mean if not s.squared), key=mean.get),
        "chosen_sq": max((s for s in mean if s.squared), key=mean.get),
        "best": max(judged, key=judged.get),
    }


def final(draw: Draw, z: np.ndarray, k: int, hidden: int, setting: Setting) -> tuple[float, float]:
    """(accuracy on the judges, CPU seconds) of one setting on all samples of a draw."""
    began, n = time.process_time(), CLASSES * k
    lr, decay, squared, _ = setting
    runs = train(z[:n], draw.y[:n], hidden, lr, decay, squared, EPOCHS[k], draw.seed)
    head = next(h for half, h in runs if half == setting.half)
    seconds = time.process_time() - began
    return draw.judged(logits_of(head, z[CLASSES * PER_CLASS :])), seconds


def train(z, y, hidden, lr, decay, squared, epochs, seed=0) -> Iterator[tuple[bool, Head]]:
    """Yields (True, head) after half of the epochs and (False, head) at the end; cosine rate, batches of 32."""
    torch.manual_seed(seed)
    head, x, t = Head(z.shape[-1], hidden), torch.from_numpy(z), torch.from_numpy(y)
    target = nn.functional.one_hot(t, CLASSES).float()
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        for i in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            answer = head(x[i])
            if squared:
                loss = 0.5 * (answer - target[i]).square().sum() / len(i)
            else:
                loss = nn.functional.cross_entropy(answer, t[i])
            loss.backward()
            optimizer.step()
        schedule.step()
        if epoch + 1 in (epochs // 2, epochs):
            yield epoch + 1 < epochs, head


def logits_of(head: Head, z: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return torch.cat([head(part) for part in torch.from_numpy(z).split(100)]).numpy()
