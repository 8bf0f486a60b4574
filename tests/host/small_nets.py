"""Small networks for the tests of closed-form compression: what each has is said beside it."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from edgesolve.host.adaptable import Preprocess
from edgesolve.host.network import trace
from edgesolve.host.sites import sites
from edgesolve.host.walk import Walk

IMAGE = (3, 10, 8)
"""(c, h, w): a transposed axis shows."""
PLAIN = Preprocess(1.0, (0.0,) * 3, (1.0,) * 3)


class Small(nn.Module):
    """A shared input, a residual sum, a concatenation, strides, and a clamp behind the last convolution."""

    def __init__(self, width=8, classes=5):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.one = nn.Conv2d(width, width, 3, padding=1)
        self.two = nn.Conv2d(width, width, 3, padding=1)
        self.left = nn.Conv2d(width, width, 3, stride=(2, 1), padding=1)
        self.right = nn.Conv2d(width, width, 1, stride=(2, 1))
        self.last = nn.Conv2d(2 * width, width, (1, 3), padding=(0, 1))
        self.fc = nn.Linear(width, classes)
        self.fc.weight.data.mul_(10.0)  # answers that differ, as a trained network's do

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.two(F.relu(self.one(x))))
        x = torch.cat([F.relu(self.left(x)), self.right(x)], 1)
        return self.fc(F.relu6(self.last(x)).mean((2, 3)))


class Downsampled(nn.Module):
    """A block whose shortcut is computed after its last convolution, and one that adds what is broadcast."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.short, self.gate = nn.Conv2d(3, 6, 1, 2), nn.Conv2d(6, 6, 1)
        self.level = nn.Parameter(torch.ones(6, 1, 1))
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        y = self.conv2(F.relu(self.conv1(x)))
        x = F.relu(y + self.short(x))
        mean = x.mean((2, 3), keepdim=True)
        x = F.relu(self.gate(x) + mean)
        return self.fc(F.relu(x + self.level).mean((2, 3)))


class Sequence(nn.Module):
    """Conv1d layers, one of them strided, dilated and grouped, then linear layers on three axes and on two."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv1d(3, 8, 5, padding=2)
        self.b = nn.Conv1d(8, 8, 3, stride=2, padding=2, dilation=2, groups=2, bias=False)
        self.bn = nn.BatchNorm1d(8)
        self.token, self.fc = nn.Linear(8, 6), nn.Linear(6, 4, bias=False)

    def forward(self, x):
        x = F.relu(self.bn(self.b(F.relu(self.a(x.flatten(2))))))
        return self.fc(F.relu(self.token(x.transpose(1, 2))).mean(1))


class Odd(nn.Module):
    """One convolution of the given options between two 1×1 layers, everything else plain."""

    def __init__(self, c=6, out=8, **options):
        super().__init__()
        options = {"kernel_size": 3, **options}
        self.before, self.odd = nn.Conv2d(3, c, 1), nn.Conv2d(c, out, **options)
        self.fc = nn.Linear(out, 4)

    def forward(self, x):
        return self.fc(F.relu(self.odd(F.relu(self.before(x)))).mean((2, 3)))


ODD = {
    "plain": {},
    "stride": {"stride": (2, 1), "padding": (1, 0)},
    "dilation": {"dilation": (1, 2), "padding": (0, 2), "stride": (1, 3)},
    "groups": {"groups": 2, "padding": 1, "stride": (1, 2)},
    "rectangular": {"kernel_size": (3, 2), "padding": (2, 1), "bias": False},
    "same": {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "pointwise": {"kernel_size": 1, "stride": (2, 3)},
}


class Perceptron(nn.Module):
    """Flattened frames through linear layers only."""

    def __init__(self, width=12, classes=5):
        super().__init__()
        self.one, self.two = nn.Linear(240, width), nn.Linear(width, classes)

    def forward(self, x):
        return self.two(F.relu(self.one(x.flatten(1))))


NETS = {
    "small": Small,
    "downsampled": Downsampled,
    "sequence": Sequence,
    "perceptron": Perceptron,
    **{name: partial(Odd, **options) for name, options in ODD.items()},
}


def seeded(make, seed=0):
    """The network that `make` builds with this seed, its normalisations' numbers random, in evaluation mode."""
    torch.manual_seed(seed)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for values in (module.weight, module.running_var):
                values.data.uniform_(0.5, 1.5)
            for values in (module.bias, module.running_mean):
                values.data.uniform_(-0.5, 0.5)
    return model.eval()


@cache
def made(name):
    """(model, network) of NETS[name], made once: leave them alone."""
    model = seeded(NETS[name])
    return model, trace(model, IMAGE)


def walk(network, n=48, seed=0, **options):
    """A walk over n smooth random frames: their neighbouring pixels are alike, as those of images are."""
    return Walk(network, PLAIN, images(n, seed), sites(network)[0], **options)


def images(n, seed=0):
    """(n, h, w, c) float32, each of a tint of its own, so that answers differ between them."""
    (c, h, w), draw = IMAGE, np.random.default_rng(seed)
    noise = draw.standard_normal((n, h + 2, w + 2, c)) + draw.standard_normal((n, 1, 1, c)) / 2
    smooth = sum(noise[:, i : i + h, j : j + w] for i in range(3) for j in range(3))
    return (0.5 * smooth).astype(np.float32)
