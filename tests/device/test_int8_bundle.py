"""A bundle with int8 backends: each answers with its own head, adapts by its head alone, and is checked as integers."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from edgesolve.device import adapt, recalibrate
from edgesolve.device.bench_worker import opener
from edgesolve.device.bundle import open_bundle
from edgesolve.device.cli import main
from edgesolve.device.errors import BackendError, ParityError, UsageError
from edgesolve.device.evaluate import evaluate
from edgesolve.device.runtime import choose_backend, factory_head, open_runtime, source_statistics
from edgesolve.device.store import Store
from edgesolve.device.teacher import mixed, open_teacher
from edgesolve.device.verify import verify
from edgesolve.kernels.moments import Moments

INT8 = ("onnx-int8", "litert-int8")
TINY = Path(__file__).resolve().parents[1] / "tiny_bundle.py"


@pytest.fixture(scope="module")
def folder(bundle_dir, both_backends, tmp_path_factory):
    """The tiny network as a bundle with all four backends; whoever changes it copies it first.

    EDGESOLVE_TEST_INT8_BUNDLE where the host built one before.
    """
    if prebuilt := os.environ.get("EDGESOLVE_TEST_INT8_BUNDLE"):
        return Path(prebuilt)
    pytest.importorskip("torch", reason="the bundle is built here")
    spec = importlib.util.spec_from_file_location("tiny_bundle", TINY)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    out = tmp_path_factory.mktemp("int8") / "bundle"
    command = [*tiny.build_command(bundle_dir.parent), "--out", str(out), "--int8", "add"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"the int8 bundle can't be built:\n{done.stdout}{done.stderr}"
    return out


@pytest.fixture(scope="module")
def bundle(folder):
    return open_bundle(folder)


@pytest.fixture(scope="module", params=INT8)
def name(request):
    return request.param


@pytest.fixture
def changed(folder, tmp_path):
    """changed(name of a file, arrays -> arrays): a copy of the bundle with other arrays in that .npz."""

    def make(file, change):
        copy = shutil.copytree(folder, tmp_path / "copy")
        with np.load(copy / file) as archive:
            arrays = change(dict(archive))
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        (copy / file).write_bytes(buffer.getvalue())
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["files"][file]["sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return open_bundle(copy)

    return make


def with_manifest(bundle, **entries):
    return type(bundle)(bundle.path, {**bundle.manifest, **entries}, bundle.sha256)


@pytest.fixture(scope="module")
def learnt(folder, frames, tmp_path_factory):
    """learnt(backend) -> (state folder, report), made once: copy the folder to change it."""
    made = {}

    def get(backend):
        if backend not in made:
            state = tmp_path_factory.mktemp("learnt") / "state"
            report = recalibrate.run(folder, frames.window, None, state=state, backend=backend)
            made[backend] = state, report
        return made[backend]

    return get


def test_the_answers_are_those_of_the_build(bundle, name, accepts_only):
    known, runtime = bundle.parity(name), open_runtime(bundle, backend=name)
    rows = runtime.rows(known["frames"])
    spread = np.sqrt(np.square(known["rows"] - known["rows"].mean(0)).mean())

    def close(found):
        assert np.sqrt(np.square(found - known["rows"]).mean()) < 1e-3 * spread

    accepts_only(close, rows)
    np.testing.assert_allclose(
        runtime.head(rows), rows @ factory_head(bundle, name).weights + runtime.head.intercept
    )
    assert runtime.parity()["top1"] == 1.0


def test_integer_rows_are_near_the_float_ones_but_not_the_same(bundle, name):
    known = bundle.parity()
    own = bundle.parity(name)
    spread = np.sqrt(np.square(known["rows"] - known["rows"].mean(0)).mean())
    error = np.sqrt(np.square(own["rows"] - known["rows"]).mean()) / spread
    assert 1e-3 < error < 0.2
    np.testing.assert_array_equal(own["frames"], known["frames"])


def test_it_is_as_accurate_as_the_float_backend(bundle, frames, name):
    float_backend = bundle.runtime(name)
    found, before = (
        evaluate(open_runtime(bundle, backend=b), frames.x, frames.y) for b in (name, float_backend)
    )
    assert found["backend"] == name
    assert found["accuracy"] >= before["accuracy"] - 0.02
    assert found["original_accuracy"] == before["original_accuracy"]


def test_verify_checks_every_backend(bundle):
    found = verify(bundle)["backends"]
    assert list(found) == ["onnx", "litert", *INT8]
    for name in INT8:
        assert found[name]["precision"] == "int8" and "adapted_rows" not in found[name]
        assert found[name]["rows_rms"] <= 0.01 and found[name]["teacher"] < 1e-3


@pytest.mark.parametrize("share", [0.002, 0.05])
def test_verify_allows_a_flipped_rounding_but_no_other_rows(changed, name, share):
    file = f"parity.{name}.npz"

    def noisy(arrays):
        rows = arrays["rows"]
        spread = np.sqrt(np.square(rows - rows.mean(0)).mean())
        noise = np.random.default_rng(0).standard_normal(rows.shape)
        return {**arrays, "rows": (rows + share * spread * noise).astype(np.float32)}

    bundle = changed(file, noisy)
    if share < 0.01:
        assert verify(bundle, backends=[name])["backends"][name]["rows_rms"] > 0.001
    else:
        with pytest.raises(ParityError, match=r"rows differ by \d\.\d+% of their spread"):
            verify(bundle, backends=[name])


def test_verify_refuses_another_answer_however_small_the_difference_is_on_average(changed, name):
    file = f"parity.{name}.npz"

    def swapped(arrays):
        logits = arrays["logits"].copy()
        spread = np.sqrt(np.square(logits - logits.mean(0)).mean())
        order = np.argsort(logits, axis=1)
        lead = np.take_along_axis(logits, order, 1)
        near = np.argmin(lead[:, -1] - lead[:, -2])
        logits[near, order[near, -2]] = lead[near, -1] + 0.11 * spread
        return {**arrays, "logits": logits.astype(np.float32)}

    with pytest.raises(ParityError, match=name):
        verify(changed(file, swapped), backends=[name])


def test_auto_takes_what_the_build_prefers(bundle, monkeypatch):
    chosen = with_manifest(bundle, prefer=["onnx-int8", "litert"])
    assert choose_backend(chosen) == "onnx-int8"
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda m: None if m == "onnxruntime" else real(m)
    )
    assert choose_backend(chosen) == "litert"
    old = with_manifest(bundle, prefer=None)
    monkeypatch.undo()
    assert choose_backend(old) == "onnx"
    assert set(bundle.manifest["prefer"]) <= set(bundle.backends)
    assert [bundle.runtime(n) for n in bundle.manifest["prefer"]] == ["onnx", "litert"]


def test_a_backend_that_was_not_built_is_named(bundle_dir):
    with pytest.raises(BackendError, match="the bundle has onnx, litert, not onnx-int8"):
        open_runtime(bundle_dir, backend="onnx-int8")


# -- recalibration -----------------------------------------------------------------------------


def test_the_head_adapts_and_the_backbone_stays(bundle, learnt, frames, name):
    state, report = learnt(name)
    assert (report["decision"], report["mode"], report["backend"]) == ("accepted", "head", name)
    before, after = (open_runtime(bundle, backend=name, state=s) for s in (None, state))
    assert after.generation == 1 and not after.notes
    np.testing.assert_array_equal(before.rows(frames.judge[:8]), after.rows(frames.judge[:8]))
    assert Store(state).current(bundle_sha256=bundle.sha256).statistics is None
    accuracy = [
        (r.logits(frames.judge).argmax(1) == frames.judge_y).mean() for r in (before, after)
    ]
    assert accuracy[1] > accuracy[0] + 0.05


def test_the_head_is_solved_on_integer_rows(bundle, learnt, frames, name):
    """Again here by least squares: three quarters of the window and the source moments, the penalty as rows."""
    state, report = learnt(name)
    reference = bundle.reference(name)
    runtime = open_runtime(bundle, backend=name, state=state)
    options = adapt.Options()
    teacher, source = open_teacher(bundle, name, 1), source_statistics(bundle)
    window = teacher.run(frames.window, report["share"], source.mean, source.var)
    mean, var = mixed(source.mean, source.var, window, report["share"])
    targets = teacher.run(frames.window, 0.0, mean, var).logits
    fitted = np.arange(len(frames.window)) % 4 != 3
    rows, targets = runtime.rows(frames.window)[fitted], targets[fitted].astype(np.float64)
    n = len(rows)
    share = options.mass_head * n / (n + 48.0)
    prefix = "moments."
    stored = {k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)}
    kept = Moments.from_arrays(stored)
    S0, C0, _ = kept.centred()
    mu0, nu0 = kept.means()
    S1 = np.cov(rows.T, bias=True)
    mu1, nu1 = rows.mean(0, dtype=np.float64), targets.mean(0)
    C1 = (targets - nu1).T @ (rows - mu1) / n
    p = share / (1 + share)
    S = (1 - p) * S0 + p * S1 + p * (1 - p) * np.outer(mu1 - mu0, mu1 - mu0)
    C = (1 - p) * C0 + p * C1 + p * (1 - p) * np.outer(nu1 - nu0, mu1 - mu0)
    ridge = bundle.backends[name]["ridge"] * np.trace(S) / len(S)
    expected = np.linalg.solve(S + ridge * np.eye(len(S)), C.T)
    np.testing.assert_allclose(runtime.head.weights, expected, atol=2e-3 * np.abs(expected).max())


def test_statistics_of_an_int8_backbone_are_refused(folder, frames, name, tmp_path):
    options = adapt.Options(mode="backbone")
    with pytest.raises(UsageError, match=f"the statistics of {name} are fixed"):
        recalibrate.run(
            folder, frames.window, None, state=tmp_path / "s", backend=name, options=options
        )


@pytest.mark.parametrize(
    ("taught", "asked"),
    [("onnx", "onnx-int8"), ("onnx-int8", "onnx"), ("onnx-int8", "litert-int8")],
)
def test_a_head_for_other_rows_is_not_used(bundle, learnt, frames, taught, asked):
    state, _ = learnt(taught)
    runtime = open_runtime(bundle, backend=asked, state=state)
    assert runtime.generation == 0
    assert f"was learnt on {taught}" in runtime.notes[0] and "factory head" in runtime.notes[0]
    factory = open_runtime(bundle, backend=asked)
    np.testing.assert_array_equal(runtime.logits(frames.x[:8]), factory.logits(frames.x[:8]))


def test_float_backends_share_what_they_learn(bundle, learnt):
    state, _ = learnt("onnx")
    assert open_runtime(bundle, backend="litert", state=state).generation == 1


def test_back_in_the_factory_condition_its_own_head_returns(
    bundle, folder, learnt, frames, name, tmp_path
):
    state = shutil.copytree(learnt(name)[0], tmp_path / "state")
    report = recalibrate.run(folder, frames.x[:128], None, state=state, backend=name)
    assert (report["decision"], report["reason"]) == ("accepted", "returned")
    runtime = open_runtime(bundle, backend=name, state=state)
    assert runtime.generation == 2
    np.testing.assert_array_equal(runtime.head.weights, factory_head(bundle, name).weights)
    assert Store(state).rollback(bundle.sha256) == 1
    assert open_runtime(bundle, backend=name, state=state).generation == 1


def test_labels_teach_it_too(folder, frames, name, tmp_path):
    report = recalibrate.run(
        folder, frames.window, frames.window_y, state=tmp_path / "s", backend=name
    )
    assert report["decision"] == "accepted" and report["target"] == "labels"


# -- commands ----------------------------------------------------------------------------------


def test_the_commands_take_it_by_name(folder, frames, name, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", x=frames.x[:40], y=frames.y[:40])
    options = ["--backend", name, "--json"]
    state = ["--state", str(tmp_path / "state")]
    given = [str(folder), str(tmp_path / "x.npz"), *state, *options]
    assert main(["predict", *given]) == 0
    items = json.loads(capsys.readouterr().out)["items"]
    expected = open_runtime(folder, backend=name).logits(frames.x[:40]).argmax(1)
    assert [i["top1"] for i in items] == expected.tolist()
    assert main(["eval", *given]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == name
    assert main(["verify", str(folder), *options]) == 0
    assert list(json.loads(capsys.readouterr().out)["backends"]) == [name]
    assert main(["verify", str(folder)]) == 0
    text = capsys.readouterr().out
    assert f"{name} (" in text and "the build's own int8 run" in text
    assert main(["inspect", str(folder)]) == 0
    assert "used by default" in capsys.readouterr().out


def test_status_names_the_backend_that_was_taught(folder, learnt, capsys):
    assert main(["status", str(folder), "--state", str(learnt("onnx-int8")[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "onnx-int8"


def test_bench_opens_it(folder, name):
    subject = opener({"model": str(folder), "backend": name, "state": None, "threads": 1})()
    assert subject.about["backend"] == name and subject.parity()["top1"] == 1.0
    assert subject.call().shape == (1, 4)
