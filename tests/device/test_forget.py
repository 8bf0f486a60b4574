"""Forgetting is exact: the same head as a device that never saw the window, and nothing of it on the disk."""

from __future__ import annotations

import json
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from edgesolve.device import adapt, audit, forget
from edgesolve.device.bundle import open_bundle
from edgesolve.device.errors import UsageError
from edgesolve.device.runtime import Head, factory_head
from edgesolve.device.solve import solve, source_moments
from edgesolve.device.store import Store
from edgesolve.kernels.moments import Moments

DECAY, MASS = 0.5, 3.0


@pytest.fixture(scope="module")
def bundle(bundle_dir):
    return open_bundle(bundle_dir)


@pytest.fixture(scope="module")
def exact(bundle):
    """Three windows of real rows with other targets than the source's, in float64."""
    known, rng = bundle.parity(), np.random.default_rng(0)
    x = np.concatenate([known["rows"], known["adapted_rows"]])
    t = np.concatenate([known["adapted_logits"], known["logits"]])
    found = []
    for i in range(3):
        noisy = x[i::3] * (1 + 0.05 * i) + 0.01 * rng.standard_normal(x[i::3].shape)
        found.append(Moments.of(noisy, t[i::3] * (1 + 0.1 * i)))
    return found


@pytest.fixture(scope="module")
def windows(exact):
    """The same as the state stores them."""
    return [Moments.from_arrays(window.to_arrays()) for window in exact]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "state")


def learn(bundle, store, own, *, time=100.0, statistics=None, earlier=True, commit=True):
    """What `recalibrate` does with a window that passes the gate."""
    used = store.current(bundle.sha256)
    features = adapt.features_sha256(bundle, "onnx", statistics)
    seen, parts = own, [{"generation": None, "weight": 1.0}]
    if earlier and used and used.provenance["features_sha256"] == features:
        for number, weight in audit.parts(used):
            part = used if number == used.number else kept(store)[number]
            seen = seen + Moments.from_arrays(part.window).scaled(DECAY * weight)
            parts.append({"generation": number, "weight": DECAY * weight})
    reference = bundle.reference("onnx")
    solved = solve(bundle, "onnx", source_moments(reference), seen, MASS)
    head = Head(solved.weights.astype(np.float32), solved.intercept.astype(np.float32))
    figures = audit.anchor_figures(head, factory_head(bundle, "onnx"), reference, 0.0)
    fit = round(own.n)
    provenance = {
        "backend": "onnx", "mode": "head", "mass": MASS, "parts": parts, "gate": figures,
        "features_sha256": features, "options": {"decay": DECAY}, "reason": "gate_passed",
        "n": next(n for n in range(fit, 2 * fit) if n - n // 4 == fit), "time": time,
        "bundle_sha256": bundle.sha256, "parent": used.number if used else 0,
    }  # fmt: skip
    put = store.commit if commit else store.propose
    put(head.to_arrays(), statistics, provenance, window=own.to_arrays())
    return solved.weights


def kept(store):
    return {item.number: item.found for item in audit.kept(store.path)}


def never_saw(bundle, windows, tmp_path, which):
    """(float64 weights, float32 head) of another device, which saw these windows only."""
    other = Store(tmp_path / f"other{which}")
    for i in which:
        weights = learn(bundle, other, windows[i])
    return weights, other.current().arrays


def solved_again(bundle, store):
    """The float64 weights that the stored windows of the generation in force give."""
    used = store.current(bundle.sha256)
    source = source_moments(bundle.reference("onnx"))
    return solve(bundle, "onnx", source, audit.window(used, kept(store)), MASS).weights


def chain(bundle, store, windows):
    for i, window in enumerate(windows):
        learn(bundle, store, window, time=100.0 * (i + 1))


@pytest.mark.parametrize("gone", [{1}, {2}, {3}, {1, 2}, {2, 3}, {1, 3}])
def test_the_same_head_as_if_never_seen(bundle, windows, store, tmp_path, accepts_only, gone):
    chain(bundle, store, windows)
    report = forget.forget(bundle, store, generations=gone)
    left = tuple(i for i in range(3) if i + 1 not in gone)
    expected, head = never_saw(bundle, windows, tmp_path, left)
    assert report["solved"] and report["generation"] == 4 and report["forgotten"] == sorted(gone)

    def equal(weights):
        assert np.abs(weights - expected).max() <= 1e-10 * np.abs(expected).max()

    accepts_only(equal, solved_again(bundle, store))
    stored = store.current(bundle.sha256).arrays
    np.testing.assert_allclose(stored["weights"], head["weights"], rtol=2e-7, atol=1e-9)
    np.testing.assert_allclose(stored["intercept"], head["intercept"], rtol=2e-6, atol=1e-6)


def as_it_was(found, known, keep):
    return audit.parts(found)


def the_wrong_one(found, known, keep):
    return [(n, w) for n, w in audit.parts(found) if keep(n)][:1] + [
        (n, w) for n, w in audit.parts(found) if not keep(n)
    ]


def without_the_decay(found, known, keep):
    return [(n, w) for n, w in audit.parts(found) if keep(n)]


@pytest.mark.parametrize("wrong", [as_it_was, the_wrong_one, without_the_decay])
def test_that_test_sees_a_wrong_subtraction(
    bundle, windows, store, tmp_path, monkeypatch, accepts_only, wrong
):
    monkeypatch.setattr(forget, "remaining", wrong)
    with pytest.raises(AssertionError):
        test_the_same_head_as_if_never_seen(bundle, windows, store, tmp_path, accepts_only, {2})


def test_subtracting_gives_the_same_as_leaving_out(bundle, exact):
    """The other way to unlearn: the sum less the scaled window, as `Moments` subtracts."""
    total = exact[0].scaled(0.25) + exact[1].scaled(0.5) + exact[2]
    known = {i + 1: SimpleNamespace(window=w.to_arrays(np.float64)) for i, w in enumerate(exact)}
    source = source_moments(bundle.reference("onnx"))

    def solved(seen):
        return solve(bundle, "onnx", source, seen, MASS).weights

    left = solved(forget.merged([(3, 1.0), (1, 0.25)], known))
    limit = 1e-10 * np.abs(left).max()
    assert np.abs(solved(total - exact[1].scaled(0.5)) - left).max() <= limit
    assert np.abs(solved(total - exact[1].scaled(0.499)) - left).max() > 1e4 * limit


def test_decay_goes_back_to_what_it_would_have_been(bundle, windows, store):
    chain(bundle, store, windows)
    found, known = store.current(), kept(store)
    assert audit.parts(found) == [(3, 1.0), (2, 0.5), (1, 0.25)]
    assert forget.remaining(found, known, lambda n: n != 2) == [(3, 1.0), (1, 0.5)]
    assert forget.remaining(found, known, lambda n: n != 3) == [(2, 1.0), (1, 0.5)]
    assert forget.remaining(found, known, lambda n: n == 1) == [(1, 1.0)]


def everything(folder):
    return b"".join(p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file())


def traces(window):
    """Bytes that only this window's file has: its means, and its covariance."""
    arrays = window.to_arrays()
    return [arrays["mean_x"].tobytes(), arrays["mean_t"].tobytes(), arrays["s"].tobytes()]


def test_nothing_of_it_is_left_on_the_disk(bundle, windows, store):
    """In a rejected generation, in a candidate, in half-written folders: nowhere."""
    chain(bundle, store, windows[:2])
    learn(bundle, store, windows[2], commit=False)
    state = store.path
    folder = state / "generations" / "0002"
    for name in ("0002.tmp", "0003.rejected"):
        target = state / "generations" / name
        target.mkdir()
        for path in folder.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
    (state / "candidate.new.tmp").mkdir()
    (state / "candidate.new.tmp" / "window.safetensors").write_bytes(
        (folder / "window.safetensors").read_bytes()
    )
    assert all(trace in everything(state) for trace in traces(windows[1]))
    report = forget.forget(bundle, store, generations={2})
    assert not any(trace in everything(state) for trace in traces(windows[1]))
    assert report["deleted"] == [
        *("candidate", "candidate.new.tmp"),
        *(f"generations/{name}" for name in ("0002", "0002.tmp", "0003.rejected")),
    ]
    assert report["generation"] == 3 and set(kept(store)) == {1, 3}
    assert store.candidate(bundle.sha256) is None


def test_heads_that_saw_it_go_as_well(bundle, windows, store):
    """Generation 2 learnt from 1 too: rolling back to it would bring the rows back."""
    chain(bundle, store, windows)
    report = forget.forget(bundle, store, generations={1})
    assert set(kept(store)) == {4}
    assert report["deleted"] == ["generations/0001", "generations/0002", "generations/0003"]
    assert store.rollback(bundle.sha256) == 0


def test_an_audit_reproduces_what_is_left(bundle, windows, store):
    chain(bundle, store, windows)
    forget.forget(bundle, store, generations={2})
    found = audit.audit(bundle, store)
    assert found["verdict"] == "reproduced", audit.audit_text(found)
    learn(bundle, store, windows[1])
    assert audit.parts(store.current()) == [(5, 1.0), (4, 0.5)]
    assert audit.audit(bundle, store)["verdict"] == "reproduced"


def test_twice_forgets_what_was_merged(bundle, windows, store, tmp_path):
    """After the first time windows 1 and 3 are one sum: to forget 3, the sum has to go, and 1 with it."""
    chain(bundle, store, windows)
    forget.forget(bundle, store, generations={2})
    learn(bundle, store, windows[1])
    report = forget.forget(bundle, store, generations={3})
    assert report["solved"] and report["left_out"] == [1]
    expected, _ = never_saw(bundle, windows, tmp_path, (1,))
    assert np.abs(solved_again(bundle, store) - expected).max() <= 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("since, left", [(150.0, (0,)), (300.0, (0, 1)), (301.0, (0, 1, 2))])
def test_since_a_moment(bundle, windows, store, tmp_path, since, left):
    chain(bundle, store, windows)
    report = forget.forget(bundle, store, since=since)
    assert report["forgotten"] == [n for n in (1, 2, 3) if n - 1 not in left]
    expected, _ = never_saw(bundle, windows, tmp_path, left)
    assert np.abs(solved_again(bundle, store) - expected).max() <= 1e-10 * np.abs(expected).max()


def test_nothing_is_left(bundle, windows, store):
    chain(bundle, store, windows)
    report = forget.forget(bundle, store, since=0.0)
    assert (report["generation"], report["solved"]) == (0, False)
    assert kept(store) == {} and store.current(bundle.sha256) is None


def test_statistics_cannot_be_taken_apart(bundle, windows, store):
    """They were estimated from that window: back to the newest head that never saw it."""
    found = bundle.arrays("statistics.safetensors")
    moved = [
        {"mean": (f * found["mean"]).astype(np.float32), "var": found["var"]} for f in (0.9, 0.8)
    ]
    learn(bundle, store, windows[0], statistics=moved[0])
    learn(bundle, store, windows[1], statistics=moved[1])
    before = store.current().number
    report = forget.forget(bundle, store, generations={1})
    assert report["generation"] == before == 2, "other statistics, so that it never saw window 1"
    learn(bundle, store, windows[2], statistics=moved[1])
    report = forget.forget(bundle, store, generations={2})
    assert report["generation"] == 0 and not report["solved"] and kept(store) == {}


def test_a_window_that_is_not_kept_any_more(bundle, windows, store, tmp_path):
    import shutil

    chain(bundle, store, windows)
    shutil.rmtree(store.path / "generations" / "0001")
    report = forget.forget(bundle, store, generations={2})
    assert report["solved"] and report["left_out"] == [1]
    expected, _ = never_saw(bundle, windows, tmp_path, (2,))
    assert np.abs(solved_again(bundle, store) - expected).max() <= 1e-10 * np.abs(expected).max()


def test_what_nobody_saw(bundle, windows, store):
    chain(bundle, store, windows[:1])
    report = forget.forget(bundle, store, generations={5})
    assert (report["generation"], report["deleted"], report["forgotten"]) == (1, [], [])
    with pytest.raises(UsageError, match="name generations"):
        forget.forget(bundle, store)


def test_probation_goes_on(bundle, windows, store):
    learn(bundle, store, windows[0])
    used = store.current()
    store.commit(
        used.arrays, None, {**used.provenance, "parent": 1}, window=used.window, committed=False
    )
    learn(bundle, store, windows[1])
    assert store.pointer(bundle.sha256)["committed"]
    store.rollback(bundle.sha256)
    assert not store.pointer(bundle.sha256)["committed"]


def test_the_journal_says_so(bundle, windows, store):
    chain(bundle, store, windows)
    forget.forget(bundle, store, generations={2})
    last = store.history()[-1]
    assert (last["decision"], last["reason"]) == ("accepted", "forgotten")
    assert last["generation"] == 4 and last["forgotten"] == [2]
    assert json.dumps(last)


KILLED = """
import os, signal, sys
from edgesolve.device import forget, generation
from edgesolve.device.bundle import open_bundle
from edgesolve.device.store import Store
left = int(sys.argv[3])
def counted(real):
    def call(*arguments, **named):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    return call
for name in ("rename", "replace", "unlink", "rmdir", "fsync", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))
forget.forget(open_bundle(sys.argv[1]), Store(sys.argv[2]), generations={2})
"""


@pytest.mark.parametrize("step", (0, 5, 10, 15, 22, 30))
def test_killed_anywhere_a_head_is_in_force_and_again_completes_it(
    bundle, windows, store, python_command, step
):
    chain(bundle, store, windows)
    before = store.current(bundle.sha256).arrays["weights"]
    done = subprocess.run(
        [*python_command, "-c", KILLED, str(bundle.path), str(store.path), str(step)],
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, -signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
    after = Store(store.path).current(bundle.sha256)
    assert after.number in (3, 4)
    assert (after.number == 3) == np.array_equal(after.arrays["weights"], before)
    forget.forget(bundle, store, generations={2})
    assert not any(trace in everything(store.path) for trace in traces(windows[1]))
    assert store.current(bundle.sha256).number in (4, 5)
