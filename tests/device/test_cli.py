"""The command line: every command, both outputs, every exit code, and bad input that loses nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from edgesolve.device import bench, cli, doctor, warmup
from edgesolve.device.bundle import open_bundle
from edgesolve.device.runtime import open_runtime
from edgesolve.device.store import Store


@pytest.fixture
def edgesolve(capsys):
    """edgesolve(*arguments) -> (exit code, stdout, stderr), in this process."""

    def run(*arguments):
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as end:  # argparse
            code = end.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def refused(edgesolve):
    """refused(code, *arguments) -> the one sentence; --json says the same."""

    def run(code, *arguments):
        found, out, err = edgesolve(*arguments)
        assert found == code, (found, out, err)
        *_, sentence = err.strip().splitlines()
        assert sentence.startswith("edgesolve: ") and "defect" not in sentence
        found, out, _ = edgesolve(*arguments, "--json")
        assert found == code
        said = json.loads(out)
        assert said["exit_code"] == code and said["error"] == sentence.removeprefix("edgesolve: ")
        return sentence

    return run


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def files(frames, tmp_path):
    """Paths of clean and shifted windows, of one frame, and of pictures."""
    from PIL import Image

    np.savez(tmp_path / "clean.npz", x=frames.x[:48], y=frames.y[:48])
    np.savez(tmp_path / "window.npz", x=frames.window[:48], y=frames.window_y[:48])
    np.save(tmp_path / "one.npy", frames.x[:1])
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.fromarray(frames.x[i]).save(tmp_path / "pictures" / f"{i}.png")
    return {p.name: p for p in tmp_path.iterdir()}


# -- every command, for people and for scripts ---------------------------------------------------


def test_inspect(edgesolve, bundle_dir):
    code, out, _ = edgesolve("inspect", bundle_dir)
    assert code == 0 and "16×16×3" in out and "backbone.onnx" in out
    _, out, _ = edgesolve("inspect", bundle_dir, "--json")
    found = json.loads(out)
    assert found["sha256"] == open_bundle(bundle_dir).sha256
    assert found["params"]["after"] < found["params"]["before"]
    assert {e["decision"] for e in found["layers"]} == {"kept", "replaced"}


def test_verify(edgesolve, bundle_dir, both_backends):
    code, out, _ = edgesolve("verify", bundle_dir)
    assert code == 0 and "files match their hashes" in out
    _, out, _ = edgesolve("verify", bundle_dir, "--json")
    found = json.loads(out)
    assert set(found["files"]) == set(open_bundle(bundle_dir).manifest["files"])
    for name in both_backends:
        entry = found["backends"][name]
        assert entry["top1"] == 1.0 and entry["logits"] <= 1e-4 * 30
        assert {"adapted_rows", "teacher", "window_mean", "window_var"} <= set(entry)


def test_predict(edgesolve, bundle_dir, files, frames, state):
    expected = open_runtime(bundle_dir).logits(frames.x[:3])
    e = np.exp(expected - expected.max(1, keepdims=True))
    score = (e / e.sum(1, keepdims=True)).max(1)
    code, out, err = edgesolve("predict", bundle_dir, files["pictures"], "--state", state)
    assert code == 0 and err == "" and [*map(str.split, out.splitlines())][1][0] == "0.png"
    _, out, _ = edgesolve("predict", bundle_dir, files["pictures"], "--state", state, "--json")
    found = json.loads(out)
    assert [i["name"] for i in found["items"]] == ["0.png", "1.png", "2.png"]
    assert [i["top1"] for i in found["items"]] == expected.argmax(1).tolist()
    assert [i["score"] for i in found["items"]] == pytest.approx(score.tolist(), abs=2e-6)
    assert found["generation"] == 0 and found["skipped"] == []
    assert not state.exists(), "predict writes nothing"


@pytest.mark.parametrize("name", ["one.npy", "clean.npz", "pictures/1.png"])
def test_predict_reads(edgesolve, bundle_dir, files, frames, tmp_path, state, name):
    code, out, _ = edgesolve("predict", bundle_dir, tmp_path / name, "--state", state, "--json")
    items = json.loads(out)["items"]
    at = 1 if name.endswith(".png") else 0
    assert code == 0 and len(items) == (48 if name == "clean.npz" else 1)
    expected = open_runtime(bundle_dir).logits(frames.x[at : at + 1]).argmax()
    assert items[0]["top1"] == expected


def test_eval(edgesolve, bundle_dir, files, frames, state, backend):
    options = "--state", state, "--backend", backend
    code, out, _ = edgesolve("eval", bundle_dir, files["clean.npz"], *options)
    assert code == 0 and "the original network" in out
    _, out, _ = edgesolve("eval", bundle_dir, files["clean.npz"], *options, "--json")
    found = json.loads(out)
    answers = open_runtime(bundle_dir, backend=backend).logits(frames.x[:48]).argmax(1)
    assert found["n"] == 48 and found["backend"] == backend
    assert found["accuracy"] == pytest.approx((answers == frames.y[:48]).mean())
    assert sum(e["n"] for e in found["per_class"]) == 48
    hits = sum(e["n"] * e["accuracy"] for e in found["per_class"])
    assert hits / 48 == pytest.approx(found["accuracy"])
    assert 0.8 <= found["agreement"] <= 1.0 and 0.8 <= found["original_accuracy"] <= 1.0


def test_eval_without_labels(edgesolve, bundle_dir, files, state):
    code, out, _ = edgesolve("eval", bundle_dir, files["pictures"], "--state", state, "--json")
    found = json.loads(out)
    assert code == 0 and found["accuracy"] is None and found["agreement"] == 1.0


def test_the_life_of_a_state(edgesolve, bundle_dir, files, state):
    """recalibrate, status, rollback, factory-reset, each as text and as JSON."""

    def say(command, *arguments):
        code, text, _ = edgesolve(command, bundle_dir, *arguments, "--state", state)
        assert code == 0
        return text

    def get(command, *arguments):
        return json.loads(say(command, *arguments, "--json"))

    assert "the factory head in force" in say("status")
    assert get("status")["generation"] == 0 and not state.exists()
    assert say("recalibrate", files["window.npz"]).startswith("accepted: gate_passed. ")
    found = get("status")
    assert (found["generation"], found["previous"], found["decisions"]) == (1, 0, 1)
    assert found["renormalised"] and found["last"]["decision"] == "accepted"
    assert found["relative_gap"] <= 1e-6 and found["drift"]["alarm"]
    assert "generation 1 in force" in say("status")
    assert get("predict", files["one.npy"])["generation"] == 1
    found = get("recalibrate", files["clean.npz"])
    assert (found["decision"], found["reason"], found["generation"]) == ("accepted", "returned", 2)
    assert say("rollback") == "In force: generation 1.\n"
    assert get("rollback") == {"generation": 0, "reason": "operator"}
    assert "In force: the factory head." in say("factory-reset")
    assert get("factory-reset")["generation"] == 0
    assert get("status")["last"]["decision"] == "rollback"
    assert get("predict", files["one.npy"])["generation"] == 0


def test_recalibrate_exit_codes_for_scripts(edgesolve, bundle_dir, files, state):
    base = "recalibrate", bundle_dir
    end = "--state", state, "--exit-code"
    assert edgesolve(*base, files["clean.npz"], *end)[0] == 10
    assert edgesolve(*base, files["window.npz"], *end, "--dry-run")[0] == 11
    assert edgesolve(*base, files["window.npz"], *end)[0] == 0


def test_recalibrate_with_labels(edgesolve, bundle_dir, files, frames, state, tmp_path):
    def run(*options):
        base = "recalibrate", bundle_dir, files["window.npz"], "--state", state, "--dry-run"
        code, out, err = edgesolve(*base, *options, "--json")
        assert code == 0, err
        return json.loads(out)["target"]

    y = frames.window_y[:48]
    np.save(tmp_path / "y.npy", y)
    (tmp_path / "y.json").write_text(json.dumps(y.tolist()))
    (tmp_path / "some.json").write_text(json.dumps({"0": int(y[0]), "5": int(y[5])}))
    for name in ("y.npy", "y.json", "some.json"):
        assert run("--labels", tmp_path / name) == "labels"
    assert run("--use-labels") == "labels"
    assert run() == "renormalised_teacher", "a y in the file is not used unless asked for"


def test_doctor(edgesolve, monkeypatch):
    fine, bad = doctor.Check("disk", "ok", "9 GB"), doctor.Check("cpu", "fault", "386", "Replace.")
    monkeypatch.setattr(doctor, "checks", lambda: [fine])
    code, out, _ = edgesolve("doctor")
    assert code == 0 and "9 GB" in out
    monkeypatch.setattr(doctor, "checks", lambda: [fine, bad])
    code, out, _ = edgesolve("doctor", "--json")
    assert code == 14 and json.loads(out)["faults"] == 1
    assert json.loads(out)["checks"][1]["advice"] == "Replace."


def test_warmup(edgesolve, monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(warmup, "warmup", lambda: [("prox", 0.5)])
    code, out, _ = edgesolve("warmup")
    assert code == 0 and "prox" in out and str(tmp_path) in out
    _, out, _ = edgesolve("warmup", "--json")
    assert json.loads(out)["kernels"] == [{"kernel": "prox", "seconds": 0.5}]
    monkeypatch.setattr(warmup, "warmup", list)
    assert "nothing to compile" in edgesolve("warmup")[1]


def test_bench_passes_every_option_on(edgesolve, bundle_dir, monkeypatch, tmp_path, state):
    seen = {}

    def run_bench(path, **options):
        seen.update(options, path=path)
        return {"verdict": "INVALID", "p50_ms": 1.0}

    monkeypatch.setattr(bench, "run_bench", run_bench)
    monkeypatch.setattr("edgesolve.device.bench_report.table", lambda result: "a table")
    base = "bench", bundle_dir, "--state", state, "--backend", "onnx", "--threads", "3"
    more = "--repeats", "2", "--runs", "9", "--quick", "--against", "o.onnx"
    code, out, _ = edgesolve(*base, *more, "--out", tmp_path / "r.json")
    assert (code, out) == (0, "a table\n")
    expected = {"backend": "onnx", "state": state, "threads": 3, "repeats": 2, "runs": 9}
    assert seen == {**expected, "quick": True, "against": "o.onnx", "path": str(bundle_dir)}
    assert json.loads((tmp_path / "r.json").read_text())["p50_ms"] == 1.0
    assert edgesolve(*base, "--strict")[0] == 12


def test_bench_compare(edgesolve, refused, monkeypatch, tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text('{"p50_ms": 1}')
    assert "bench compare takes two" in refused(2, "bench", "compare", a)
    assert str(b) in refused(7, "bench", "compare", a, b)
    b.write_text('{"p50_ms": 2}')
    found = {"regression": True, "sentence": "slower"}
    monkeypatch.setattr(bench, "compare", lambda *results: {**found, "n": len(results)})
    assert edgesolve("bench", "compare", a, b)[:2] == (13, "slower\n")
    found["regression"] = False
    assert json.loads(edgesolve("bench", "compare", a, b, "--json")[1])["n"] == 2


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_has_an_example(edgesolve, name):
    code, out, _ = edgesolve(name, "--help")
    assert code == 0
    assert f"example: edgesolve {name}" in out and "exit codes: 0 done" in out and "--json" in out


def test_the_overview(edgesolve):
    code, out, _ = edgesolve("--help")
    assert code == 0
    for name in (*cli.COMMANDS, "build"):
        assert f"\n  {name} " in out
    code, out, _ = edgesolve("--version")
    assert code == 0 and out.startswith("edgesolve ")


# -- usage: 2 ------------------------------------------------------------------------------------


def test_an_unknown_command(refused, edgesolve):
    assert "polish: no such command" in refused(2, "polish")
    assert edgesolve()[0] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict"],
        ["predict", "B"],
        ["predict", "B", "x.npy", "--colour"],
        ["predict", "B", "x.npy", "--backend", "tensorrt"],
        ["predict", "B", "x.npy", "--threads", "many"],
        ["recalibrate", "B", "x.npz", "--mode", "all"],
        ["inspect", "B", "C"],
        ["rollback"],
    ],
)
def test_wrong_usage(edgesolve, arguments):
    code, out, err = edgesolve(*arguments)
    assert code == 2 and out == "" and "usage: edgesolve" in err


@pytest.mark.parametrize("option", ["--frames", "--seconds", "--memory-mib"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_budgets_are_positive(refused, bundle_dir, files, state, option, value):
    base = "recalibrate", bundle_dir, files["window.npz"], "--state", state
    assert "must be positive" in refused(2, *base, option, value)


# -- the bundle: 3 -------------------------------------------------------------------------------


@pytest.fixture
def copy(bundle_dir, tmp_path):
    return shutil.copytree(bundle_dir, tmp_path / "copy")


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_damaged_file_is_refused_by_name(refused, copy, how):
    for name in open_bundle(copy).manifest["files"]:
        path = copy / name
        good = path.read_bytes()
        if how == "missing":
            path.unlink()
        else:
            at = len(good) // 2
            flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
            path.write_bytes(flipped if how == "flipped" else good[:at])
        assert f"edgesolve: {name}: " in refused(3, "verify", copy)
        path.write_bytes(good)


@pytest.mark.parametrize("name", ["backbone.onnx", "head.safetensors"])
def test_predict_refuses_damaged_files_too(refused, copy, files, state, name):
    path = copy / name
    good = bytearray(path.read_bytes())
    good[-1] ^= 1
    path.write_bytes(good)
    arguments = "predict", copy, files["one.npy"], "--state", state, "--backend", "onnx"
    assert f"{name}: sha256 is" in refused(3, *arguments)


def test_recalibrate_refuses_a_damaged_reference(refused, copy, files, state):
    path = copy / "reference.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    arguments = "recalibrate", copy, files["window.npz"], "--state", state
    assert "reference.safetensors: sha256 is" in refused(3, *arguments)
    assert Store(state).current() is None


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'),
         "schema_version is 2, this runtime reads 1. Re-export"),
        (lambda text: text[: len(text) // 2], "manifest.json: not valid JSON"),
        (lambda text: "", "manifest.json: not valid JSON"),
        (lambda text: "[]", "schema_version is None"),
        (lambda text: '{"schema_version": 1}', "manifest.json: lacks name, input"),
        (None, "manifest.json cannot be read"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["inspect", "verify", "status"])
def test_a_manifest_that_cannot_be_trusted(refused, copy, change, sentence, command):
    manifest = copy / "manifest.json"
    text = manifest.read_text()
    manifest.unlink()
    if change:
        manifest.write_text(change(text))
    assert sentence in refused(3, command, copy)


def test_a_file_outside_the_bundle_is_never_read(refused, copy, tmp_path):
    (tmp_path / "secret").write_bytes(b"")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["../secret"] = manifest["files"]["head.safetensors"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "points outside the bundle" in refused(3, "verify", copy)


def test_no_such_bundle(refused, tmp_path):
    assert "no such bundle folder" in refused(3, "inspect", tmp_path / "nowhere")


def test_another_answer_than_torch_gave(refused, copy):
    """A head that was exchanged together with its hash: the hashes fit, the answers don't."""
    import hashlib

    from safetensors.numpy import load, save

    arrays = load((copy / "head.safetensors").read_bytes())
    data = save({**arrays, "weights": arrays["weights"] * np.float32(1.01)})
    (copy / "head.safetensors").write_bytes(data)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["head.safetensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "logits differ from torch by" in refused(5, "verify", copy)


# -- runtimes and extras: 6 ----------------------------------------------------------------------


@pytest.fixture
def without(monkeypatch):
    """without(*modules): they can't be found or imported."""

    def hide(*modules):
        find_spec = importlib.util.find_spec

        def find(name, *args):
            return None if name in modules else find_spec(name, *args)

        monkeypatch.setattr(importlib.util, "find_spec", find)
        for name in modules:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def test_no_runtime_at_all(refused, bundle_dir, files, state, without):
    without("onnxruntime", "ai_edge_litert", "tflite_runtime")
    sentence = refused(6, "predict", bundle_dir, files["one.npy"], "--state", state)
    assert "pip install 'edgesolve[onnx]' or 'edgesolve[litert]'" in sentence


@pytest.mark.parametrize(
    "name, modules, advice",
    [
        ("onnx", ["onnxruntime"], "pip install 'edgesolve[onnx]'"),
        (
            "litert",
            ["ai_edge_litert", "tflite_runtime", "tflite_runtime.interpreter"],
            "pip install 'edgesolve[litert]'",
        ),
    ],
)
def test_the_runtime_asked_for(refused, bundle_dir, files, state, without, name, modules, advice):
    without(*modules)
    base = bundle_dir, files["window.npz"], "--state", state, "--backend", name
    for command in ("predict", "recalibrate"):
        assert advice in refused(6, command, *base)
    assert advice in refused(6, "verify", bundle_dir, "--backend", name)


def test_verify_checks_the_runtime_that_is_there(edgesolve, bundle_dir, without, both_backends):
    without("onnxruntime")
    code, out, _ = edgesolve("verify", bundle_dir)
    assert code == 0 and "onnx: skipped, onnxruntime cannot be imported" in out
    assert "litert (" in out


def test_tflite_runtime_beside_numpy_2(refused, bundle_dir, files, state, without, monkeypatch):
    without("ai_edge_litert")
    package, module = types.ModuleType("tflite_runtime"), types.ModuleType("interpreter")
    package.interpreter, module.Interpreter = module, object
    monkeypatch.setitem(sys.modules, "tflite_runtime", package)
    monkeypatch.setitem(sys.modules, "tflite_runtime.interpreter", module)
    monkeypatch.setattr(np, "__version__", "2.2.6")
    arguments = "predict", bundle_dir, files["one.npy"], "--state", state, "--backend", "litert"
    sentence = refused(6, *arguments)
    assert "tflite-runtime was built for NumPy 1; found NumPy 2.2.6" in sentence
    assert "pip install ai-edge-litert, or 'numpy<2'" in sentence


def test_a_backend_that_the_bundle_lacks(refused, copy, files, state):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["backends"]["litert"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    arguments = "predict", copy, files["one.npy"], "--state", state, "--backend", "litert"
    assert "the bundle has onnx, not litert" in refused(6, *arguments)


def test_images_without_pillow(refused, bundle_dir, files, state, without):
    without("PIL")
    sentence = refused(6, "predict", bundle_dir, files["pictures"] / "0.png", "--state", state)
    assert "pip install 'edgesolve[images]'" in sentence


def test_build_without_torch(refused, without, tmp_path):
    without("torch")
    sentence = refused(6, "build", "m.py:m", "--data", "x.npz", "--out", tmp_path / "b")
    assert "edgesolve build needs" in sentence
    assert "which is not installed: pip install 'edgesolve[host]'" in sentence
    assert not (tmp_path / "b").exists()


# -- input: 7 ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, sentence",
    [
        (np.zeros((20, 16, 17, 3), np.uint8), "frames have shape (16, 17, 3), this bundle expects"),
        (np.zeros((20, 16, 16, 1), np.uint8), "(16, 16, 1), this bundle expects (16, 16, 3)"),
        (np.zeros((20, 16, 16), np.uint8), "frames have shape (16, 16)"),
        (np.zeros((20, 16, 16, 3), np.int64), "frames are int64, this bundle expects uint8"),
        (np.zeros((20, 16, 16, 3), np.float32), "frames are float32, this bundle expects uint8"),
        (np.full((20, 16, 16, 3), np.nan, np.float32), "frames are float32"),
        (np.zeros((0, 16, 16, 3), np.uint8), "expected (n, h, w, c) with n >= 1"),
        (np.zeros(20, np.uint8), "expected (n, h, w, c) with n >= 1"),
        (np.array(["a"] * 20), "expected (n, h, w, c)"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "recalibrate", "eval"])
def test_frames_outside_the_contract(refused, bundle_dir, tmp_path, state, x, sentence, command):
    np.save(tmp_path / "x.npy", x)
    assert sentence in refused(7, command, bundle_dir, tmp_path / "x.npy", "--state", state)
    assert not state.exists()


@pytest.fixture
def float_contract(monkeypatch):
    """Frames are float32: the same bundle behind a contract that isn't integer."""
    from edgesolve.device.bundle import Bundle, Contract

    monkeypatch.setattr(
        Bundle, "contract", property(lambda self: Contract((16, 16, 3), np.dtype(np.float32)))
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_refused_with_its_item(refused, bundle_dir, tmp_path, state, float_contract, bad):
    x = np.random.default_rng(0).normal(size=(20, 16, 16, 3))
    x[7, 3, 3, 1] = x[9, 0, 0, 0] = bad
    np.save(tmp_path / "x.npy", x)
    for command in ("predict", "recalibrate", "eval"):
        sentence = refused(7, command, bundle_dir, tmp_path / "x.npy", "--state", state)
        assert "x.npy: item 7 holds NaN or inf (2 of 20 items do)" in sentence or (
            command == "recalibrate" and "item 7 holds NaN or inf (2 of 20 items do)" in sentence
        )


def test_files_that_are_none(refused, bundle_dir, tmp_path, state):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    np.savez(tmp_path / "other.npz", frames=np.zeros((2, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "short.npz", x=np.zeros((20, 16, 16, 3), np.uint8), y=np.zeros(3, int))
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], object), allow_pickle=True)
    x = np.random.default_rng(0).integers(0, 255, (20, 16, 16, 3)).astype(np.uint8)
    np.savez(tmp_path / "named.npz", x=x, y=["cat"] * 20)
    np.savez(tmp_path / "half.npz", x=x, y=np.full(20, 0.5))
    np.savez_compressed(tmp_path / "rotten.npz", x=x)
    rotten = bytearray((tmp_path / "rotten.npz").read_bytes())
    rotten[5000:5100] = bytes(100)
    (tmp_path / "rotten.npz").write_bytes(rotten)
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, x)
    with open(tmp_path / "archive.npy", "wb") as file:
        np.savez(file, x=x)
    sentences = {
        "missing.npz": "no such file or folder",
        "empty": "no images (.png",
        "text.txt": "expected an image (.png",
        "torn.npy": "not a readable NumPy file",
        "torn.npz": "not a readable NumPy file",
        "torn.png": "not a readable image",
        "bad": "none of 1 images could be read. First: a.png",
        "other.npz": "has frames, expected x (n, h, w, c)",
        "short.npz": "20 items in x and 3 labels in y",
        "pickled.npy": "not a readable NumPy file",
        "named.npz": "y holds <U3, expected whole numbers",
        "half.npz": "y holds float64, expected whole numbers",
        "rotten.npz": "not a readable NumPy file",
        "array.npz": "not a readable NumPy file",
        "archive.npy": "not a readable NumPy file",
    }
    for name, sentence in sentences.items():
        found = refused(7, "predict", bundle_dir, tmp_path / name, "--state", state)
        assert sentence in found and name in found


def test_a_corrupt_image_among_good_ones(edgesolve, bundle_dir, files, state):
    folder = files["pictures"]
    good = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(good[: len(good) // 2])
    (folder / "9.jpg").write_bytes(b"not a picture")
    base = "predict", bundle_dir, folder, "--state", state
    code, out, err = edgesolve(*base)
    assert code == 0 and "1.png: not a readable image" in err and "9.jpg: not a readable" in err
    assert "0.png" in out and "2.png" in out and "1.png" not in out
    _, out, _ = edgesolve(*base, "--json")
    found = json.loads(out)
    assert [i["name"] for i in found["items"]] == ["0.png", "2.png"]
    assert len(found["skipped"]) == 2 and all("skipped." in s for s in found["skipped"])


def test_recalibrate_counts_what_it_skipped(edgesolve, bundle_dir, frames, tmp_path, state):
    from PIL import Image

    folder = tmp_path / "window"
    folder.mkdir()
    for i, frame in enumerate(frames.window[:24]):
        Image.fromarray(frame).save(folder / f"{i:02d}.png")
    (folder / "99.png").write_bytes(b"")
    code, out, _ = edgesolve("recalibrate", bundle_dir, folder, "--state", state, "--json")
    found = json.loads(out)
    assert code == 0 and found["n"] == 24 and found["decision"] == "accepted"
    assert len(found["skipped"]) == 1 and found["skipped"][0].startswith("99.png: ")


def test_labels_that_do_not_fit(refused, bundle_dir, files, state, tmp_path):
    base = "recalibrate", bundle_dir, files["window.npz"], "--state", state, "--labels"
    np.save(tmp_path / "short.npy", np.zeros(3, int))
    np.save(tmp_path / "pickled.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "torn.json").write_text("[1, 2")
    (tmp_path / "ragged.json").write_text("[[1], [2, 3]]")
    (tmp_path / "high.json").write_text(json.dumps([9] * 48))
    sentences = {
        "short.npy": "expected 48 integers",
        "pickled.npy": "expected an .npy, a JSON list",
        "torn.json": "expected an .npy, a JSON list",
        "ragged.json": "expected an .npy, a JSON list",
        "missing.json": "expected an .npy, a JSON list",
        "high.json": "outside -1..3",
    }
    for name, sentence in sentences.items():
        assert sentence in refused(7, *base, tmp_path / name)
    np.save(tmp_path / "window.npy", np.load(files["window.npz"])["x"])
    arguments = "recalibrate", bundle_dir, tmp_path / "window.npy", "--state", state
    assert "there are no labels y in it" in refused(7, *arguments, "--use-labels")


def test_labels_outside_the_classes_in_eval(refused, bundle_dir, frames, tmp_path, state):
    np.savez(tmp_path / "high.npz", x=frames.x[:4], y=[0, 1, 2, 4])
    arguments = "eval", bundle_dir, tmp_path / "high.npz", "--state", state
    assert "labels lie in 0..4, expected 0..3" in refused(7, *arguments)


# -- the state: 8 and 9 --------------------------------------------------------------------------


def answers(edgesolve, bundle_dir, one, state):
    code, out, _ = edgesolve("predict", bundle_dir, one, "--state", state, "--json")
    assert code == 0
    return json.loads(out)


@pytest.mark.parametrize("number, text", [(30, "Read-only file system"), (28, "No space left")])
def test_a_state_that_cannot_be_written(
    refused, edgesolve, bundle_dir, files, state, own_state, monkeypatch, number, text
):
    own = own_state()
    factory = answers(edgesolve, bundle_dir, files["one.npy"], state.with_name("other"))
    learnt = answers(edgesolve, bundle_dir, files["one.npy"], own)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    new = state.with_name("new")
    commands = [
        ("recalibrate", own, files["window.npz"]),
        ("recalibrate", new, files["window.npz"]),
        ("factory-reset", new),
        ("rollback", own),
    ]
    for name, where, *rest in commands:
        code, out, err = edgesolve(name, bundle_dir, *rest, "--state", where)
        assert (code, out) == (8, "") and text in err and str(where) in err
    left = answers(edgesolve, bundle_dir, files["one.npy"], own)
    assert left in (learnt, factory), "a rollback that was cut short may have gone back"
    assert answers(edgesolve, bundle_dir, files["one.npy"], new) == factory


@pytest.mark.parametrize("place", ["a file", "/proc/edgesolve"])
def test_a_state_that_can_be_no_folder(refused, edgesolve, bundle_dir, files, tmp_path, place):
    where = tmp_path / "file" if place == "a file" else place
    (tmp_path / "file").write_text("")
    arguments = "recalibrate", bundle_dir, files["window.npz"], "--state", where
    assert str(where) in refused(8, *arguments)
    assert answers(edgesolve, bundle_dir, files["one.npy"], where)["generation"] == 0


def test_a_damaged_state_falls_back_and_says_so(edgesolve, bundle_dir, files, own_state):
    own = own_state()
    (own / "generations" / "0001" / "head.safetensors").write_bytes(b"")
    code, out, err = edgesolve("predict", bundle_dir, files["one.npy"], "--state", own, "--json")
    assert code == 0 and json.loads(out)["generation"] == 0
    assert "Generation 1 is not used: head.safetensors is damaged" in err
    assert edgesolve("status", bundle_dir, "--state", own)[0] == 0
    assert edgesolve("recalibrate", bundle_dir, files["window.npz"], "--state", own)[0] == 0
    assert answers(edgesolve, bundle_dir, files["one.npy"], own)["generation"] == 2


def test_another_process_holds_the_state(refused, bundle_dir, files, state):
    commands = [("recalibrate", files["window.npz"]), ("rollback",), ("factory-reset",)]
    with Store(state).lock():
        for name, *rest in commands:
            sentence = refused(9, name, bundle_dir, *rest, "--state", state)
            assert f"process {os.getpid()} is changing this state" in sentence


def test_a_dry_run_needs_no_lock(edgesolve, bundle_dir, files, state):
    with Store(state).lock():
        arguments = "recalibrate", bundle_dir, files["window.npz"], "--state", state, "--dry-run"
        assert edgesolve(*arguments)[0] == 0


def test_where_a_state_lies_unless_it_is_named(edgesolve, bundle_dir, monkeypatch, tmp_path):
    def where():
        return json.loads(edgesolve("status", bundle_dir, "--json")[1])["state"]

    monkeypatch.delenv("EDGESOLVE_STATE", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert where().startswith(f"{tmp_path}/edgesolve/bundle-")
    monkeypatch.setenv("EDGESOLVE_STATE", str(tmp_path / "here"))
    assert where() == str(tmp_path / "here")


# -- a defect of ours: 1 -------------------------------------------------------------------------


def test_a_defect_is_one_line_unless_v(edgesolve, bundle_dir, monkeypatch):
    def broken(*_):
        raise RuntimeError("bug")

    monkeypatch.setitem(cli.COMMANDS, "inspect", (broken, *cli.COMMANDS["inspect"][1:]))
    broken.__doc__ = "x"
    code, _, err = edgesolve("inspect", bundle_dir)
    assert code == 1 and err.count("\n") == 1 and "a defect: RuntimeError: bug" in err
    with pytest.raises(RuntimeError, match="bug"):
        cli.main(["inspect", str(bundle_dir), "-v"])


# -- a cold start ----------------------------------------------------------------------------------


def test_predict_of_one_image_imports_no_solver(bundle_dir, files, state, python_command):
    script = (
        "import sys\nfrom edgesolve.device.cli import main\n"
        "code = main(sys.argv[1:])\nprint('imported', *sorted(sys.modules))\nsys.exit(code)"
    )
    one = files["pictures"] / "0.png"
    arguments = ["predict", bundle_dir, one, "--state", state, "--json"]
    command = [*python_command, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, imported = done.stdout.strip().splitlines()
    assert json.loads(answer)["items"][0]["name"] == "0.png"
    modules = set(imported.split())
    assert "edgesolve.device.runtime" in modules
    forbidden = {"numba", "torch", "onnx", "scipy"}
    assert not forbidden & modules
    solvers = {"ridge", "newton", "fista", "compiled", "losses", "moments"}
    assert not {f"edgesolve.kernels.{name}" for name in solvers} & modules


def test_a_closed_pipe_is_no_defect(bundle_dir, python_command):
    with contextlib.ExitStack() as stack:
        command = [*python_command, "-m", "edgesolve.device.cli", "inspect", str(bundle_dir)]
        child = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
        child.stdout.close()
        assert b"defect" not in child.stderr.read()
