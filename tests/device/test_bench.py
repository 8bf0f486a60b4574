"""The benchmark: its statistics, its verdict, its processes. Nothing here asserts a time."""

from __future__ import annotations

import copy
import gc
import json
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from edgesolve.device import bench, bench_stats, bench_worker, board
from edgesolve.device.errors import BackendError, BundleError, InputError, UsageError

# -- statistics ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "percentile, n, rank",
    [
        (50, 11, 11),
        (90, 63, None),
        (90, 64, 64),
        (90, 100, 98),
        (90, 200, 191),
        (90, 1000, 923),
        (90, 5000, 4551),
        (99, 661, None),
        (99, 1000, 999),
        (99, 5000, 4968),
    ],
)
def test_the_rank_is_that_of_mlperf(percentile, n, rank):
    assert bench_stats.bound_rank(n, percentile) == rank


def test_fewest_runs():
    expected = {50: 11, 90: 64, 95: 130, 99: 662, 99.9: 6636}
    assert {p: bench_stats.fewest_runs(p) for p in expected} == expected


def test_the_bound_covers_the_true_percentile():
    """At least 99 of 100 experiments, and not by returning the maximum."""
    times = np.random.default_rng(0).exponential(size=(2000, 200))
    true = -np.log(0.1)
    bounds = np.array([bench_stats.percentile_bound(row, 90) for row in times])
    assert np.mean(bounds >= true) >= 0.985
    assert np.mean(bounds) < 0.9 * np.mean(times.max(axis=1))


def test_the_interval_covers_the_median():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(60):
        repeats = [rng.normal(10 + rng.normal(0, 1), 1, size=50) for _ in range(5)]
        low, high = bench_stats.bootstrap_interval(repeats, draws=200)
        assert low <= bench_stats.median_of_medians(repeats) <= high
        hits += low <= 10 <= high
    assert hits >= 48


def test_one_slow_process_does_not_move_the_median():
    repeats = [np.full(9, 1.0)] * 4 + [np.full(9, 50.0)]
    assert bench_stats.median_of_medians(repeats) == 1.0


def test_the_permutation_test_is_exact():
    assert bench_stats.permutation_p([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == 2 / 252
    assert bench_stats.permutation_p([1, 1, 1], [1, 1, 1]) == 1.0
    rng = np.random.default_rng(0)
    found = [bench_stats.permutation_p(rng.normal(size=4), rng.normal(size=4)) for _ in range(300)]
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.09, "a fair test: 5 % false alarms"


# -- the run, with a worker that answers from a script -----------------------------------------

ROW = {
    "import_ms": 100.0,
    "load_ms": 20.0,
    "first_ms": 5.0,
    "cold_start_ms": 300.0,
    "warmup_runs": 10,
    "steady_ns": [1_000_000 + 1000 * i for i in range(200)],
    "stages_ms": {"backbone": 0.9, "head": 0.1},
    "memory_mib": {"start": 20.0, "peak": 90.0, "pss": None},
    "before": {},
    "after": {},
    "parity": {"max_abs": 1e-6, "top1": 1.0},
    "about": {"backend": "onnx", "runtime": "onnxruntime 1", "inputs": [[[1, 8, 8, 1], "uint8"]]},
}
SHOT = {
    "governor": "performance",
    "scaling_min_mhz": 600.0,
    "scaling_max_mhz": 1800.0,
    "scaling_cur_mhz": 1800.0,
    "temperature_c": 50.0,
    "throttled": [],
    "swapped_mib": 0.0,
}
QUIET = {"governor": "performance", "temperature_c": 50.0, "load": 0.1, "emulated": False} | {
    "throttled_since_boot": []
}


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Answer the k-th start of a worker with `ROW` changed by `changes[k]`, the last for ever."""
    environment = {**board.environment(), **QUIET}
    monkeypatch.setattr(board, "environment", lambda threads=None: {**environment})
    script, rows, log = tmp_path / "worker.py", tmp_path / "rows.json", tmp_path / "log"
    script.write_text(
        "import json, sys, pathlib\n"
        f"rows, log = json.load(open({str(rows)!r})), pathlib.Path({str(log)!r})\n"
        "log.open('a').write(sys.argv[-1] + '\\n')\n"
        "row = rows[min(len(log.read_text().splitlines()), len(rows)) - 1]\n"
        "print('noise from a runtime')\n"
        "sys.exit(row) if isinstance(row, int) else print(json.dumps(row))\n"
    )
    monkeypatch.setenv("EDGESOLVE_PYTHON", f"{sys.executable} {script}")
    row = ROW | {"before": SHOT, "after": SHOT}

    def answer(*changes):
        rows.write_text(json.dumps([c if isinstance(c, int) else row | c for c in changes]))
        return log

    answer({})
    return answer


def test_a_quiet_board_is_valid(worker, tmp_path, capfd):
    log = worker({})
    result = bench.run_bench(tmp_path / "bundle", threads=2)
    assert (result["verdict"], result["reasons"], result["warnings"]) == ("VALID", [], [])
    assert (result["n"], result["repeats"]) == (1000, 5)
    assert result["p50_ms"] == pytest.approx(1.0995)
    assert result["p90_ms"] >= result["p90_sample_ms"] > result["p50_ms"]
    assert result["p999_ms"] is None
    assert result["memory_mib"]["pss"] is None and result["peak_rss_mib"] == 90
    assert json.loads(json.dumps(result)) == result
    specs = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(specs) == 5 and {s["threads"] for s in specs} == {2}
    assert specs[0]["spawned_ns"] < specs[4]["spawned_ns"]
    out, err = capfd.readouterr()
    assert out == "" and err.count("bench ") == 5


@pytest.mark.parametrize(
    "reason, row",
    [
        ("throttled", {"after": SHOT | {"throttled": ["throttled"]}}),
        ("under_voltage", {"before": SHOT | {"throttled": ["under_voltage"]}}),
        ("frequency_capped", {"after": SHOT | {"throttled": ["soft_temp_limit"]}}),
        ("clock_changed", {"after": SHOT | {"scaling_max_mhz": 1500.0}}),
        ("swapped", {"after": SHOT | {"swapped_mib": 3.0}}),
        ("parity_failed", {"parity": {"max_abs": 9.0, "top1": 0.5}}),
        ("too_few_runs", {"steady_ns": [1_000_000, 2_000_000]}),
    ],
)
def test_each_reason_invalidates(worker, reason, row):
    worker(row)
    result = bench.run_bench("bundle", repeats=2)
    assert (result["verdict"], result["reasons"]) == ("INVALID", [reason])


def test_a_clock_that_differs_between_repeats(worker):
    worker({}, {"after": SHOT | {"scaling_cur_mhz": 1200.0}})
    assert bench.run_bench("bundle", repeats=2)["reasons"] == ["clock_changed"]
    worker({}, {"before": SHOT | {"scaling_cur_mhz": 600.0}})
    assert bench.run_bench("bundle", repeats=2)["reasons"] == [], "an idle CPU may be slow"


def test_warnings_and_emulation(worker, monkeypatch):
    worker({})
    noisy = board.environment() | {"governor": "ondemand", "load": 1.7, "temperature_c": None}
    monkeypatch.setattr(board, "environment", lambda threads=None: noisy | {"emulated": True})
    result = bench.run_bench("bundle", quick=True)
    assert result["reasons"] == ["emulated"]
    expected = ["governor=ondemand", "load=1.7", "quick", "no_temperature_sensor"]
    assert result["warnings"] == expected


def test_throttling_that_came_and_went(worker, monkeypatch):
    worker({})
    environment, calls = board.environment(), iter([[], ["throttled"]])
    monkeypatch.setattr(
        board,
        "environment",
        lambda threads=None: environment | {"throttled_since_boot": next(calls)},
    )
    assert bench.run_bench("bundle")["reasons"] == ["throttled"]


def test_against_alternates_and_reports_the_ratio(worker, tmp_path):
    other = tmp_path / "big.onnx"
    other.write_bytes(b"x")
    slow = {"steady_ns": [3 * t for t in ROW["steady_ns"]], "parity": None, "stages_ms": {}}
    log = worker({}, slow, {}, slow, {}, slow)
    result = bench.run_bench(tmp_path / "bundle", repeats=3, against=other)
    names = [json.loads(line)["model"] for line in log.read_text().splitlines()]
    assert names == [str(tmp_path / "bundle"), str(other)] * 3
    assert result["ratio"] == pytest.approx(3.0) and result["ratio_ci"] == pytest.approx([3, 3])
    assert result["against"]["model"]["sha256"].startswith("2d711642b726")
    assert "3.00 times ours" in bench.table(result)
    with pytest.raises(InputError, match=r"big\.pt: expected an existing \.onnx or \.tflite"):
        bench.run_bench("bundle", against=tmp_path / "big.pt")


def test_the_workers_error_is_raised_as_itself(worker):
    worker({"error": "bundle: no such bundle folder.", "kind": "BundleError"})
    with pytest.raises(BundleError, match="no such bundle folder"):
        bench.run_bench("bundle")
    worker(3)
    with pytest.raises(BackendError, match=r"status 3.*edgesolve doctor"):
        bench.run_bench("bundle")


def test_an_interruption_keeps_what_was_measured(worker, monkeypatch):
    measured, calls = bench._worker, iter(range(3))

    def interrupted(spec):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return measured(spec)

    monkeypatch.setattr(bench, "_worker", interrupted)
    result = bench.run_bench("bundle")
    assert (result["repeats"], result["reasons"]) == (2, ["interrupted"])


# -- what people read ------------------------------------------------------------------------


def test_the_table_says_what_is_not_supported(worker):
    worker({})
    lines = bench.table(bench.run_bench("bundle", repeats=1))
    assert "n/a, needs 662" in lines and "n/a, needs 6636" in lines
    assert "VALID" in lines and "top-1 100.0%" in lines


def test_the_page_is_self_contained(worker):
    worker({"about": ROW["about"] | {"runtime": "<script>alert(1)</script>"}})
    page = bench.html(bench.run_bench("bundle", repeats=2))
    assert "<script" not in page and "http" not in page and "prefers-color-scheme: dark" in page
    tags = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append(tag)

    Reader().feed(page)
    assert tags.count("svg") == 3 and tags.count("polyline") == 2 and tags.count("rect") == 40


# -- comparing -------------------------------------------------------------------------------


def result_of(medians):
    environment = {key: "same" for key in bench._ALIKE}
    return {
        "verdict": "VALID",
        "reasons": [],
        "mode": "steady",
        "backend": "onnx",
        "environment": environment,
        "medians_ms": medians,
        "p50_ms": float(np.median(medians)),
    }


A = result_of([10.0, 10.1, 10.2, 9.9, 10.05])


@pytest.mark.parametrize(
    "factor, regression", [(1.0, False), (1.02, False), (1.05, True), (0.5, False)]
)
def test_a_regression_is_large_and_significant(factor, regression):
    found = bench.compare(A, result_of([m * factor for m in A["medians_ms"]]))
    assert found["regression"] is regression
    assert found["change"] == pytest.approx(factor - 1)


def test_a_large_change_within_the_noise_is_no_regression():
    found = bench.compare(result_of([8, 9, 10, 11, 12]), result_of([8.1, 9, 10.5, 11, 13]))
    assert found["change"] > 0.03 and not found["regression"]


def test_too_few_repeats_say_so():
    found = bench.compare(result_of([1.0]), result_of([2.0]))
    assert not found["regression"] and "4 + 4 are needed" in found["sentence"]


def test_unlike_results_are_refused():
    other = copy.deepcopy(A)
    other["environment"]["governor"] = "ondemand"
    with pytest.raises(UsageError, match=r"environment\.governor is 'same' in the first and 'onde"):
        bench.compare(A, other)
    with pytest.raises(UsageError, match=r"second result is INVALID \(throttled\)"):
        bench.compare(A, A | {"verdict": "INVALID", "reasons": ["throttled"]})


# -- the worker itself -----------------------------------------------------------------------

SPEC = {"model": "m", "backend": "auto", "state": None, "threads": 1, "runs": 7, "seconds": 60} | {
    "warmup_runs": 3,
    "warmup_s": 0.0,
    "spawned_ns": 0,
}


def test_the_phases_run_in_order(monkeypatch):
    events = []

    def opener(spec):
        events.append("import")

        def load():
            events.append("load")
            return bench_worker.Subject(
                call=lambda: events.append("call"),
                about={},
                stages=lambda: events.append("stages") or {"head": lambda: None},
                parity=lambda: events.append("parity"),
            )

        return load

    monkeypatch.setattr(bench_worker, "opener", opener)
    try:
        row = bench_worker.measure(SPEC)
    finally:
        gc.unfreeze()
    assert events == ["import", "load", *["call"] * (1 + 3 + 7), "stages", "parity"]
    assert len(row["steady_ns"]) == 7 and row["warmup_runs"] == 3
    assert set(row) == set(ROW) and min(row["steady_ns"]) >= 0
    json.dumps(row)


def test_the_time_limit_ends_a_phase():
    assert len(bench_worker.timed(lambda: None, 10**9, 0.0)) == 1
    assert len(bench_worker.timed(lambda: None, 5, 0.0, both=True)) == 5


def test_a_missing_bundle_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.delenv("EDGESOLVE_PYTHON", raising=False)
    with pytest.raises(BundleError, match="nowhere"):
        bench.run_bench(tmp_path / "nowhere", quick=True)
