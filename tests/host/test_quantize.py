"""int8 and fp16 files: right on this machine's integer kernels, near the float network, the same every time."""

import tempfile

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edgesolve.device.graph import open_graph
from edgesolve.host import export, quantize_onnx, quantize_tflite
from edgesolve.host.errors import ModelError
from edgesolve.host.rounding import LEVELS, PAIRWISE_LEVELS, grid, round_nearest

pytestmark = pytest.mark.host


def on_grid(layer, levels):
    """The weights (T, c, h, w) rounded, and as integers."""
    weight = layer.weight.detach().numpy()
    scales = grid(weight, levels)
    rounded = round_nearest(weight, scales)
    return rounded, np.rint(rounded / scales[:, None, None, None]).astype(np.int8)


class Small(nn.Module):
    """uint8 frames (n, 12, 12, 3) -> (n, 8): a residual block, a pooling that ends in float, an all-bias channel.

    The weights of `first` lie on the grid of ONNX, those of `second` on that of TFLite.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, 2, 1)
        self.second = nn.Conv2d(16, 16, 3, 1, 1)
        self.values = nn.Conv2d(16, 4, 1)
        with torch.no_grad():
            self.values.weight[3] = 0.0
            self.values.bias[3] = 1.0
            for layer, levels in ((self.first, PAIRWISE_LEVELS), (self.second, LEVELS)):
                layer.weight.copy_(torch.from_numpy(on_grid(layer, levels)[0]))

    def forward(self, frames):
        x = frames.to(torch.float32).permute(0, 3, 1, 2).contiguous() * (2.0 / 255.0) - 1.0
        x = torch.relu(self.first(x))
        x = torch.relu(x + self.second(x))
        v = self.values(x)
        return torch.cat([v.mean((2, 3)), (v * v).mean((2, 3))], 1)


@pytest.fixture(scope="module")
def frames():
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (96, 4, 4, 3)) * rng.uniform(0, 1, (96, 1, 1, 3))
    return np.kron(coarse, np.ones((1, 3, 3, 1))).astype(np.uint8)


@pytest.fixture(scope="module")
def small():
    return Small().eval()


def onnx_of(module, frames):
    return export.to_onnx(module, (torch.from_numpy(frames[:2]),), ("frames",), free_batch=True)


@pytest.fixture(scope="module")
def model(small, frames):
    return onnx_of(small, frames)


@pytest.fixture(scope="module")
def tflite(small, frames):
    return export.to_tflite(small, (torch.from_numpy(frames[:1]),))


@pytest.fixture(scope="module")
def truth(small, frames):
    with torch.no_grad():
        return small(torch.from_numpy(frames)).numpy()


@pytest.fixture(scope="module")
def int8(model, frames):
    return quantize_onnx.to_int8_onnx(model, frames)


@pytest.fixture(scope="module")
def int8_tflite(tflite, frames):
    return quantize_tflite.to_int8_tflite(tflite, frames)


def answers(file, frames, backend="onnx"):
    graph = open_graph(file, backend=backend)
    step = len(frames) if backend == "onnx" else 1
    return np.concatenate([graph(frames[i : i + step])[0] for i in range(0, len(frames), step)])


def near(expected, share):
    """Root mean square difference below `share` of the spread, output by output."""

    def check(found):
        assert found.dtype == np.float32
        spread = np.sqrt(np.square(expected - expected.mean(0)).mean(0)).mean()
        assert np.sqrt(np.square(found - expected).mean(0)).max() < share * spread

    return check


def stored(file):
    return {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(file).graph.initializer}


def test_int8_onnx_is_near_the_float_network(int8, frames, truth):
    check = near(truth, 0.04)
    check(answers(int8, frames))
    for mutant in (np.zeros_like(truth), np.float32(1.1) * truth, np.roll(truth, 1, axis=0)):
        with pytest.raises(AssertionError):
            check(mutant)


def test_integer_kernels_agree_with_the_dequantised_graph(int8, frames):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(int8, options, providers=["CPUExecutionProvider"])
    expected = plain.run(None, {"frames": frames})[0]
    near(expected, 0.01)(answers(int8, frames))
    integers = [a for a in stored(int8).values() if a.dtype == np.int8]
    assert max(np.abs(a.astype(int)).max() for a in integers) == PAIRWISE_LEVELS


def test_loud_weights_and_inputs_do_not_overflow(small, frames):
    """All weights and inputs at their largest: what saturates where pairs are added in 16 bits."""
    loud = Small().eval()
    with torch.no_grad():
        loud.first.weight.fill_(1.0)
        loud.second.weight.fill_(0.5)
    bright = np.full_like(frames[:8], 255)
    bright[0] = 0
    file = quantize_onnx.to_int8_onnx(onnx_of(loud, frames), bright)
    with torch.no_grad():
        expected = loud(torch.from_numpy(bright)).numpy()
    np.testing.assert_allclose(answers(file, bright), expected, rtol=0.02, atol=0.02)


def test_int8_keeps_its_kind(model, int8):
    before, after = (onnx.load_from_string(m).graph for m in (model, int8))
    assert [v.name for v in before.input] == [v.name for v in after.input]
    assert [v.name for v in before.output] == [v.name for v in after.output]
    kinds = [n.op_type for n in after.node]
    assert kinds.count("QLinearConv") == 2 and kinds.count("Conv") == 1  # one is all bias
    assert not any("Q" in kind for kind in kinds[kinds.index("ReduceMean") :])


def test_weights_on_the_grid_are_stored_as_they_are(small, int8, int8_tflite):
    first, second = on_grid(small.first, PAIRWISE_LEVELS)[1], on_grid(small.second, LEVELS)[1]
    integers = [a for a in stored(int8).values() if a.dtype == np.int8]
    assert any(np.array_equal(first, a) for a in integers)
    assert not any(np.array_equal(second, a) for a in integers)
    assert np.ascontiguousarray(second.transpose(0, 2, 3, 1)).tobytes() in int8_tflite


def test_same_input_same_bytes_no_noise_no_files(model, frames, int8, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert quantize_onnx.to_int8_onnx(model, (frames[i : i + 32] for i in (0, 32, 64))) == int8
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_fp16_and_dynamic_onnx(model, frames, truth):
    half, dynamic = quantize_onnx.to_fp16_onnx(model), quantize_onnx.to_dynamic_onnx(model)
    found = answers(half, frames)
    near(truth, 5e-3)(found)
    assert not np.array_equal(found, answers(model, frames))
    near(truth, 0.1)(answers(dynamic, frames))
    assert any(a.dtype == np.int8 for a in stored(dynamic).values())
    assert not any(a.dtype == np.float32 and a.size >= 16 for a in stored(half).values())


def test_what_is_kept_in_float(model):
    graph = onnx.load_from_string(model)
    kept = set(quantize_onnx.better_in_float(graph))
    convolutions = [n for n in graph.graph.node if n.op_type == "Conv"]
    assert [n.name in kept for n in convolutions] == [False, False, True]
    assert all(n.name in kept for n in graph.graph.node if n.op_type in ("ReduceMean", "Concat"))
    assert not any(n.name in kept for n in graph.graph.node if n.op_type in ("Add", "Relu"))


def test_int8_tflite(int8_tflite, tflite, frames, truth):
    found = answers(int8_tflite, frames, "litert")
    near(truth, 0.04)(found)
    assert not np.array_equal(found, answers(tflite, frames, "litert"))
    with pytest.raises(AssertionError):
        near(truth, 0.04)(np.roll(found, 1, axis=0))


def test_a_channel_of_bias_alone_needs_float(tflite, frames, truth):
    """Why `better_in_float` looks for one: without it the quantizer clips that channel's bias."""
    file = quantize_tflite.to_int8_tflite(tflite, frames, keep_float=[])
    assert np.abs(answers(file, frames, "litert") - truth)[:, 3].min() > 0.5


def test_tflite_same_bytes_and_other_formats(tflite, int8_tflite, frames, truth):
    again = quantize_tflite.to_int8_tflite(tflite, [f[None] for f in frames])
    assert again == int8_tflite
    near(truth, 5e-3)(answers(quantize_tflite.to_fp16_tflite(tflite), frames, "litert"))
    near(truth, 0.1)(answers(quantize_tflite.to_dynamic_tflite(tflite), frames, "litert"))


def test_refusals(model, tflite, frames):
    with pytest.raises(ValueError, match="keep_float names 'nothing', which is no node"):
        quantize_onnx.to_int8_onnx(model, frames, keep_float=["nothing"])
    with pytest.raises(ModelError, match="frames is empty"):
        quantize_onnx.to_int8_onnx(model, frames[:0])
    with pytest.raises(ModelError, match="frames is empty"):
        quantize_tflite.to_int8_tflite(tflite, frames[:0])
    with pytest.raises(ModelError, match="quantisation failed"):
        quantize_onnx.to_int8_onnx(model, frames[:, :, :, :2])
    graph = onnx.load_from_string(model)
    graph.graph.input.append(onnx.helper.make_tensor_value_info("more", 1, [1]))
    with pytest.raises(ModelError, match="takes 2 inputs, expected one batch"):
        quantize_onnx.to_fp16_onnx(graph.SerializeToString())
