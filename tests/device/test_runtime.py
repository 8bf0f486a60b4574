"""Opening a bundle: every way of asking gives the same rows; what can't be trusted is refused."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest

from edgesolve.device import graph
from edgesolve.device.bundle import Contract, open_bundle
from edgesolve.device.errors import BackendError, BundleError, InputError
from edgesolve.device.evaluate import evaluate
from edgesolve.device.runtime import Head, choose_backend, factory_head, open_runtime
from edgesolve.device.store import Store


@pytest.fixture
def bundle(bundle_dir):
    return open_bundle(bundle_dir)


def test_the_answers_are_those_that_torch_gave(bundle, backend, accepts_only):
    known = bundle.parity()
    runtime = open_runtime(bundle, backend=backend)
    limit = 1e-4 * max(1.0, np.abs(known["logits"]).max())

    def close(logits):
        assert np.abs(logits - known["logits"]).max() <= limit

    accepts_only(close, runtime.logits(known["frames"]))
    np.testing.assert_allclose(runtime.rows(known["frames"]), known["rows"], atol=1e-4)
    assert runtime.parity()["max_abs"] <= limit and runtime.parity()["top1"] == 1.0


def test_backends_agree_with_each_other(bundle, frames, both_backends):
    one, other = (open_runtime(bundle, backend=b).logits(frames.x[:48]) for b in both_backends)
    assert np.abs(one - other).max() <= 1e-4 * np.abs(one).max()
    assert (one.argmax(1) == other.argmax(1)).all()


@pytest.mark.parametrize("n", [1, 5, 32, 33, 70])
def test_rows_do_not_depend_on_the_batch(bundle, frames, backend, n):
    runtime = open_runtime(bundle, backend=backend)
    one_by_one = np.concatenate([runtime.rows(frames.x[i : i + 1]) for i in range(n)])
    np.testing.assert_allclose(runtime.rows(frames.x[:n]), one_by_one, atol=2e-5)


def test_rows_are_copies(bundle, frames, backend):
    runtime = open_runtime(bundle, backend=backend)
    first = runtime.rows(frames.x[:1])
    kept = first.copy()
    runtime.rows(frames.x[1:2])
    np.testing.assert_array_equal(first, kept)


def test_an_example_fits_the_contract(bundle):
    runtime = open_runtime(bundle)
    x = runtime.example(70)
    assert bundle.contract.check(x).shape == (70, 16, 16, 3) and x.flags.c_contiguous
    np.testing.assert_array_equal(x[:6], runtime.example(6))


def test_the_contract():
    contract = Contract((2, 3, 1), np.dtype(np.float32))
    one = np.ones((2, 3, 1))
    assert contract.check(one).shape == (1, 2, 3, 1) and contract.check(one).dtype == np.float32
    assert contract.check(np.ones((5, 2, 3, 1), np.float16)).shape == (5, 2, 3, 1)
    for bad in (np.ones((5, 3, 2, 1)), np.ones((2, 3)), np.ones((5, 2, 3, 1), np.int64)):
        with pytest.raises(InputError, match="this bundle expects"):
            contract.check(bad)
    with pytest.raises(InputError, match="clip: item 0 holds NaN or inf"):
        contract.check(np.full((2, 3, 1), np.inf), "clip")


def test_the_backend_is_the_first_in_the_bundle_that_is_installed(bundle, monkeypatch):
    import importlib.util

    have = {"tflite_runtime"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in have or None)
    assert choose_backend(bundle) == "litert"
    have.add("onnxruntime")
    assert choose_backend(bundle) == "onnx"
    have.clear()
    with pytest.raises(BackendError, match="neither onnxruntime nor ai-edge-litert"):
        choose_backend(bundle)
    assert choose_backend(bundle, "litert") == "litert", "asked for by name: it says itself why not"


def test_a_model_that_is_none_is_refused(backend, tmp_path):
    with pytest.raises(BackendError, match="refuses this model"):
        graph.open_graph(b"no model", backend=backend)
    with pytest.raises(BackendError, match=r"expected a file ending in \.onnx or \.tflite"):
        graph.open_graph(tmp_path / "model.pb")
    with pytest.raises(BackendError, match="cannot be read"):
        graph.open_graph(tmp_path / "model.onnx")
    with pytest.raises(BackendError, match="expected one of onnx, litert"):
        graph.open_graph(b"", backend="tensorrt")


def test_a_graph_says_what_it_takes(bundle, backend):
    entry = bundle.backends[backend]
    found = graph.open_graph(bundle.read(entry["backbone"]), backend=backend)
    (_, shape, dtype), batch = found.inputs[0], entry["batch"]
    assert shape == (batch, 16, 16, 3) and dtype == np.uint8
    teacher = graph.open_graph(bundle.read(entry["teacher"]), backend=backend)
    assert len(teacher.inputs) == 5
    assert teacher.inputs[0][1][0] == entry["teacher_batch"]


# -- heads that can't be trusted ------------------------------------------------------------------

GOOD = {"weights": np.ones((104, 4), np.float32), "intercept": np.zeros(4, np.float32)}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"weights": np.full((104, 4), np.nan, np.float32)}, "holds NaN or inf"),
        ({"intercept": np.array([0, 0, np.inf, 0], np.float32)}, "holds NaN or inf"),
        ({"weights": np.ones((104, 3), np.float32)}, r"\(104, 3\) and intercept \(4,\) don't fit"),
        ({"weights": np.ones(104, np.float32)}, "don't fit"),
        ({"weights": None}, "lacks 'weights'"),
    ],
)
def test_a_head_with_wrong_arrays_is_refused(change, sentence):
    arrays = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    with pytest.raises(BundleError, match=f"generation 3: .*{sentence}"):
        Head.from_arrays(arrays, "generation 3")


def test_a_head_is_linear_and_survives_storage():
    rng = np.random.default_rng(0)
    head = Head(*(rng.normal(size=s).astype(np.float32) for s in ((5, 3), (3,))))
    again = Head.from_arrays(head.to_arrays())
    rows = rng.normal(size=(4, 5)).astype(np.float32)
    expected = np.einsum("nd,dc->nc", rows, head.weights) + head.intercept
    np.testing.assert_allclose(again(rows), expected, rtol=1e-5)
    assert again.weights.tobytes() == head.weights.tobytes()


def whole(bundle, **changed):
    """The factory head's arrays, some of them changed."""
    return {**factory_head(bundle).to_arrays(), **changed}


@pytest.mark.parametrize(
    "changed, statistics, sentence",
    [
        ({"intercept": np.full(4, np.nan, np.float32)}, None, "generation 1: holds NaN or inf"),
        (
            {"weights": np.zeros((5, 4), np.float32)},
            None,
            r"generation 1: weights are \(5, 4\), not",
        ),
        ({}, (np.zeros(7), np.ones(7)), "statistics have 7 channels, this bundle's network has"),
        ({}, (np.nan, 1.0), "statistics hold NaN, inf or a negative variance"),
        ({}, (0.0, -1.0), "statistics hold NaN, inf or a negative variance"),
    ],
)
def test_a_generation_that_cannot_be_is_noted_and_the_factory_head_answers(
    bundle, frames, tmp_path, changed, statistics, sentence
):
    if statistics is not None:
        size = len(bundle.arrays("statistics.safetensors")["mean"])
        mean, var = (np.full(size, v, np.float32) if np.isscalar(v) else v for v in statistics)
        statistics = {"mean": mean.astype(np.float32), "var": var.astype(np.float32)}
    store = Store(tmp_path / "state")
    store.commit(whole(bundle, **changed), statistics, {"bundle_sha256": bundle.sha256})
    found = open_runtime(bundle, state=store.path)
    assert found.generation == 0
    assert re.search(sentence, found.notes[-1]) and "the factory head" in found.notes[-1]
    expected = open_runtime(bundle).logits(frames.x[:8])
    assert found.logits(frames.x[:8]).tobytes() == expected.tobytes()


def test_another_bundles_generation_is_ignored_with_a_note(bundle_dir, frames, own_state, tmp_path):
    state = own_state()
    copy = shutil.copytree(bundle_dir, tmp_path / "newer")
    manifest = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(manifest + "\n")
    runtime = open_runtime(copy, state=state)
    assert runtime.generation == 0 and runtime.notes[0].startswith("vendor_update")
    assert open_runtime(bundle_dir, state=state).generation == 1


# -- evaluate -------------------------------------------------------------------------------------


def test_evaluate_compares_with_the_original_network(bundle, frames, accepts_only):
    runtime = open_runtime(bundle)
    mine = runtime.logits(frames.x[:40]).argmax(1)
    known = evaluate(runtime, bundle.parity()["frames"], None)
    theirs = bundle.parity()["teacher_logits"].argmax(1)
    expected = (bundle.parity()["logits"].argmax(1) == theirs).mean()
    assert known["agreement"] == pytest.approx(expected) and known["accuracy"] is None
    wrong = (mine + 1) % 4
    found = evaluate(runtime, frames.x[:40], wrong)
    assert found["accuracy"] == 0.0 and found["agreement"] > 0.8
    assert evaluate(runtime, frames.x[:40], mine)["accuracy"] == 1.0
    one = np.where(np.arange(40) < 10, mine, wrong)
    assert evaluate(runtime, frames.x[:40], one)["accuracy"] == pytest.approx(0.25)
    with pytest.raises(InputError, match=r"labels lie in -1\.\.3, expected 0\.\.3"):
        evaluate(runtime, frames.x[:2], np.array([-1, 3]))
