"""MODEL and DATA: every form is read, everything else refused in one sentence, nothing unpickled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgesolve.device.errors import InputError
from edgesolve.host.errors import DataError, ModelError
from edgesolve.host.load import load_calibration, load_model

SOURCE = """
import torch
from torch import nn

def net(width=4, *, bias=True):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width, bias=bias))

def number():
    return 3

constant = 5
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "my_nets.py"
    path.write_text(SOURCE)
    return path


def evil(path):
    """A pickle that would leave a trace if it were run."""
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(path) + ".ran", "w"))

    with open(path, "wb") as file:
        pickle.dump({"state_dict": Evil()}, file)
    return path


# -- models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, width, bias",
    [("net", 4, True), ("net()", 4, True), ("net(7)", 7, True), ("net(3, bias=False)", 3, False)],
)
def test_a_callable_of_a_file(source, call, width, bias):
    model = load_model(f"{source}:{call}")
    assert not model.training
    assert model[1].out_features == width and (model[1].bias is not None) == bias


def test_a_callable_of_a_module(monkeypatch, source):
    monkeypatch.syspath_prepend(str(source.parent))
    assert load_model("my_nets:net(5)")[1].out_features == 5
    assert isinstance(load_model("torch.nn:Linear(2, 3)"), nn.Linear)


def test_a_pt2_file(tmp_path):
    model = nn.Linear(3, 2)
    path = str(tmp_path / "model.pt2")
    torch.export.save(torch.export.export(model, (torch.zeros(2, 3),)), path)
    x = torch.randn(2, 3)
    torch.testing.assert_close(load_model(path).module()(x), model(x))
    with pytest.raises(ModelError, match=r"--weights doesn't apply to a \.pt2 file"):
        load_model(path, "w.safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "checkpoint.pth"])
def test_weights(source, tmp_path, suffix):
    torch.manual_seed(3)
    state = load_model(f"{source}:net").state_dict()
    path = tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if "checkpoint" in suffix else state, path)
    torch.manual_seed(4)
    model = load_model(f"{source}:net", str(path))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    "spec, sentence",
    [
        ("net", "expected file.py:callable"),
        ("{file}", "expected file.py:callable"),
        ("{file}:missing", "has no callable 'missing'"),
        ("{file}:constant", "has no callable 'constant'"),
        ("{file}:number", "returned int, expected a torch.nn.Module"),
        ("{file}:net(", "expected a name, or a call with literal arguments"),
        ("{file}:net(open('x'))", "expected a name, or a call with literal arguments"),
        ("{file}:__import__('os').getcwd()", "expected a name, or a call with literal arguments"),
        ("nowhere.py:net", "nowhere.py: no such file"),
        ("{file}:net(width='wide')", "failed: TypeError"),
        ("{broken}:net", "cannot be imported (ModuleNotFoundError: No module named 'no_such')"),
        ("no_such_module:net", "no_such_module: cannot be imported"),
        ("nowhere.pt2", "nowhere.pt2: not a readable torch.export file"),
    ],
)
def test_a_model_that_is_none(source, spec, sentence):
    broken = source.with_name("broken.py")
    broken.write_text("import no_such\n")
    with pytest.raises(ModelError) as found:
        load_model(spec.format(file=source, broken=broken))
    assert sentence in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "torn", "nowhere", "pickle"])
def test_weights_that_do_not_fit(source, tmp_path, change):
    state = dict(load_model(f"{source}:net").state_dict())
    path = tmp_path / ("w.pt" if change == "pickle" else "w.safetensors")
    sentences = {
        "missing": r"1 missing \['1.bias'\]",
        "unexpected": r"1 unexpected \['2.weight'\]",
        "shape": "don't fit the model: size mismatch for 1.weight",
        "torn": "cannot be read as weights",
        "nowhere": "no such weights file",
        "pickle": "cannot be read as weights",
    }
    if change == "missing":
        del state["1.bias"]
    if change == "unexpected":
        state["2.weight"] = torch.zeros(1)
    if change == "shape":
        state["1.weight"] = torch.zeros(9, 12)
    if change == "pickle":
        evil(path)
    elif change == "torn":
        path.write_bytes(b"{" * 100)
    elif change != "nowhere":
        save_file(state, path)
    with pytest.raises(ModelError, match=sentences[change]) as found:
        load_model(f"{source}:net", str(path))
    assert "w." in str(found.value)
    assert not (tmp_path / "w.pt.ran").exists(), "the pickle was run"


def test_weights_without_batch_counters_fit(tmp_path):
    (tmp_path / "n.py").write_text("from torch import nn\ndef n(): return nn.BatchNorm1d(3)\n")
    state = {k: v for k, v in nn.BatchNorm1d(3).state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "w.safetensors")
    model = load_model(f"{tmp_path / 'n.py'}:n", str(tmp_path / "w.safetensors"))
    assert isinstance(model, nn.BatchNorm1d)


# -- data ---------------------------------------------------------------------------------------------


@pytest.fixture
def x():
    return np.random.default_rng(0).integers(0, 256, (70, 6, 5, 3)).astype(np.uint8)


def test_arrays_are_read(tmp_path, x):
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(70) % 3)
    assert load_calibration(str(tmp_path / "x.npy")).y is None
    found = load_calibration(str(tmp_path / "x.npz"))
    np.testing.assert_array_equal(found.x, x)
    assert len(found) == 70 and found.y.tolist()[:4] == [0, 1, 2, 0]


def test_grey_frames_gain_a_channel_and_doubles_become_floats(tmp_path, x):
    np.save(tmp_path / "grey.npy", x[..., 0])
    assert load_calibration(str(tmp_path / "grey.npy")).x.shape == (70, 6, 5, 1)
    np.save(tmp_path / "double.npy", x / 255)
    found = load_calibration(str(tmp_path / "double.npy")).x
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, x / 255, rtol=1e-6)


def test_a_folder_of_images(tmp_path, x):
    from PIL import Image

    for i, frame in enumerate(x):
        folder = tmp_path / "images" / ("cats" if i % 2 else "birds")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(folder / f"{i:02d}.png")
    found = load_calibration(str(tmp_path / "images"))
    assert found.y.tolist() == [0] * 35 + [1] * 35
    np.testing.assert_array_equal(found.x[0], x[0])
    np.testing.assert_array_equal(found.x[35], x[1])


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda x: x[:63], "63 calibration items, at least 64 are needed"),
        (lambda x: np.repeat(x[:1], 70, 0), "all 70 items are equal"),
        (lambda x: np.zeros_like(x), "all 70 items are equal"),
        (lambda x: x[:, 0, 0], r"x has shape \(70, 3\), expected \(n, height, width, channels\)"),
        (lambda x: x[:, None], r"x has shape \(70, 1, 6, 5, 3\)"),
        (lambda x: np.where(x == x[7, 1, 1, 1], np.nan, x), "item . holds NaN or inf"),
        (
            lambda x: np.where(np.arange(70)[:, None, None, None] == 9, np.inf, x),
            "item 9 holds NaN",
        ),
    ],
)
def test_data_that_cannot_be_used(tmp_path, x, change, sentence):
    np.save(tmp_path / "x.npy", change(x))
    with pytest.raises(DataError, match=sentence) as found:
        load_calibration(str(tmp_path / "x.npy"))
    assert "x.npy" in str(found.value) and found.value.exit_code == 7


def test_files_that_are_none(tmp_path):
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}] * 70, object), allow_pickle=True)
    evil(tmp_path / "evil.npy")
    (tmp_path / "empty").mkdir()
    for name in ("pickled.npy", "evil.npy", "empty", "nowhere.npz"):
        with pytest.raises(InputError, match=name):
            load_calibration(str(tmp_path / name))
    assert not (tmp_path / "evil.npy.ran").exists(), "the pickle was run"
