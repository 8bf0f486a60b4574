"""`edgesolve bench`: how fast a bundle answers on this board, and whether to trust the figure.

Each repeat is a fresh process (bench_worker.py); `--against` interleaves another model's repeats.
Nothing is printed to stdout: progress goes to stderr, the result is a dict (schema 1).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgesolve.device import board, errors
from edgesolve.device.atomic import sha256_file
from edgesolve.device.bench_report import html, table
from edgesolve.device.bench_stats import bootstrap_interval, bound_rank, permutation_p, summary
from edgesolve.device.errors import BackendError, InputError, UsageError

__all__ = ["compare", "html", "run_bench", "table"]

SCHEMA = 1
PARITY_TOP1 = 0.99
SLOWER = 0.03
SIGNIFICANT = 0.05
_CLOCK_DRIFT = 0.05
# What two results must share before one may be called slower than the other.
_ALIKE = ("board", "soc", "machine", "cpus", "governor", "scaling_max_mhz", "threads", "nvpmodel")


def run_bench(
    bundle: str | Path,
    *,
    backend: str = "auto",
    state: str | Path | None = None,
    threads: int = 1,
    repeats: int | None = None,
    runs: int | None = None,
    seconds: float | None = None,
    quick: bool = False,
    against: str | Path | None = None,
) -> dict[str, Any]:
    """Measure the steady mode: by default 5 processes of 200 runs or 12 s each, first reached.

    `quick`: one process, 64 runs or 10 s. `against`: a .onnx or .tflite measured in alternation.
    Keys are those of the design (`verdict`, `reasons`, `p50_ms`, …); percentiles that the number
    of runs can't support are None. Raises the worker's own EdgeError, or BackendError if it died.
    """
    repeats = repeats or (1 if quick else 5)
    spec = {
        "backend": backend,
        "state": None if state is None else str(state),
        "threads": threads,
        "runs": runs or (64 if quick else 200),
        "seconds": seconds or (10.0 if quick else 12.0),
        "warmup_runs": 10,
        "warmup_s": 0.2 if quick else 2.0,
    }
    models = [str(bundle)] + ([] if against is None else [_against(against)])
    before = board.environment(threads=threads)
    rows: dict[str, list[dict[str, Any]]] = {model: [] for model in models}
    interrupted = False
    try:
        for repeat in range(repeats):
            for model in models:
                row = _worker({**spec, "model": model})
                rows[model].append(row)
                p50 = statistics.median(row["steady_ns"]) / 1e6
                _progress(f"{repeat + 1}/{repeats} {Path(model).name}: {p50:.3f} ms")
    except KeyboardInterrupt:
        interrupted = True
        if not all(rows.values()):
            raise
    after = board.environment(threads=threads)
    ours = rows[models[0]]
    result = {
        "schema": SCHEMA,
        "mode": "steady",
        **_verdict(ours, before, after, interrupted=interrupted, quick=quick),
        "repeats": len(ours),
        **_figures(models[0], ours),
        "energy_j": None,
        "parity": ours[-1]["parity"],
        "protocol": {key: spec[key] for key in ("runs", "seconds", "warmup_runs", "warmup_s")},
        "clock_resolution_ns": time.get_clock_info("perf_counter").resolution * 1e9,
        "edgesolve": board.version("edgesolve"),
        "command": sys.argv[1:],
        "environment": before,
        "temperature_c": [before["temperature_c"], after["temperature_c"]],
    }
    if against is not None:
        result |= _versus(models[1], ours, rows[models[1]])
    return result


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Whether result `b` is slower than `a`: `regression` is True at > 3 % and p < 0.05.

    An exact permutation test on the repeats' medians; with fewer than 4 + 4 repeats no p-value can
    be that small, and `sentence` says so. Raises UsageError for results that can't be compared.
    """
    for name, result in (("first", a), ("second", b)):
        if result.get("verdict") != "VALID":
            found = f"{result.get('verdict')} ({', '.join(result.get('reasons', []))})"
            raise UsageError(f"the {name} result is {found}, expected VALID: measure it again.")
    pairs = {f"environment.{key}": (a["environment"], b["environment"], key) for key in _ALIKE}
    pairs |= {key: (a, b, key) for key in ("mode", "backend")}
    for name, (left, right, key) in pairs.items():
        if left.get(key) != right.get(key):
            raise UsageError(
                f"the results are not comparable: {name} is {left.get(key)!r} in the first and "
                f"{right.get(key)!r} in the second."
            )
    change = b["p50_ms"] / a["p50_ms"] - 1
    p = permutation_p(a["medians_ms"], b["medians_ms"])
    smallest = permutation_p([0.0] * len(a["medians_ms"]), [1.0] * len(b["medians_ms"]))
    regression = change > SLOWER and p < SIGNIFICANT
    sentence = f"p50 {a['p50_ms']:.3f} -> {b['p50_ms']:.3f} ms ({change:+.1%}, p = {p:.3f})"
    if smallest >= SIGNIFICANT:
        sentence += "; too few repeats to tell: 4 + 4 are needed"
    return {
        "regression": bool(regression),
        "change": change,
        "p": p,
        "p50_ms": [a["p50_ms"], b["p50_ms"]],
        "sentence": f"{sentence}.",
    }


def _against(path: str | Path) -> str:
    if Path(path).suffix not in (".onnx", ".tflite") or not Path(path).is_file():
        raise InputError(f"{path}: expected an existing .onnx or .tflite file to measure against.")
    return str(path)


def _worker(spec: dict[str, Any]) -> dict[str, Any]:
    """One repeat in a fresh process."""
    threads = str(spec["threads"])
    libraries = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    command = [*board.python_command(), "-m", "edgesolve.device.bench_worker"]
    text = json.dumps({**spec, "spawned_ns": time.monotonic_ns()})
    done = subprocess.run(
        [*command, text],
        capture_output=True,
        text=True,
        env={**os.environ, **dict.fromkeys(libraries, threads)},
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BackendError(
            f"the benchmark process ended with status {done.returncode} ({last}). "
            "Run `edgesolve doctor`: it names runtimes that crash on this board."
        )
    row = json.loads(lines[-1])
    if "error" in row:
        raise getattr(errors, row["kind"])(row["error"])
    return row


def _figures(model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is reported of one model: latencies pooled, phases as the median over the repeats."""

    def middle(pick) -> float | None:
        found = [value for row in rows if (value := pick(row)) is not None]
        return statistics.median(found) if found else None

    return {
        "model": {"name": Path(model).name, "sha256": _model_hash(Path(model))},
        **rows[-1]["about"],
        **summary(_times_ms(rows)),
        **{
            name: middle(lambda row, name=name: row[name])
            for name in ("import_ms", "load_ms", "first_ms", "cold_start_ms")
        },
        "peak_rss_mib": max(row["memory_mib"]["peak"] for row in rows),
        "memory_mib": {
            name: middle(lambda row, name=name: row["memory_mib"][name])
            for name in rows[-1]["memory_mib"]
        },
        "stages": {
            name: middle(lambda row, name=name: row["stages_ms"][name])
            for name in rows[-1]["stages_ms"]
        },
        "runs_ms": [[round(t, 6) for t in times.tolist()] for times in _times_ms(rows)],
    }


def _versus(model: str, ours: list[dict], theirs: list[dict]) -> dict[str, Any]:
    """The other model's figures, and `ratio`: its median over ours (above 1, ours is faster)."""
    pairs = zip(_times_ms(theirs), _times_ms(ours), strict=False)
    ratios = [np.array([np.median(their) / np.median(our)]) for their, our in pairs]
    figures = _figures(model, theirs)
    return {
        "against": figures,
        "ratio": float(np.median(ratios)),
        "ratio_ci": bootstrap_interval(ratios) if len(ratios) > 1 else None,
    }


def _times_ms(rows: list[dict[str, Any]]) -> list[np.ndarray]:
    return [np.array(row["steady_ns"]) / 1e6 for row in rows]


def _model_hash(path: Path) -> str | None:
    file = path / "manifest.json" if path.is_dir() else path
    return sha256_file(file) if file.is_file() else None


def _verdict(rows, before, after, *, interrupted: bool, quick: bool) -> dict[str, Any]:
    """`verdict`, and the `reasons` against trusting the figures, and `warnings`."""
    snapshots = [row[when] for row in rows for when in ("before", "after")]
    limits = {limit for shot in snapshots for limit in shot["throttled"] or ()}
    # Set since boot, but not before we began: it came and went during the measurement.
    limits |= {*(after["throttled_since_boot"] or ())} - {*(before["throttled_since_boot"] or ())}
    parity = rows[-1]["parity"]
    found = {
        "throttled": "throttled" in limits,
        "under_voltage": "under_voltage" in limits,
        "frequency_capped": bool(limits & {"frequency_capped", "soft_temp_limit"}),
        "clock_changed": _clock_changed(rows, snapshots),
        "swapped": any((shot["swapped_mib"] or 0) > 0 for shot in snapshots),
        "parity_failed": parity is not None and parity["top1"] < PARITY_TOP1,
        "too_few_runs": bound_rank(sum(len(row["steady_ns"]) for row in rows), 50) is None,
        "interrupted": interrupted,
        "emulated": before["emulated"],
    }
    reasons = [reason for reason, holds in found.items() if holds]
    governor, load = before["governor"], before["load"]
    warned = {
        f"governor={governor}": governor not in (None, "performance"),
        f"load={load}": load is not None and load >= 1,
        "quick": quick,
        "no_temperature_sensor": before["temperature_c"] is None,
    }
    return {
        "verdict": "INVALID" if reasons else "VALID",
        "reasons": reasons,
        "warnings": [warning for warning, holds in warned.items() if holds],
    }


def _clock_changed(rows, snapshots) -> bool:
    if len({(s["governor"], s["scaling_min_mhz"], s["scaling_max_mhz"]) for s in snapshots}) > 1:
        return True
    # Right after the steady phase: between repeats a governor may well slow an idle CPU.
    busy = [row["after"]["scaling_cur_mhz"] for row in rows if row["after"]["scaling_cur_mhz"]]
    return bool(busy) and max(busy) > (1 + _CLOCK_DRIFT) * min(busy)


def _progress(line: str) -> None:
    print(f"bench {line}", file=sys.stderr, flush=True)
