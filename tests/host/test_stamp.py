"""Exported weights are found again, whatever exporters do to constants, and can be re-normalised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgesolve.device.graph import open_graph
from edgesolve.device.patch import Statistics, patched
from edgesolve.host import export, stamp
from edgesolve.host.adaptable import Backbone, Preprocess, Teacher
from edgesolve.host.errors import ModelError
from edgesolve.host.network import cuts, trace
from edgesolve.host.recipe import _statistics
from edgesolve.host.rows import Rows, grid_pool


def twins():
    """Zero biases, and two layers that hold the same numbers: exporters drop and share such constants."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
    )
    for conv in (model[0], model[3]):
        conv.weight.data = model[0].weight.data.clone()
        conv.bias.data.zero_()
    return model


def valid():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU6()),
        *(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)),
    )


class Added(nn.Module):
    """A normalisation that stays a scale and a shift of its own, and a flattening linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.bn, self.fc, self.bn1 = nn.BatchNorm2d(4), nn.Linear(256, 6), nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        x = torch.relu(self.bn(self.one(x) + self.two(x)))
        return self.last(torch.relu(self.bn1(self.fc(x.view(x.size(0), -1)))))


MODELS = {"twins": twins, "valid": valid, "added": Added}
PLAIN = Preprocess(1.0, (0.0,) * 3, (1.0,) * 3)
SCALED = Preprocess(1 / 255, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def parts(model, preprocess):
    network = trace(model.eval(), (3, 8, 8))
    cut = cuts(network)[-1]
    d, *side = cut.shape if len(cut.shape) == 3 else (*cut.shape, 1, 1)
    g = torch.Generator().manual_seed(0)
    draws = [torch.randn(*s, generator=g) for s in ((4, d, 1, 1), (4,), (2, d), (2,), (d,))]
    rows = Rows(*draws, torch.ones(d), grid_pool(*side, 1))
    backbone = Backbone(network, cut.node, rows, preprocess).eval()
    teacher = Teacher(network, cut.node, rows, preprocess).eval()
    return network, backbone, teacher


def exported(backbone, teacher, kind, x):
    channels = {k: [s.start, s.stop] for k, s in teacher.slices.items()}
    true = stamp.stamped(backbone)
    try:
        if kind == "onnx":
            model = export.to_onnx(backbone, (x,), ("frames",), free_batch=True)
        else:
            model = export.to_tflite(backbone, (x,))
        return stamp.locate_and_fill(model, backbone, true, channels)
    finally:
        stamp.restore(backbone, true)


@pytest.mark.parametrize(
    "kind, name, preprocess",
    [
        ("onnx", "twins", PLAIN),
        ("onnx", "twins", SCALED),
        ("onnx", "valid", PLAIN),
        ("onnx", "valid", SCALED),
        ("onnx", "added", SCALED),
        ("litert", "twins", SCALED),
        ("litert", "valid", PLAIN),
        ("litert", "valid", SCALED),
        ("litert", "added", SCALED),
    ],
)
def test_weights_are_found_and_moved(kind, name, preprocess, scrambled, accepts_only):
    model = MODELS[name]()
    if name != "twins":
        scrambled(model)
    network, backbone, teacher = parts(model, preprocess)
    x = torch.randint(0, 256, (2, 8, 8, 3), generator=torch.Generator().manual_seed(0))
    x = x.to(torch.uint8) if preprocess is SCALED else x.float() / 128 - 1
    with torch.no_grad():
        expected = backbone(x).numpy()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    data, table = exported(backbone, teacher, kind, x)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key]), f"{key}: the stamp was left behind"
    assert len(table) == len(backbone.sites)
    assert [e["channels"] for e in table] == [
        [teacher.slices[n.node].start, teacher.slices[n.node].stop] for n, _, _ in backbone.sites
    ]

    def close(answer, expected=expected):
        assert np.abs(answer - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())

    accepts_only(close, open_graph(data, backend=kind)(x.numpy())[0])

    arrays = {k: v.astype(np.float64) for k, v in _statistics(network).items()}
    source = Statistics(*(arrays[k] for k in Statistics.__slots__))
    rng = np.random.default_rng(0)
    target = source.replaced(
        source.mean + 0.3 * rng.normal(size=len(source.mean)),
        source.var * np.exp(0.5 * rng.normal(size=len(source.var))),
    )
    with torch.no_grad():
        statistics = (torch.from_numpy(v).float() for v in (target.mean, target.var))
        moved = teacher(x, torch.full((2,), 0.5), torch.zeros(1), *statistics)[1].numpy()
    assert np.abs(moved - expected).max() > 0.01
    close(open_graph(patched(data, table, source, target), backend=kind)(x.numpy())[0], moved)


def test_a_weight_that_cannot_be_told_apart_is_refused(scrambled):
    _, backbone, teacher = parts(scrambled(valid()), PLAIN)
    channels = {k: [s.start, s.stop] for k, s in teacher.slices.items()}
    true = stamp.stamped(backbone)
    parts_of = [
        getattr(backbone, n).numpy().tobytes() for _, *names in backbone.sites for n in names
    ]
    model = b"--".join(parts_of)
    filled, table = stamp.locate_and_fill(model, backbone, true, channels)
    assert filled == b"--".join(true[n].numpy().tobytes() for _, *ns in backbone.sites for n in ns)
    for bad in (b"--".join(parts_of[1:]), model + parts_of[0]):
        with pytest.raises(ModelError, match=r"can't be located .*--fixed-backbone"):
            stamp.locate_and_fill(bad, backbone, true, channels)
    assert len(table) == 3


def test_stamps_differ_and_come_back(scrambled):
    _, backbone, _ = parts(twins(), PLAIN)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    true = stamp.stamped(backbone)
    stamps = [getattr(backbone, n) for _, *names in backbone.sites for n in names]
    values = torch.cat([s.flatten() for s in stamps])
    assert len(values.unique()) == len(values)
    stamp.restore(backbone, true)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
