"""What a Prometheus server would read, parsed by the library's own reader."""

from __future__ import annotations

import math
import time

import pytest

from edgesolve.device import metrics as metrics_module
from edgesolve.device.errors import BackendError, StateError
from edgesolve.device.metrics import Silent, open_metrics

prometheus = pytest.importorskip("prometheus_client", reason="the extra `metrics` is missing")

STATUS = {
    "generation": 7,
    "committed": True,
    "head_age_s": 5321,
    "backend": "onnxruntime 1.31.1",
    "bundle_sha256": "9f2c",
    "window": {"n": 412, "capacity": 512, "stores_frames": False},
    "drift": {"alarm": True, "score": 1.41, "threshold": 1.0},
    "candidate": {"gate": {"anchor_agreement_new": 0.97}},
    "adapting": None,
    "soc_temp_c": 61.5,
    "throttled": ["under_voltage"],
    "rss_mib": 118.0,
    "write_budget_mib": 32,
    "written_total_mib": 1.5,
}


def read(metrics):
    """{(name, labels): value} of the rendered page, by prometheus_client's parser."""
    from prometheus_client.parser import text_string_to_metric_families as parse

    page, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse(page.decode())
        for sample in family.samples
    }


def test_counters_and_histograms_count():
    metrics = open_metrics()
    for _ in range(3):
        metrics.inference()
        metrics.observe("total", 0.02)
    metrics.inference(2)
    metrics.error("timeout")
    metrics.deadline_miss()
    metrics.decision("kept", "no_drift")
    metrics.decision("kept", "no_drift")
    metrics.rollback("operator")
    metrics.skipped("too_hot")
    found = read(metrics)
    reason = (("decision", "kept"), ("reason", "no_drift"))
    assert found["edgesolve_inferences_total", ()] == 5
    assert found["edgesolve_errors_total", (("kind", "timeout"),)] == 1
    assert found["edgesolve_deadline_misses_total", ()] == 1
    assert found["edgesolve_recalibrations_total", reason] == 2
    assert found["edgesolve_rollbacks_total", (("reason", "operator"),)] == 1
    assert found["edgesolve_skipped_total", (("reason", "too_hot"),)] == 1
    assert found["edgesolve_inference_seconds_sum", (("stage", "total"),)] == pytest.approx(0.06)
    within = {
        le: found["edgesolve_inference_seconds_bucket", (("le", le), ("stage", "total"))]
        for le in ("0.001", "0.01", "0.025", "2.5", "+Inf")
    }
    assert within == {"0.001": 0, "0.01": 0, "0.025": 3, "2.5": 3, "+Inf": 3}


def test_gauges_follow_the_status():
    before = time.time()
    metrics = open_metrics()
    metrics.update(STATUS)
    metrics.solve(6.4, 8.1e-7)
    found = read(metrics)
    expected = {
        "head_generation": 7,
        "head_committed": 1,
        "head_age_seconds": 5321,
        "window_samples": 412,
        "anchor_agreement": 0.97,
        "soc_temp_celsius": 61.5,
        "write_budget_bytes": 32 << 20,
        "bytes_written_total": 1.5 * (1 << 20),
        "solve_seconds": 6.4,
        "solver_relative_gap": 8.1e-7,
    }
    assert {name: found[f"edgesolve_{name}", ()] for name in expected} == expected
    assert found["edgesolve_drift_score", (("test", "mean"),)] == 1.41
    assert found["edgesolve_drift_alarm", (("test", "mean"),)] == 1
    assert found["edgesolve_rss_bytes", (("process", "inference"),)] == 118 << 20
    assert found["edgesolve_throttled", (("reason", "under_voltage"),)] == 1
    assert found["edgesolve_throttled", (("reason", "throttled"),)] == 0
    assert before <= found["edgesolve_start_time_seconds", ()] <= time.time()
    (labels,) = (dict(labels) for name, labels in found if name == "edgesolve_build_info")
    assert set(labels) == {"version", "backend", "board", "bundle_sha256"}
    assert (labels["backend"], labels["bundle_sha256"]) == ("onnxruntime 1.31.1", "9f2c")


def test_what_is_not_known_is_absent_and_not_zero():
    metrics = open_metrics()
    nothing = {name: None for name in STATUS}
    metrics.update({**nothing, "soc_temp_c": math.nan})
    metrics.solve(6.4, None)
    names = {name for name, _ in read(metrics)}
    absent = {"soc_temp_celsius", "head_age_seconds", "drift_score", "drift_alarm", "rss_bytes"}
    absent |= {"throttled", "power_watts", "cpu_freq_hertz", "solver_relative_gap"}
    absent |= {"solver_condition", "anchor_agreement", "anchor_accuracy", "bytes_written_total"}
    assert not names & {f"edgesolve_{name}" for name in absent}
    assert "edgesolve_solve_seconds" in names
    metrics.update(STATUS)  # known again
    assert "edgesolve_soc_temp_celsius" in {name for name, _ in read(metrics)}


def test_every_name_has_our_prefix_and_no_other_process_series_appear():
    metrics = open_metrics()
    metrics.update(STATUS)
    names = {name for name, _ in read(metrics)}
    assert all(name.startswith("edgesolve_") for name in names)
    assert not any(name.endswith("_created") for name in names)


def test_two_sets_of_metrics_share_nothing():
    one, other = open_metrics(), open_metrics()
    one.inference(4)
    assert read(other)["edgesolve_inferences_total", ()] == 0
    assert "edgesolve" not in prometheus.generate_latest().decode()  # the library's global registry


def test_the_store_s_own_account_of_bytes_goes_before_the_status():
    metrics = open_metrics()
    metrics.update(STATUS)
    metrics.written(12345)
    assert read(metrics)["edgesolve_bytes_written_total", ()] == 12345


def test_a_drift_of_its_own_test_is_kept_apart():
    metrics = open_metrics()
    metrics.drift(0.2, False)
    metrics.drift(3.0, True, test="marginal")
    found = read(metrics)
    assert found["edgesolve_drift_score", (("test", "mean"),)] == 0.2
    assert found["edgesolve_drift_alarm", (("test", "marginal"),)] == 1


def test_an_unknown_stage_is_a_mistake():
    with pytest.raises(KeyError):
        open_metrics().observe("lunch", 1.0)


def test_the_text_file_is_replaced_in_one_step(tmp_path):
    metrics = open_metrics()
    path = tmp_path / "edgesolve.prom"
    path.write_text("old")
    metrics.inference(9)
    metrics.write_textfile(path)
    assert "edgesolve_inferences_total 9.0" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["edgesolve.prom"]
    with pytest.raises(StateError, match="cannot be written"):
        metrics.write_textfile(tmp_path / "missing" / "edgesolve.prom")


def test_without_the_library_everything_is_taken_and_render_says_what_to_install(monkeypatch):
    def missing(self):
        raise ModuleNotFoundError("No module named 'prometheus_client'")

    monkeypatch.setattr(metrics_module.Metrics, "__init__", missing)
    silent = open_metrics()
    assert isinstance(silent, Silent)
    silent.observe("total", 0.1)
    silent.inference(3)
    silent.update(STATUS)
    silent.solve(1.0, None)
    with pytest.raises(BackendError, match=r"pip install 'edgesolve\[metrics\]'"):
        silent.render()
    public = {name for name in vars(metrics_module.Metrics) if not name.startswith("_")}
    assert public - {"collect", "describe"} <= set(dir(Silent))
