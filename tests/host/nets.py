"""Small networks, one for every shape of graph that the host must handle."""

import torch
from torch import nn
from torch.nn import functional as F


class BlockA(nn.Module):
    """A CIFAR residual block whose shortcut drops positions and adds empty channels."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.extra = stride, (c_out - c_in) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.extra:
            s = self.stride
            x = F.pad(x[:, :, ::s, ::s], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """He et al. 2015, section 4.2; (n, 3, 32, 32) to (n, 10)."""

    def __init__(self, n):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)

        def stage(c_in, c_out, stride):
            return nn.Sequential(
                BlockA(c_in, c_out, stride), *(BlockA(c_out, c_out, 1) for _ in range(n - 1))
            )

        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def resnet20():
    return CifarResNet(3)


# -- fronts: (n, 3, 12, 12) to something; a tail makes each a whole network --------------------------


class Shared(nn.Module):
    """One convolution at two places, each with a normalisation of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.a, self.b = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.a(self.conv(x)) * 0.5 + self.b(self.conv(x.flip(3)))


class AfterAdd(nn.Module):
    """A normalisation that no convolution precedes."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.one(x) + self.two(x))


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        x = self.stem(x)
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class PadFirst(nn.Module):
    """TensorFlow's "same" padding: more on the right and below."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(F.pad(x, (0, 1, 0, 1))))


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x), F.max_pool2d(x, 3, 1, 1)], 1)


def convolution(c_out=6, **options):
    options = {"kernel_size": 3, **options}
    return nn.Sequential(nn.Conv2d(3, c_out, **options), nn.BatchNorm2d(c_out))


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(432, 10, bias=False), nn.BatchNorm1d(10))


def transposed():
    return nn.Sequential(nn.ConvTranspose2d(3, 6, 2, stride=2), nn.BatchNorm2d(6))


FRONTS = {
    "plain": convolution,
    "no bias": lambda: convolution(bias=False),
    "stride": lambda: convolution(stride=2, padding=1),
    "dilation": lambda: convolution(dilation=2, padding=2),
    "groups": lambda: convolution(groups=3),
    "depthwise": lambda: convolution(3, groups=3, padding=1),
    "rectangular": lambda: convolution(kernel_size=(3, 1), stride=(1, 2), padding=(1, 0)),
    "asymmetric padding": PadFirst,
    "linear": linear,
    "after an addition": AfterAdd,
    "pre-activation": PreActivation,
    "shared": Shared,
    "concatenation": Concatenated,
    "transposed": transposed,
    "eps and no affine": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0.1, affine=False)
    ),
}


class Whole(nn.Module):
    """front -> ReLU -> mean over positions -> linear."""

    def __init__(self, front, classes=5):
        super().__init__()
        self.front, self.relu = front, nn.ReLU()
        with torch.no_grad():
            d = self.front.eval()(torch.zeros(2, 3, 12, 12)).shape[1]
        self.tail = nn.Linear(d, classes)

    def features(self, x):
        return self.relu(self.front(x))

    def forward(self, x):
        z = self.features(x)
        return self.tail(z.mean((2, 3)) if z.ndim == 4 else z)


def whole(name):
    torch.manual_seed(0)
    return Whole(FRONTS[name]())


def plain_cnn():
    """No normalisation anywhere, as a network whose normalisation was folded away."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


class ViewNet(nn.Module):
    """Flattens by a size that it reads from its input."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.fc1, self.fc2 = nn.Linear(200, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.second(self.body(x))
        x = x.view(x.size(0), -1)
        return self.fc2(F.relu(self.fc1(x)))
