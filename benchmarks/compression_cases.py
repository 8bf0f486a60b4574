"""The networks that the compression benchmark shrinks, each with its frames: to calibrate on, apart, to test on."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import real_data
import torch
from networks import cifar_resnet, dscnn
from real_data import Labelled
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from edgesolve.host.adaptable import Preprocess
from edgesolve.host.export import to_onnx
from edgesolve.host.network import trace
from edgesolve.host.sites import sites
from edgesolve.host.splice import Compressed
from edgesolve.host.walk import Walk

IMAGENET = Preprocess(1 / 255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HELD_FROM = 6000
"""CIFAR-10 training images from here on are held out, those before it calibrate."""


class Fire(nn.Module):
    def __init__(self, c_in: int, squeeze: int, expand: int):
        super().__init__()
        self.squeeze = nn.Conv2d(c_in, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.squeeze(x))
        return torch.cat([torch.relu(self.expand1x1(x)), torch.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1: (n, 3, 227, 227) BGR minus the mean to (n, 1000) logits."""

    def __init__(self):
        super().__init__()
        self.conv1, self.fire = nn.Conv2d(3, 64, 3, 2), nn.ModuleList()
        c = 64
        for squeeze, expand in ((16, 64), (32, 128), (48, 192), (64, 256)):
            for _ in range(2):
                self.fire.append(Fire(c, squeeze, expand))
                c = 2 * expand
        self.conv10 = nn.Conv2d(c, 1000, 1)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        for i, fire in enumerate(self.fire):
            x = fire(F.max_pool2d(x, 3, 2, ceil_mode=True) if i in (0, 2, 4) else x)
        return torch.relu(self.conv10(x)).mean((2, 3))


class MobileNetV2(nn.Module):
    """MobileNetV2 1.0, normalisation folded: (n, 3, 224, 224) normalised RGB to (n, 1000) logits."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2))
    STAGES += ((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.skips = nn.Conv2d(3, 32, 3, 2, 1), nn.ModuleList(), []
        c = 32
        for wider, c_out, n, first in self.STAGES:
            for stride in (first, *[1] * (n - 1)):
                block, w = nn.ModuleDict(), c * wider
                if wider != 1:
                    block["expand"] = nn.Conv2d(c, w, 1)
                block["dw"] = nn.Conv2d(w, w, 3, stride, 1, groups=w)
                block["project"] = nn.Conv2d(w, c_out, 1)
                self.blocks.append(block)
                self.skips.append(stride == 1 and c == c_out)
                c = c_out
        self.head, self.fc = nn.Conv2d(c, 1280, 1), nn.Linear(1280, 1000)

    def forward(self, x):
        x = F.relu6(self.stem(x))
        for block, skip in zip(self.blocks, self.skips, strict=True):
            y = F.relu6(block["expand"](x)) if "expand" in block else x
            y = block["project"](F.relu6(block["dw"](y)))
            x = x + y if skip else y
        return self.fc(F.relu6(self.head(x)).mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """One pretrained network. `x` calibrates, `held` (frames like them, unseen) and `test` measure."""

    title: str
    model: nn.Module
    shape: tuple[int, int, int]
    preprocess: Preprocess
    x: np.ndarray
    held: np.ndarray
    test: Labelled
    n_probe: int = 256
    n_fisher: int = 512

    @cached_property
    def network(self):
        return trace(self.model, self.shape)

    @cached_property
    def layers(self):
        """(every layer, name -> why one can't be replaced)."""
        return sites(self.network)

    @property
    def found(self):
        return self.layers[0]

    @property
    def weights(self) -> int:
        """Stored in all convolutions and linear layers, biases not counted."""
        return sum(s.weight.size for s in self.found)

    @property
    def macs(self) -> int:
        return sum(s.macs for s in self.found)

    def walk(self, x: np.ndarray | None = None) -> Walk:
        return Walk(self.network, self.preprocess, self.x if x is None else x, self.found)

    def logits(self, module: nn.Module, frames: np.ndarray) -> Tensor:
        size = self.walk().size
        with torch.inference_mode():
            parts = (frames[i : i + size] for i in range(0, len(frames), size))
            return torch.cat([module(self.preprocess(torch.from_numpy(p))) for p in parts])

    @cached_property
    def original(self) -> Compressed:
        """Nothing replaced, normalisation folded."""
        return Compressed(self.network, self.found, {})

    @cached_property
    def original_onnx(self) -> bytes:
        return self.onnx(self.original)

    def onnx(self, module: nn.Module) -> bytes:
        return to_onnx(module, (self.network.example[:1],), ("x",), free_batch=False)

    @cached_property
    def expected(self) -> tuple[float, Tensor]:
        """The original's accuracy (percent) on `test`, and its logits on `held`."""
        return self.accuracy(self.original), self.logits(self.original, self.held)

    def accuracy(self, module: nn.Module) -> float:
        right = self.logits(module, self.test.x).argmax(1).numpy() == self.test.y
        return 100.0 * float(right.mean())


def resnet(depth: int, n: int, n_held: int, n_test: int) -> Case:
    train, test = real_data.cifar_train(), real_data.cifar_test()
    return Case(
        f"ResNet-{depth}, CIFAR-10",
        _loaded(cifar_resnet(depth), f"cifar10_resnet{depth}"),
        (3, 32, 32),
        IMAGENET,
        train[:n],
        train[HELD_FROM : HELD_FROM + n_held],
        test.take(slice(n_test)),
    )


def keyword_spotter() -> Case:
    """600 unlabelled items; the first 480 calibrate."""
    x, test = real_data.keywords()
    model = _loaded(dscnn(), "kws_dscnn_mlperftiny")
    plain = Preprocess(1.0, (0.0,), (1.0,))
    return Case("DS-CNN, keywords", model, (1, 49, 10), plain, x[:480], x[480:], test)


def squeezenet(n: int, n_held: int, n_test: int) -> Case:
    x, held, test = _imagenet(227, n, n_held, n_test)
    bgr = Preprocess(1.0, (104.0, 117.0, 123.0), (1.0, 1.0, 1.0))
    model = _loaded(SqueezeNet(), "imagenet_squeezenet11_fp16src")
    x, held, test = (
        x[..., ::-1].copy(),
        held[..., ::-1].copy(),
        Labelled(test.x[..., ::-1].copy(), test.y),
    )
    return Case("SqueezeNet 1.1, ImageNet sample", model, (3, 227, 227), bgr, x, held, test, 64, 64)


def mobilenet(n: int, n_held: int, n_test: int) -> Case:
    model = _loaded(MobileNetV2(), "imagenet_mobilenetv2_torch_from_int8")
    parts = _imagenet(224, n, n_held, n_test)
    return Case(
        "MobileNetV2, ImageNet sample",
        model,
        (3, 224, 224),
        IMAGENET,
        *parts,
        n_probe=48,
        n_fisher=64,
    )


def _loaded(model: nn.Module, name: str) -> nn.Module:
    model.load_state_dict(load_file(real_data.weights(name)))
    return model.eval()


def _imagenet(size: int, n: int, n_held: int, n_test: int):
    """(calibration, held-out frames, test): disjoint parts of the 1,000 images, by a fixed permutation."""
    from PIL import Image

    with np.load(real_data.folder() / "imagenet_sample" / "images.npz") as archive:
        jpeg, at, y = (archive[k] for k in ("jpeg", "offsets", "y"))
    pick = np.random.default_rng(0).permutation(len(y))[: n + n_held + n_test]

    def image(i: int) -> np.ndarray:
        whole = Image.open(io.BytesIO(jpeg[at[i] : at[i + 1]].tobytes())).convert("RGB")
        left, top = ((side - size) // 2 for side in whole.size)
        return np.asarray(whole.crop((left, top, left + size, top + size)))

    x = np.stack([image(i) for i in pick])
    test = Labelled(x[n + n_held :], y[pick[n + n_held :]].astype(np.int64))
    return x[:n], x[n : n + n_held], test
