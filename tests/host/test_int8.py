"""int8 backends from a float backbone: weights on the grid, heads for integer rows, what the build says of them."""

import dataclasses
import io

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load

from edgesolve.device.graph import open_graph
from edgesolve.host import export, int8
from edgesolve.host.adaptable import Backbone, Preprocess
from edgesolve.host.distill import HeadOptions, distill
from edgesolve.host.network import cuts, trace
from edgesolve.host.rounding import LEVELS, PAIRWISE_LEVELS
from edgesolve.host.sites import sites

pytestmark = pytest.mark.host

PREPROCESS = Preprocess(1 / 255, (0.5,) * 3, (0.25,) * 3)


class Net(torch.nn.Module):
    """A strided layer, a skip, a depthwise and a grouped layer: (n, 3, 12, 12) to (n, 5)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.bn = torch.nn.BatchNorm2d(16)
        self.depthwise = torch.nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.grouped = torch.nn.Conv2d(16, 16, 3, 1, 1, groups=2)
        self.last = torch.nn.Conv2d(16, 24, 3, 1, 1)
        self.linear = torch.nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.relu(x + self.depthwise(x))
        x = torch.relu(self.grouped(x))
        return self.linear(torch.relu(self.last(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def x():
    """Smooth frames (192, 12, 12, 3) uint8 of varied brightness."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (192, 4, 4, 3)) * rng.uniform(0.2, 1, (192, 1, 1, 3))
    return np.kron(coarse, np.ones((1, 3, 3, 1))).astype(np.uint8)


@pytest.fixture(scope="module")
def network():
    model = Net()
    generator = torch.Generator().manual_seed(1)
    model.bn.running_var.uniform_(0.3, 2.0, generator=generator)
    model.bn.running_mean.uniform_(-0.5, 0.5, generator=generator)
    return trace(model.eval(), (3, 12, 12))


@pytest.fixture(scope="module")
def found(network, x):
    held_out = np.arange(len(x)) % 4 == 0
    cut = next(c for c in cuts(network) if c.name == "last")
    return distill(network, cut, PREPROCESS, x, held_out, HeadOptions(n_gates=4, rank=2))


@pytest.fixture(scope="module")
def layers(network, found, x):
    return int8.rounded_layers(network, found.cut.node, PREPROCESS, x, {PAIRWISE_LEVELS, LEVELS})


@pytest.fixture(scope="module")
def made(network, found, x):
    """Both runtimes; the float files are ONNX and TFLite exports of the same backbone."""
    backbone = Backbone(network, found.cut.node, found.rows, PREPROCESS).eval()
    example = torch.from_numpy(x[:2])
    files = {
        "backbone.onnx": export.to_onnx(backbone, (example,), ("frames",), free_batch=True),
        "backbone.tflite": export.to_tflite(backbone, (example[:1],)),
    }
    common = {"teacher_batch": 4, "patch": [1]}
    backends = {
        "onnx": {"backbone": "backbone.onnx", "teacher": "teacher.onnx", "batch": None, **common},
        "litert": {"backbone": "backbone.tflite", "teacher": "t.tflite", "batch": 1, **common},
    }
    y = np.arange(len(x)) % 5
    result = int8.add_int8(network, found, PREPROCESS, x, y, backends, files, x[:8], HeadOptions())
    return result, backends, files


def kind(name):
    return name.removesuffix("-int8")


@pytest.mark.parametrize("levels", [PAIRWISE_LEVELS, LEVELS])
def test_every_layer_before_the_cut_lies_on_the_grid_and_no_other(layers, network, found, levels):
    before = [s for s in sites(network)[0] if s.name != "last" and s.name != "linear"]
    assert set(layers[levels]) == {s.node for s in before}
    for site in before:
        weight = layers[levels][site.node][0].double().numpy()
        assert weight.shape == site.weight.shape
        largest = np.abs(site.weight).reshape(len(weight), -1).max(1)[:, None, None, None]
        steps = weight / (largest / levels)
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
        assert np.abs(steps).max() <= levels + 1e-4
        assert 0 < np.abs(weight - site.weight).max() < 3 * largest.max() / levels


def test_the_bias_keeps_each_channels_mean(layers, network, found, x):
    """The first layer sees the same input in both networks: its mean can be compared in torch."""
    site = sites(network)[0][0]
    inputs = PREPROCESS(torch.from_numpy(x)).double()
    run = torch.nn.functional.conv2d
    options = {"stride": site.stride, "padding": site.padding}
    exact = run(inputs, torch.from_numpy(site.weight), torch.from_numpy(site.bias), **options)
    weight, bias = (v.double() for v in layers[PAIRWISE_LEVELS][site.node])
    got = run(inputs, weight, bias, **options).mean((0, 2, 3))
    plain = run(inputs, weight, torch.from_numpy(site.bias), **options).mean((0, 2, 3))
    expected = exact.mean((0, 2, 3))
    assert (got - expected).abs().max() < 1e-5 < 1e-4 < (plain - expected).abs().max()


def test_without_rounding_it_is_the_backbone(network, found, x):
    frames = torch.from_numpy(x[:8])
    whole = Backbone(network, found.cut.node, found.rows, PREPROCESS).eval()
    same = int8.Rounded(network, found.cut.node, found.rows, PREPROCESS, {})
    torch.testing.assert_close(same(frames), whole(frames), rtol=1e-4, atol=1e-5)


def test_feedback_errs_less_than_the_nearest_point(network, found, x, layers, monkeypatch):
    monkeypatch.setattr(int8, "MOMENT_BYTES", 0)
    args = (network, found.cut.node, PREPROCESS, x, {PAIRWISE_LEVELS})
    nearest = int8.rounded_layers(*args)[PAIRWISE_LEVELS]
    frames = torch.from_numpy(x)
    exact = Backbone(network, found.cut.node, found.rows, PREPROCESS)(frames)
    errors = [
        (int8.Rounded(network, found.cut.node, found.rows, PREPROCESS, some)(frames) - exact)
        .square()
        .mean()
        for some in (layers[PAIRWISE_LEVELS], nearest)
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("name", ["onnx-int8", "litert-int8"])
def test_the_files_hold_integers_and_are_near_the_float_rows(made, name, network, found, x):
    result, backends, _ = made
    entry = result.backends[name]
    assert (entry["runtime"], entry["precision"], entry["patch"]) == (kind(name), "int8", [])
    assert entry["teacher"] == backends[kind(name)]["teacher"]
    rows = int8.integer_rows(open_graph(result.files[entry["backbone"]], backend=kind(name)), x)
    exact = Backbone(network, found.cut.node, found.rows, PREPROCESS)(torch.from_numpy(x)).numpy()
    spread = np.sqrt(np.square(exact - exact.mean(0)).mean())
    error = np.sqrt(np.square(rows - exact).mean()) / spread
    assert 1e-4 < error < 0.1
    if name == "onnx-int8":
        graph = onnx.load_from_string(result.files[entry["backbone"]]).graph
        weights = [numpy_helper.to_array(t) for t in graph.initializer if len(t.dims) == 4]
        large = [w for w in weights if w.size >= 400]
        assert large and all(
            w.dtype == np.int8 and np.abs(w.astype(int)).max() <= 64 for w in large
        )


@pytest.mark.parametrize("name", ["onnx-int8", "litert-int8"])
def test_the_head_is_the_ridge_solution_on_integer_rows(made, name, network, x, accepts_only):
    """Solved again here from the rows themselves, by least squares with the penalty as further rows."""
    result, _, _ = made
    entry = result.backends[name]
    rows = int8.integer_rows(open_graph(result.files[entry["backbone"]], backend=kind(name)), x)
    targets = network.run(PREPROCESS(torch.from_numpy(x))).numpy()
    a, t = rows - rows.mean(0, dtype=np.float64), targets - targets.mean(0, dtype=np.float64)
    weight = entry["ridge"] * np.square(a).sum() / a.shape[1]
    extra = np.sqrt(weight) * np.eye(a.shape[1])
    expected = np.linalg.lstsq(
        np.vstack([a, extra]), np.vstack([t, np.zeros((len(extra), t.shape[1]))]), rcond=None
    )[0]
    answers = a @ expected + targets.mean(0)
    head = load(result.files[entry["head"]])
    shift = rows.mean(0, dtype=np.float64) @ head["weights"] + head["intercept"]

    def check(logits):
        spread = np.sqrt(np.square(t).mean())
        assert np.abs(logits - answers).max() < 1e-3 * spread

    accepts_only(check, a @ head["weights"] + shift)


def test_each_backend_brings_its_own_head_moments_and_parity(made, x):
    result, _, _ = made
    own = []
    for name, entry in result.backends.items():
        head, reference = (load(result.files[entry[k]]) for k in ("head", "reference"))
        parity = np.load(io.BytesIO(result.files[entry["parity"]]))
        graph = open_graph(result.files[entry["backbone"]], backend=kind(name))
        np.testing.assert_array_equal(parity["rows"], int8.integer_rows(graph, x[:8]))
        logits = parity["rows"] @ head["weights"] + head["intercept"]
        np.testing.assert_allclose(parity["logits"], logits, atol=1e-5)
        rows = int8.integer_rows(graph, x)
        np.testing.assert_allclose(reference["moments.mean_x"], rows.mean(0), rtol=1e-5, atol=1e-6)
        assert reference["moments.n"] == len(x) and len(reference["anchor_rows"]) == 48
        own.append(head["weights"])
    assert np.abs(own[0] - own[1]).max() > 0
    assert set(result.files) == {
        entry[key]
        for entry in result.backends.values()
        for key in ("backbone", "head", "reference", "parity")
    }


def test_the_report_says_what_is_used_by_default(made, x):
    result, _, _ = made
    for row, used in zip(result.report, result.prefer, strict=True):
        entry = result.backends[row["backend"]]
        assert used == (row["backend"] if row["preferred"] else kind(row["backend"]))
        assert row["reason"].startswith("yes" if row["preferred"] else "no")
        assert row["bytes"] == len(result.files[entry["backbone"]]) + len(
            result.files[entry["head"]]
        )
        assert row["bytes"] < row["float_bytes"]
        assert 0 <= row["accuracy"] <= 1 and row["milliseconds"] > 0


@pytest.mark.parametrize(
    ("lost", "slower", "preferred"), [(0.0, 0.5, True), (0.02, 0.5, False), (0.0, 1.5, False)]
)
def test_int8_is_the_default_where_it_is_accurate_and_no_slower(
    made, found, x, monkeypatch, lost, slower, preferred
):
    result, backends, files = made
    monkeypatch.setattr(int8, "_milliseconds", lambda graphs, frame: [slower, 1.0])
    head = dataclasses.replace(found, agreement=found.agreement - lost)
    row = int8._row(
        "onnx-int8", result.files, None, "onnx", backends["onnx"], files, found, head, x, None
    )
    assert row["preferred"] is preferred and row["accuracy"] is None


def test_merging_adds_to_the_float_backends_or_replaces_them(made):
    result, backends, files = made
    both, every, prefer = result.merged(backends, files, only=False)
    assert list(both) == ["onnx", "litert", "onnx-int8", "litert-int8"]
    assert set(every) == {*files, *result.files} and prefer == result.prefer
    own, rest, prefer = result.merged(backends, {**files, "teacher.onnx": b"t"}, only=True)
    assert list(own) == ["onnx-int8", "litert-int8"] == list(prefer)
    assert set(rest) == {*result.files, "teacher.onnx"}
