"""`edgesolve build --decompose` from the command line to a bundle that adapts; interrupted, resumed, refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgesolve.device import cli
from edgesolve.device.bundle import open_bundle
from edgesolve.device.runtime import open_runtime
from edgesolve.device.verify import verify
from edgesolve.host import checkpoint, compress, ruler
from edgesolve.host.errors import ModelError
from edgesolve.host.refine import RefineOptions, check
from edgesolve.host.shards import ALONE, Shards

TESTS = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def arguments(bundle_dir):
    """The tiny trained network and frames that it knows; everything but --out and the target."""
    folder = bundle_dir.parent
    return [
        *(
            "build",
            f"{TESTS / 'tiny_model.py'}:tiny",
            "--weights",
            str(folder / "tiny.safetensors"),
        ),
        *("--data", str(folder / "calibration.npz"), "--mean", ".5,.5,.5", "--std", ".25,.25,.25"),
        *("--split", "4", "--backends", "onnx", "--decompose", "--frames", "256"),
    ]


@pytest.fixture(scope="module")
def built(arguments, tmp_path_factory):
    """(folder, report): layers before the head at about half of their weights."""
    out = tmp_path_factory.mktemp("decomposed") / "b"
    assert cli.main([*arguments, "--out", str(out), "--slower", "--target", "params=0.35"]) == 0
    return out, json.loads((out / "report.json").read_text())


def refused(capsys, *args) -> str:
    assert cli.main([str(a) for a in args]) != 0
    return capsys.readouterr().err


def test_the_target_is_met_and_the_report_says_how(built):
    folder, report = built
    assert report["params"]["after"] <= 0.35 * report["params"]["before"]
    found = report["decomposition"]
    replaced = [s for s in found["steps"] if s["decision"] == "replaced"]
    assert replaced and all(s["params"]["after"] < s["params"]["before"] for s in replaced)
    for step in found["steps"]:
        if step["error"]:
            assert step["error"]["measured"] == pytest.approx(step["error"]["predicted"], rel=1e-6)
    assert 0 <= found["duality_gap"] < found["predicted_divergence"]
    assert len(found["frontier"]) >= 2
    page = (folder / "report.html").read_text()
    assert "Decomposition before the head" in page and replaced[0]["layer"] in page
    assert not folder.with_name("b.work").exists(), "a finished build leaves no checkpoint"


def test_the_bundle_answers_as_torch_and_agrees_with_the_original(built):
    folder, _ = built
    assert verify(open_bundle(folder))["backends"]["onnx"]["top1"] == 1.0
    runtime = open_runtime(folder)
    known = open_bundle(folder).parity()
    original = known["teacher_logits"].argmax(1)
    agreement = (runtime.logits(known["frames"]).argmax(1) == original).mean()
    assert agreement > 0.8, "the head repairs what the decomposition lost"
    rolled = (np.roll(runtime.logits(known["frames"]), 1, 0).argmax(1) == original).mean()
    assert rolled < 0.8


def test_a_device_recalibrates_the_decomposed_backbone(built, bundle_dir, tmp_path, capsys):
    folder, _ = built
    with np.load(bundle_dir.parent / "test.npz") as archive:
        x, y = archive["x"], archive["y"]
    shifted = np.clip(x * 0.4 + 100, 0, 255).astype(np.uint8)
    np.savez(tmp_path / "window.npz", x=shifted[:128])
    np.savez(tmp_path / "judge.npz", x=shifted[128:], y=y[128:])
    state = str(tmp_path / "state")

    def accuracy():
        capsys.readouterr()
        assert (
            cli.main(["eval", str(folder), str(tmp_path / "judge.npz"), "--state", state, "--json"])
            == 0
        )
        return json.loads(capsys.readouterr().out)["accuracy"]

    before = accuracy()
    assert (
        cli.main(["recalibrate", str(folder), str(tmp_path / "window.npz"), "--state", state]) == 0
    )
    assert accuracy() > before + 0.05


def test_a_killed_build_goes_on_and_ends_the_same(built, arguments, tmp_path):
    folder, _ = built
    out = tmp_path / "b"
    command = [*arguments, "--out", str(out), "--slower", "--target", "params=0.35"]
    script = (
        "import os, signal, sys\n"
        "from edgesolve.host import compress\n"
        "fit, count = compress.fit, []\n"
        "def dying(*args):\n"
        "    count.append(1)\n"
        "    if len(count) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return fit(*args)\n"
        "compress.fit = dying\n"
        "from edgesolve.device.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    child = [sys.executable, "-P", "-c", script, *command]
    done = subprocess.run(child, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists(), "a half-built bundle never looks whole"
    work = out.with_name("b.work")
    assert len(list(work.glob("*-*.safetensors"))) == 1, "one layer was finished"
    again = []
    original = compress.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "fit", lambda *args: again.append(1) or original(*args))
        assert cli.main(command) == 0
    steps = json.loads((out / "report.json").read_text())["decomposition"]["steps"]
    assert len(again) == sum(s["error"] is not None for s in steps) - 1
    for name in ("backbone.onnx", "head.safetensors", "statistics.safetensors"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name


def test_another_key_throws_the_checkpoint_away(tmp_path):
    first = checkpoint.Checkpoint(tmp_path / "w", "a")
    first.save_arrays("x", {"v": np.arange(3.0)})
    same = checkpoint.Checkpoint(tmp_path / "w", "a")
    np.testing.assert_array_equal(same.arrays("x")["v"], np.arange(3.0))
    other = checkpoint.Checkpoint(tmp_path / "w", "b")
    assert other.arrays("x") is None
    other.discard()
    assert not (tmp_path / "w").exists()


def test_the_digest_sees_values_shapes_and_types():
    a = np.arange(6.0)
    others = [a + 1e-9, a.reshape(2, 3), a.astype(np.float32)]
    assert len({checkpoint.digest(v) for v in [a, *others]}) == 4
    assert checkpoint.digest({"b": 1, "a": 2}) == checkpoint.digest({"a": 2, "b": 1})


def test_a_target_out_of_reach_names_the_closest(arguments, tmp_path, capsys):
    message = refused(
        capsys, *arguments, "--out", tmp_path / "b", "--slower", "--target", "params=0.01"
    )
    assert "the closest that can be reached here is 0." in message
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--formats", "svd"], "--formats svd: expected tucker2, cp or both."),
        (["--frames", "10"], "--frames 10: at least 64"),
        (["--target", "latency-ms=0"], "expected drop=1.0"),
        (["--split", "nowhere"], "no such place"),
        (["--align", "0"], "--align 0: expected a number of channels"),
        (["--finetune", "-1"], "--finetune -1: expected a number of epochs"),
    ],
)
def test_wrong_options(arguments, tmp_path, capsys, extra, expected):
    assert expected in refused(capsys, *arguments, "--out", tmp_path / "b", *extra)


def test_a_latency_is_judged_by_the_clock(arguments, tmp_path, capsys, monkeypatch):
    out = tmp_path / "b"
    command = [*arguments, "--out", str(out), "--slower", "--align", "1", "--target"]
    said = iter([2e-3, 0.05e-3, 0.1e-3])  # the original, a head, what was built
    monkeypatch.setattr(ruler, "_clocked", lambda model, frame: next(said))
    assert cli.main([*command, "latency-ms=1.9"]) == 0
    tried = json.loads((out / "report.json").read_text())["decomposition"]["tried"]
    assert len(tried) == 1 and tried[0]["unit"] == "ms"
    assert tried[0]["cost"] == pytest.approx(0.15)
    shutil.rmtree(out)
    monkeypatch.setattr(ruler, "_clocked", lambda model, frame: 2e-3)
    assert "the original takes 2 ms here" in refused(capsys, *command, "latency-ms=1.9")
    assert not out.exists()


def test_one_process_only_is_said_before_any_work():
    for options in (RefineOptions(refit=True), RefineOptions(finetune=3)):
        with pytest.raises(ModelError, match="build without torchrun"):
            check(options, Shards(0, 2))
        check(options, ALONE)
    check(RefineOptions(), Shards(0, 2))


@pytest.mark.parametrize("int8", [False, True])
def test_a_size_in_bytes_is_that_of_the_file(arguments, tmp_path, capsys, int8):
    out, share = tmp_path / "b", 0.15 if int8 else 0.4
    command = [*arguments, "--out", str(out), "--slower", "--align", "1"]
    command += ["--int8", "add"] if int8 else ["--refit", "--finetune", "2"]
    whole = tmp_path / "whole.onnx"
    assert "the closest that can be reached takes" in refused(
        capsys, *command, "--target", "bytes=.01"
    )
    assert cli.main([*command, "--target", f"bytes={share}", "--original", str(whole)]) == 0
    report = json.loads((out / "report.json").read_text())["decomposition"]
    budget = share * whole.stat().st_size
    last = report["tried"][-1]
    assert (
        last["cost"] <= budget
        and last["unit"] == "bytes"
        and any(s["decision"] == "replaced" for s in report["steps"])
    )
    name = "backbone.int8.onnx" if int8 else "backbone.onnx"
    # The rows' own filters and the head are in what was predicted, too.
    assert (out / name).stat().st_size == pytest.approx(last["cost"], rel=0.3)
    page = (out / "report.html").read_text()
    assert ("used by default" in page) is int8
    if not int8:
        kinds = [row["kind"] for row in report["refined"]]
        assert set(kinds[:-1]) == {"refit"} and kinds[-1] == "finetune"
        for row in report["refined"]:
            before, after = row["divergence"]["before"], row["divergence"]["after"]
            assert after < before if row["accepted"] else after == before
        assert "What followed the fit" in page
