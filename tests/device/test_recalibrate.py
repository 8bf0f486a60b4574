"""One recalibration as its user sees it: what it decides, what it leaves behind, how it is undone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgesolve.device import adapt, recalibrate
from edgesolve.device.bundle import open_bundle
from edgesolve.device.errors import BusyError, InputError, UsageError
from edgesolve.device.reasons import SENTENCES
from edgesolve.device.runtime import factory_head, open_runtime, source_statistics
from edgesolve.device.store import Store
from edgesolve.device.teacher import open_teacher

CONTRACT = {
    *("decision", "reason", "relative_gap", "status"),
    *("n", "seconds", "peak_rss_mib", "generation"),
}


@pytest.fixture
def run(bundle_dir, tmp_path):
    """run(frames, labels, state=, **of Options) -> report."""

    def call(x, labels=None, *, state=None, backend="auto", dry_run=False, **options):
        report = recalibrate.run(
            *(bundle_dir, x, labels),
            state=state or tmp_path / "state",
            backend=backend,
            action="show" if dry_run else "commit",
            options=adapt.Options(**options),
        )
        assert set(report) >= CONTRACT
        json.dumps(report)
        return report

    return call


def accuracy(logits, y):
    """In which equal logits, as of a dead head, are wrong."""
    certain = logits.max(1) > logits.min(1)
    return float(((logits.argmax(1) == y) & certain).mean())


# -- what it is for ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode, gain", [("backbone", 0.35), ("head", 0.2)])
def test_a_shifted_sensor_is_corrected(frames, adapted, logits, accepts_only, backend, mode, gain):
    state, report = adapted(backend, mode)
    assert (report["decision"], report["reason"], report["mode"]) == (
        "accepted",
        "gate_passed",
        mode,
    )
    assert (report["generation"], report["previous"], report["n"]) == (1, 0, 128)
    assert report["status"] == "converged" and report["relative_gap"] <= 1e-6
    assert report["target"] == "renormalised_teacher"
    before = accuracy(logits(frames.judge, backend), frames.judge_y)

    def rises(answer):
        assert accuracy(answer, frames.judge_y) >= before + gain

    accepts_only(rises, logits(frames.judge, backend, state), blind={"scaled"})


def test_the_source_condition_is_not_forgotten(frames, adapted, logits):
    state, _ = adapted("auto")
    before = accuracy(logits(frames.x[:192]), frames.y[:192])
    after = accuracy(logits(frames.x[:192], state=state), frames.y[:192])
    assert after >= before - 0.1


def test_the_head_is_the_pooled_ridge_solution(bundle_dir, frames, adapted, accepts_only):
    """Against normal equations written out here: three quarters of the window beside the source."""
    state, report = adapted("auto")
    found = Store(state).current()
    bundle = open_bundle(bundle_dir)
    teacher = open_teacher(bundle, report["backend"], 1)
    mean, var = (found.statistics[k].astype(np.float64) for k in ("mean", "var"))
    moved = teacher.run(frames.window, 0.0, mean, var)
    fit = np.arange(len(frames.window)) % 4 != 3
    A, T = moved.rows[fit].astype(np.float64), moved.logits[fit].astype(np.float64)
    stored = bundle.arrays("reference.safetensors")
    mu_x, mu_t, C = (stored[f"moments.{k}"].astype(np.float64) for k in ("mean_x", "mean_t", "c"))
    S = np.zeros((len(mu_x), len(mu_x)))
    S[np.tril_indices(len(S))] = stored["moments.s"]
    S = np.tril(S) + np.tril(S, -1).T
    mass = 0.3 * len(A) / (len(A) + 48.0)
    share = mass / (1 + mass)
    m_x, m_t = ((1 - share) * s + share * w.mean(0) for s, w in ((mu_x, A), (mu_t, T)))
    Q = (1 - share) * (S + np.outer(mu_x, mu_x)) + share * A.T @ A / len(A) - np.outer(m_x, m_x)
    q = (1 - share) * (C.T + np.outer(mu_x, mu_t)) + share * A.T @ T / len(A) - np.outer(m_x, m_t)
    ridge = bundle.manifest["solve"]["ridge"] * np.diag(Q).mean()
    expected = np.linalg.solve(Q + ridge * np.eye(len(Q)), q)

    def close(weights):
        assert np.abs(weights - expected).max() <= 1e-3 * np.abs(expected).max()

    accepts_only(close, found.arrays["weights"])
    np.testing.assert_allclose(
        found.arrays["intercept"], m_t - m_x @ expected, rtol=0.01, atol=0.01
    )


def test_the_statistics_are_the_windows_mixed_with_the_sources(bundle_dir, frames, adapted):
    state, report = adapted("auto")
    found = Store(state).current().statistics
    bundle = open_bundle(bundle_dir)
    source = source_statistics(bundle)
    share = 0.6 * 128 / (128 + 12) * (1 - 1 / report["drift"]["from_factory"])
    assert report["share"] == pytest.approx(share)
    window = open_teacher(bundle, report["backend"], 1).run(
        frames.window, share, source.mean, source.var
    )
    gap = window.mean - source.mean
    var = (1 - share) * source.var + share * window.var + share * (1 - share) * gap**2
    np.testing.assert_allclose(found["mean"], source.mean + share * gap, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["var"], var, rtol=1e-5)
    assert np.abs(gap / np.sqrt(source.var)).max() > 0.5, "else this test shows nothing"


def test_what_onnx_learnt_litert_answers(frames, adapted, logits, both_backends):
    for mode in ("backbone", "head"):
        state, _ = adapted("onnx", mode)
        found = [logits(frames.judge[:64], name, state) for name in both_backends]
        assert np.abs(found[0] - found[1]).max() <= 1e-4 * max(1.0, np.abs(found[0]).max())
        factory = logits(frames.judge[:64], "onnx")
        assert np.abs(found[0] - factory).max() > 0.1, "else the generation wasn't used"


def test_the_same_frames_give_the_same_bytes(frames, adapted, run, tmp_path):
    first, _ = adapted("auto")
    run(frames.window, state=tmp_path / "again")
    for name in ("head.safetensors", "statistics.safetensors"):
        place = f"generations/0001/{name}"
        assert (first / place).read_bytes() == (tmp_path / "again" / place).read_bytes()


def test_provenance_says_what_was_learnt_from_what(bundle_dir, adapted):
    state, _ = adapted("auto")
    found = Store(state).current().provenance
    assert found["bundle_sha256"] == open_bundle(bundle_dir).sha256
    assert found["decision"] == "accepted" and found["parent"] == 0
    assert len(found["window_sha256"]) == 64 and found["options"]["mode"] == "backbone"
    last = Store(state).history()[-1]
    assert (last["decision"], last["generation"]) == ("accepted", 1)


# -- do no harm --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [16, 64, 128])
def test_without_drift_nothing_changes(frames, run, logits, tmp_path, n):
    report = run(frames.x[:n])
    assert (report["decision"], report["reason"]) == ("kept", "no_drift")
    assert report["drift"]["score"] <= 1.0 and report["generation"] == 0
    assert not (tmp_path / "state" / "generations").exists()
    assert Store(tmp_path / "state").history()[-1]["reason"] == "no_drift"
    after = logits(frames.judge[:8], state=tmp_path / "state")
    assert after.tobytes() == logits(frames.judge[:8]).tobytes()


def test_a_dry_run_proposes_and_writes_nothing(frames, run, own_state, tmp_path):
    report = run(frames.window, dry_run=True)
    assert (report["decision"], report["reason"]) == ("proposed", "dry_run")
    assert report["would_be"] == "gate_passed" and report["generation"] == 0
    assert not (tmp_path / "state").exists()
    state = own_state()
    before = {p: p.read_bytes() for p in state.rglob("*") if p.is_file()}
    report = run(frames.x[:64], state=state, dry_run=True)
    assert (report["decision"], report["would_be"]) == ("proposed", "returned")
    assert {p: p.read_bytes() for p in state.rglob("*") if p.is_file()} == before


def test_the_return_of_the_old_condition_brings_the_factory_head(frames, run, own_state, logits):
    state = own_state()
    report = run(frames.x[:128], state=state)
    assert (report["decision"], report["reason"]) == ("accepted", "returned")
    assert (report["generation"], report["previous"]) == (2, 1)
    assert logits(frames.judge, state=state).tobytes() == logits(frames.judge).tobytes()
    assert Store(state).rollback() == 1, "what had been learnt can be had back"


def test_a_window_of_one_class_is_not_taken_for_drift(frames, run):
    report = run(frames.x[frames.y == 1][:64])
    assert (report["decision"], report["reason"]) == ("kept", "too_few_classes")
    assert report["drift"]["alarm"]


def test_too_few_frames(frames, run):
    report = run(frames.window[:15])
    assert (report["decision"], report["reason"], report["n"]) == ("kept", "too_few_samples", 15)
    assert run(frames.window[:16])["n"] == 16


def test_constant_frames_are_dropped(frames, run):
    dead = np.full_like(frames.window[:40], 7)
    report = run(np.concatenate([dead, frames.window]))
    assert (report["decision"], report["bad_frames"], report["n"]) == ("accepted", 40, 128)
    report = run(dead)
    assert (report["reason"], report["bad_frames"], report["n"]) == ("too_few_samples", 40, 0)


def test_constant_frames_do_not_change_what_is_learnt(frames, run, adapted, tmp_path):
    dead = np.full_like(frames.window[:5], 7)
    labels = np.full(len(frames.window) + 5, -1)
    run(np.concatenate([frames.window, dead]), labels, state=tmp_path / "with")
    place = "generations/0001/head.safetensors"
    assert (tmp_path / "with" / place).read_bytes() == (adapted("auto")[0] / place).read_bytes()


def test_frozen(frames, run, own_state):
    state = own_state()
    (state / "FROZEN").touch()
    report = run(frames.x[:64], state=state)
    assert (report["decision"], report["reason"], report["generation"]) == ("kept", "frozen", 1)


@pytest.mark.parametrize(
    "option, reason",
    [({"seconds": 1e-6}, "out_of_time"), ({"memory_mib": 1.0}, "memory_bound")],
)
def test_a_budget_that_cannot_be_kept_refuses(frames, run, tmp_path, option, reason):
    report = run(frames.window, **option)
    assert (report["decision"], report["reason"], report["status"]) == (
        "kept",
        reason,
        "not_solved",
    )
    assert report["n"] < adapt.MIN_FRAMES
    assert not (tmp_path / "state" / "generations").exists()
    assert SENTENCES[reason] == report["sentence"]


def test_a_generous_budget_changes_nothing(frames, run, adapted, tmp_path):
    run(frames.window, seconds=1e6, memory_mib=1e6)
    place = "generations/0001/head.safetensors"
    assert (tmp_path / "state" / place).read_bytes() == (adapted("auto")[0] / place).read_bytes()


def test_the_window_is_bounded(frames, run):
    assert run(frames.window, max_frames=48, dry_run=True)["n"] == 48


def test_a_gate_that_fails_keeps_the_head(frames, run, monkeypatch, tmp_path):
    from edgesolve.device import gate

    monkeypatch.setattr(gate.judge, "__defaults__", (gate.Limits(anchor_loss=-1.0),))
    report = run(frames.window)
    assert (report["decision"], report["reason"]) == ("kept", "anchor_agreement")
    assert report["gate"]["anchor_agreement_new"] > 0 and report["status"] == "converged"
    assert not (tmp_path / "state" / "generations").exists()


def test_a_bundle_with_a_fixed_backbone_changes_its_head_only(bundle_dir, frames, tmp_path):
    from edgesolve.device.adapt import _mode
    from edgesolve.device.bundle import Bundle

    bundle = open_bundle(bundle_dir)
    fixed = Bundle(bundle.path, {**bundle.manifest, "adapt": {"backbone": "fixed"}}, bundle.sha256)
    assert _mode(fixed, adapt.Options()) == "head"
    with pytest.raises(UsageError, match="--fixed-backbone; only its head can change"):
        _mode(fixed, adapt.Options(mode="backbone"))


def test_another_process_at_work(frames, run, tmp_path):
    with Store(tmp_path / "state").lock(), pytest.raises(BusyError):
        run(frames.window)


# -- going back --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["backbone", "head"])
def test_rollback_and_factory_reset_restore_the_logits(frames, run, own_state, logits, mode):
    state = own_state("auto", mode)
    x = frames.judge[:32]
    factory, first = logits(x), logits(x, state=state)
    darker = np.clip(frames.x[:128] * 0.25 + 20, 0, 255).astype(np.uint8)
    assert run(darker, state=state, mode=mode)["generation"] == 2
    second = logits(x, state=state)
    assert len({a.tobytes() for a in (factory, first, second)}) == 3
    store = Store(state)
    assert store.rollback() == 1 and logits(x, state=state).tobytes() == first.tobytes()
    assert store.rollback() == 0 and logits(x, state=state).tobytes() == factory.tobytes()
    assert run(darker, state=state, mode=mode)["generation"] == 3
    store.factory_reset()
    assert logits(x, state=state).tobytes() == factory.tobytes()


# -- labels ------------------------------------------------------------------------------------


def test_labels_are_used_and_help(frames, run, adapted, logits, tmp_path):
    report = run(frames.window, frames.window_y)
    assert (report["decision"], report["target"]) == ("accepted", "labels")
    without = accuracy(logits(frames.judge, state=adapted("auto")[0]), frames.judge_y)
    found = logits(frames.judge, state=tmp_path / "state")
    assert accuracy(found, frames.judge_y) >= without - 0.02
    wrong = run(frames.window, (frames.window_y + 1) % 4, state=tmp_path / "wrong")
    assert wrong["decision"] == "accepted", "a person's word counts more than the teacher's"
    misled = accuracy(logits(frames.judge, state=tmp_path / "wrong"), frames.judge_y)
    assert misled < accuracy(found, frames.judge_y) - 0.2, "else the labels were not looked at"


def test_labels_without_drift_move_the_head_alone(frames, run, tmp_path):
    report = run(frames.x[:128], (frames.y[:128] + 1) % 4)
    assert report["target"] == "labels" and not report["drift"]["alarm"]
    assert report["decision"] == "accepted"
    assert Store(tmp_path / "state").current().statistics is None


def test_no_item_labelled_is_no_labels(frames, run):
    report = run(frames.x[:64], np.full(64, -1))
    assert (report["decision"], report["reason"]) == ("kept", "no_drift")


@pytest.mark.parametrize(
    "labels, sentence",
    [
        (np.zeros(127, int), r"found int64 of shape \(127,\), expected 128 integers"),
        (np.zeros((128, 1), int), r"of shape \(128, 1\)"),
        (np.zeros(128), "found float64"),
        (np.array(["cat"] * 128), "expected 128 integers"),
        (np.full(128, 4), r"outside -1\.\.3"),
        (np.full(128, -2), r"outside -1\.\.3"),
    ],
)
def test_wrong_labels_are_refused(frames, run, tmp_path, labels, sentence):
    with pytest.raises(InputError, match=sentence):
        run(frames.window, labels)
    assert not (tmp_path / "state").exists()


def test_the_report_of_a_runtime_is_that_of_its_backend(frames, adapted, bundle_dir, backend):
    state, report = adapted(backend)
    runtime = open_runtime(bundle_dir, backend=backend, state=state)
    assert report["backend"] == backend and report["runtime"] == runtime.graph.runtime
    assert runtime.generation == 1 and runtime.notes == []
    assert runtime.parity()["max_abs"] < 1e-3, "parity is about the factory head, always"
    assert factory_head(runtime.bundle).weights.shape == runtime.head.weights.shape
