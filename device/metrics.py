"""What a Prometheus server can read off a running service (extra `metrics`).

Counters start at zero with the process: `edgesolve_start_time_seconds` says when that was.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from edgesolve.device import board
from edgesolve.device.atomic import unwritable
from edgesolve.device.errors import BackendError

STAGES = ("preprocess", "backbone", "head", "total")
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
# What every Prometheus reads; the library's own constant asks for version 3.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_MIB = 1 << 20
# Gauge: where it lies in the status, its factor, its help.
_FROM_STATUS = {
    "head_generation": (("generation",), 1, "Generation of the head in force; 0 is the factory's"),
    "head_age_seconds": (("head_age_s",), 1, "Age of the head in force"),
    "head_committed": (("committed",), 1, "1 once the head has passed its probation"),
    "anchor_agreement": (
        ("candidate", "gate", "anchor_agreement_new"),
        1,
        "Share of source anchors on which the candidate agrees with the original network",
    ),
    "anchor_accuracy": (
        ("candidate", "gate", "anchor_accuracy"),
        1,
        "Share of labelled anchors that the candidate gets right",
    ),
    "window_samples": (("window", "n"), 1, "Frames in the window"),
    "write_budget_bytes": (("write_budget_mib",), _MIB, "Bytes that may be written in a day"),
    "soc_temp_celsius": (("soc_temp_c",), 1, "Hottest thermal zone"),
    "cpu_freq_hertz": (("cpu_freq_mhz",), 1e6, "Present clock of the first CPU"),
    "power_watts": (("power_w",), 1, "Power, where the board has a sensor"),
}


def open_metrics() -> Metrics | Silent:
    """An own registry with all our metrics; `Silent` where prometheus_client is not installed."""
    try:
        return Metrics()
    except ImportError:
        return Silent()


class Metrics:
    """Everything that is exported. Any thread may render; no other method but `write_textfile` is slow."""

    def __init__(self) -> None:
        import prometheus_client as prometheus
        import prometheus_client.core as families

        self._families = families
        self._prometheus = prometheus
        self._registry = prometheus.CollectorRegistry()
        self._status: Mapping[str, Any] = {}
        self._written: float | None = None
        self._drift: dict[str, tuple[float, bool]] = {}
        self._solve: dict[str, float | None] = {}
        self._started = time.time()
        self._build = {"version": board.version("edgesolve") or "", "board": _board()}
        # Plain numbers for what happens on every frame, by one thread: the library's own histogram
        # takes a lock and a loop over the buckets each time, 50 µs a frame.
        self._stages = {stage: [0.0, *[0] * (len(BUCKETS_S) + 1)] for stage in STAGES}
        self._inferences = 0
        self._misses = 0
        self._errors = self._make(prometheus.Counter, "errors", "Frames not answered", "kind")
        self._decisions = self._make(
            prometheus.Counter, "recalibrations", "Passes, by how they ended", "decision", "reason"
        )
        self._rollbacks = self._make(prometheus.Counter, "rollbacks", "Heads withdrawn", "reason")
        self._skipped = self._make(prometheus.Counter, "skipped", "Passes not begun", "reason")
        self._registry.register(self)

    def observe(self, stage: str, seconds: float) -> None:
        """Time that one frame spent in one of STAGES; called by one thread, as are the next two."""
        told = self._stages[stage]
        told[1 + bisect_left(BUCKETS_S, seconds)] += 1
        told[0] += seconds

    def inference(self, n: int = 1) -> None:
        """`n` frames were answered."""
        self._inferences += n

    def error(self, kind: str) -> None:
        """A frame was not answered; `kind` comes from a short fixed list."""
        self._errors.labels(kind).inc()

    def deadline_miss(self) -> None:
        """A frame was answered too late."""
        self._misses += 1

    def drift(self, score: float, alarm: bool, test: str = "mean") -> None:
        """The last drift test."""
        self._drift[test] = float(score), bool(alarm)

    def decision(self, decision: str, reason: str) -> None:
        """A pass ended."""
        self._decisions.labels(decision, reason).inc()

    def rollback(self, reason: str) -> None:
        """A head was withdrawn."""
        self._rollbacks.labels(reason).inc()

    def skipped(self, reason: str) -> None:
        """A pass was not begun."""
        self._skipped.labels(reason).inc()

    def solve(
        self, seconds: float, relative_gap: float | None, condition: float | None = None
    ) -> None:
        """The last solve; None: not known, so not exported."""
        self._solve = {
            "solve_seconds": seconds,
            "solver_relative_gap": relative_gap,
            "solver_condition": condition,
        }

    def written(self, total_bytes: float) -> None:
        """Bytes written so far, by the state folder's own account (it survives restarts)."""
        self._written = float(total_bytes)

    def update(self, status: Mapping[str, Any]) -> None:
        """Set every gauge that `status` carries; what is missing or None is not exported."""
        self._status = status

    def render(self) -> tuple[bytes, str]:
        """The page and its content type."""
        return self._prometheus.generate_latest(_Exported(self._registry)), CONTENT_TYPE

    def write_textfile(self, path: str | Path) -> None:
        """The same page for node_exporter's textfile collector. Raises StateError.

        A rename and no fsync: readers never see half a page, and a page lost in a power cut is
        worth less than the wear; the folder belongs in a tmpfs.
        """
        try:
            self._prometheus.write_to_textfile(str(path), _Exported(self._registry))
        except OSError as error:
            raise unwritable(Path(path), error) from error

    def describe(self) -> list[Any]:
        """Nothing in advance (the registry asks): what is exported depends on the status."""
        return []

    def collect(self) -> Iterator[Any]:
        """The gauges, as families (the registry asks). One without a value is not a family at all."""
        status = self._status
        yield self._gauge(
            "start_time_seconds", "Unix time at which the counters were 0", [((), self._started)]
        )
        for name, (keys, factor, text) in _FROM_STATUS.items():
            yield self._gauge(name, text, [((), _scaled(_at(status, *keys), factor))])
        for name, value in self._solve.items():
            yield self._gauge(name, "Of the last solve", [((), value)])
        drift = self._drift or _drift(status)
        scores = [((test,), score) for test, (score, _) in sorted(drift.items())]
        alarms = [((test,), alarm) for test, (_, alarm) in sorted(drift.items())]
        yield self._gauge("drift_score", "Drift; 1 is the threshold", scores, "test")
        yield self._gauge("drift_alarm", "1 while the drift test alarms", alarms, "test")
        yield self._gauge("rss_bytes", "Resident memory", _rss(status), "process")
        yield self._gauge("throttled", "1 while it limits the clocks", _throttled(status), "reason")
        labels = (*self._build, "backend", "bundle_sha256")
        told = *self._build.values(), *(str(_at(status, k) or "") for k in labels[2:])
        yield self._gauge("build_info", "What runs here", [(told, 1)], *labels)
        yield self._counter("inferences", "Frames answered", self._inferences)
        yield self._counter("deadline_misses", "Frames answered too late", self._misses)
        written = _scaled(_at(status, "written_total_mib"), _MIB)
        written = written if self._written is None else self._written
        yield self._counter("bytes_written", "Bytes written to the state folder", written)
        yield self._seconds()

    def _seconds(self) -> Any:
        family = self._families.HistogramMetricFamily(
            "edgesolve_inference_seconds", "Time of a stage", labels=("stage",)
        )
        bounds = [*map(str, BUCKETS_S), "+Inf"]
        for stage, (total, *counts) in self._stages.items():
            upto = list(zip(bounds, accumulate(counts), strict=True))
            family.add_metric((stage,), upto, total)
        return family

    def _counter(self, name: str, text: str, value: float | None) -> Any:
        return self._families.CounterMetricFamily(f"edgesolve_{name}", text, value=value)

    def _gauge(self, name: str, text: str, samples: list[tuple], *labels: str) -> Any:
        family = self._families.GaugeMetricFamily(f"edgesolve_{name}", text, labels=labels)
        for values, value in samples:
            if value is not None:
                family.add_metric(values, float(value))
        return family

    def _make(self, kind: Any, name: str, text: str, *labels: str, **more: Any) -> Any:
        return kind(f"edgesolve_{name}", text, labels, registry=self._registry, **more)


class _Exported:
    """A registry without the library's `_created` series (half the page; our start time is one
    gauge) and without families that have no sample. Its own switch for that is a global."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Any]:
        for family in self._registry.collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            if family.samples:
                yield family


class Silent:
    """Stands in for Metrics where prometheus_client is missing: takes everything, exports nothing."""

    def _take(self, *_: Any, **__: Any) -> None:
        """Accepted and forgotten."""

    observe = inference = error = deadline_miss = drift = decision = rollback = _take
    skipped = solve = written = update = _take

    def render(self) -> tuple[bytes, str]:
        """Raises BackendError."""
        raise BackendError(
            "metrics need prometheus_client, which is not installed: pip install 'edgesolve[metrics]'"
        )

    def write_textfile(self, path: str | Path) -> None:
        """Raises BackendError."""
        self.render()


def _at(status: Mapping[str, Any], *keys: str) -> Any:
    """The value below `keys`, None where any of them is missing or None."""
    found: Any = status
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None or math.isnan(value) else value * factor


def _drift(status: Mapping[str, Any]) -> dict[str, tuple[float, bool]]:
    score = _at(status, "drift", "score")
    return {} if score is None else {"mean": (score, bool(_at(status, "drift", "alarm")))}


def _rss(status: Mapping[str, Any]) -> list[tuple]:
    return [
        (("inference",), _scaled(_at(status, "rss_mib"), _MIB)),
        (("recalibration",), _scaled(_at(status, "adapting", "rss_mib"), _MIB)),
    ]


def _throttled(status: Mapping[str, Any]) -> list[tuple]:
    now = _at(status, "throttled")
    return [] if now is None else [((r,), r in now) for r in board.THROTTLE_BITS.values()]


def _board() -> str:
    return board.model() or board.soc() or ""
