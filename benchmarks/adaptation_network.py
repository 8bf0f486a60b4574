"""The activity recogniser of the adaptation benchmark, as a user's own file would define it."""

from __future__ import annotations

import torch
from torch import nn


class Activity(nn.Module):
    """(n, 6, 64, 1) accelerations and turn rates to (n, 12) logits."""

    def __init__(self, c: int = 48):
        super().__init__()
        sizes = [(6, c, 5, 2), (c, c, 5, 2), (c, c, 3, 1), (c, c, 3, 1)]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, (k, 1), (s, 1), (k // 2, 0), bias=False) for a, b, k, s in sizes
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _, _ in sizes)
        self.linear = nn.Linear(c, 12)

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return self.linear(x.mean((2, 3)))


def activity() -> nn.Module:
    return Activity()
