"""The pretrained networks of the main job, as a user's own file would define them.

    edgesolve build benchmarks/networks.py:cifar_resnet(56) --weights cifar10_resnet56.safetensors …

The attribute names are those of the published weights' state dictionaries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; where the shape changes the shortcut subsamples and pads channels with
    zeros (option A of He et al. 2015), so that it has no parameters."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.pad = stride, (c_out - c_in) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return torch.relu(x + y)


class CifarResNet(nn.Module):
    """(n, 3, 32, 32) normalised RGB to (n, classes) logits; three stages of `blocks` blocks."""

    def __init__(self, blocks: int, classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, 1)
        self.layer2 = self._stage(blocks, 16, 32, 2)
        self.layer3 = self._stage(blocks, 32, 64, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(blocks: int, c_in: int, c_out: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(c_in, c_out, stride), *rest)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def cifar_resnet(depth: int) -> nn.Module:
    """ResNet-20, 32, 44 or 56: depth = 6 x blocks + 2."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6 n + 2 (8, 14, 20, …), got {depth}.")
    return CifarResNet((depth - 2) // 6)


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding, which may be asymmetric."""

    def forward(self, x):
        pad = []
        for axis in (1, 0):  # F.pad takes the last axis first
            size, k, s = x.shape[2 + axis], self.kernel_size[axis], self.stride[axis]
            total = max((-(-size // s) - 1) * s + k - size, 0)
            pad += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pad))


class DSCNN(nn.Module):
    """MLPerf Tiny's keyword spotter: (n, 1, 49, 10) MFCC to (n, classes) logits."""

    def __init__(self, classes: int = 12, c: int = 64, blocks: int = 4, eps: float = 1e-3):
        super().__init__()
        self.conv, self.bn = SameConv2d(1, c, (10, 4), (2, 2)), nn.BatchNorm2d(c, eps)
        self.dw = nn.ModuleList(SameConv2d(c, c, 3, groups=c) for _ in range(blocks))
        self.dwbn = nn.ModuleList(nn.BatchNorm2d(c, eps) for _ in range(blocks))
        self.pw = nn.ModuleList(nn.Conv2d(c, c, 1) for _ in range(blocks))
        self.pwbn = nn.ModuleList(nn.BatchNorm2d(c, eps) for _ in range(blocks))
        self.fc = nn.Linear(c, classes)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        for dw, dwbn, pw, pwbn in zip(self.dw, self.dwbn, self.pw, self.pwbn, strict=True):
            x = torch.relu(pwbn(pw(torch.relu(dwbn(dw(x))))))
        return self.fc(x.mean((2, 3)))


def dscnn() -> nn.Module:
    return DSCNN()
