"""One repeat of the benchmark, in its own process: `python -m edgesolve.device.bench_worker JSON`.

The phases import, load, first, warmup and steady are timed apart; the result is one JSON line, the
last on stdout. A parent that measures the start passes `spawned_ns`, its monotonic clock.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from edgesolve.device import board
from edgesolve.device.errors import EdgeError

_LIBRARIES = {"onnx": "onnxruntime", "litert": "ai_edge_litert.interpreter"}
_STAGE_RUNS = 30


@dataclass(frozen=True)
class Subject:
    """What is timed: `call` is one inference on arrays that already exist.

    `stages()` gives its parts as calls, `parity()` how far its answers are from those recorded.
    """

    call: Callable[[], Any]
    about: dict[str, Any]
    stages: Callable[[], dict[str, Callable[[], Any]]] = dict
    parity: Callable[[], dict[str, float] | None] = lambda: None


def opener(spec: dict[str, Any]) -> Callable[[], Subject]:
    """Import what the model needs; the function returned loads it. The one seam to the runtimes."""
    path, threads = spec["model"], spec["threads"]
    if Path(path).suffix in (".onnx", ".tflite"):
        from edgesolve.device.graph import BACKENDS, open_graph

        _import(next(name for name, end in BACKENDS.items() if path.endswith(end)))
        return lambda: _graph_subject(open_graph(path, threads=threads))
    from edgesolve.device.bundle import open_bundle
    from edgesolve.device.runtime import choose_backend, open_runtime

    bundle = open_bundle(path)
    backend = choose_backend(bundle, spec["backend"])
    _import(bundle.runtime(backend))
    options = {"backend": backend, "state": spec["state"], "threads": threads}
    return lambda: _bundle_subject(open_runtime(path, **options))


def _import(runtime: str) -> None:
    with suppress(ImportError):  # opening the model says it in a sentence, or has another library
        import_module(_LIBRARIES[runtime])


def _bundle_subject(runtime) -> Subject:
    frames = runtime.example(1)

    def stages():
        rows = runtime.rows(frames)
        return {"backbone": lambda: runtime.rows(frames), "head": lambda: runtime.head(rows)}

    about = {
        "backend": runtime.backend,
        "runtime": runtime.graph.runtime,
        "generation": runtime.generation,
        "inputs": [[list(frames.shape), str(frames.dtype)]],
    }
    return Subject(lambda: runtime.logits(frames), about, stages, runtime.parity)


def _graph_subject(graph) -> Subject:
    import numpy as np

    rng = np.random.default_rng(0)
    arrays = []
    for _, shape, dtype in graph.inputs:
        shape = tuple(size or 1 for size in shape)
        values = rng.random(shape) if np.dtype(dtype).kind == "f" else rng.integers(0, 128, shape)
        arrays.append(values.astype(dtype))
    about = {"runtime": graph.runtime, "inputs": [[list(a.shape), str(a.dtype)] for a in arrays]}
    return Subject(lambda: graph(*arrays), about)


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """All phases of one repeat; times in ns or, where the name says so, in ms."""
    clock = time.perf_counter_ns
    memory = {"start": board.rss_mib()}
    started = clock()
    load = opener(spec)
    imported = clock()
    memory["import"] = board.rss_mib()
    subject = load()
    loaded = clock()
    memory["load"] = board.rss_mib()
    before_first = clock()
    subject.call()
    first = clock()
    cold_ns = time.monotonic_ns() - spec["spawned_ns"]
    memory["first"] = board.rss_mib()
    before = snapshot()
    warmup = timed(subject.call, spec["warmup_runs"], spec["warmup_s"], both=True)
    gc.collect()
    gc.freeze()
    steady = timed(subject.call, spec["runs"], spec["seconds"])
    after = snapshot()
    memory |= {"steady": board.rss_mib(), "peak": board.peak_rss_mib(), **board.shared_memory_mib()}
    stages = {
        name: sorted(timed(call, _STAGE_RUNS, spec["seconds"]))
        for name, call in subject.stages().items()
    }
    return {
        "import_ms": (imported - started) / 1e6,
        "load_ms": (loaded - imported) / 1e6,
        "first_ms": (first - before_first) / 1e6,
        "cold_start_ms": cold_ns / 1e6,
        "warmup_runs": len(warmup),
        "steady_ns": steady,
        "stages_ms": {name: times[len(times) // 2] / 1e6 for name, times in stages.items()},
        "memory_mib": memory,
        "before": before,
        "after": after,
        "parity": subject.parity(),
        "about": subject.about,
    }


def timed(call: Callable[[], Any], runs: int, seconds: float, *, both: bool = False) -> list[int]:
    """Nanoseconds of each call, back to back, until `runs` or `seconds` is reached (or `both`)."""
    clock = time.perf_counter_ns
    times: list[int] = []
    end = clock() + int(seconds * 1e9)
    reached = all if both else any
    while True:
        began = clock()
        call()
        ended = clock()
        times.append(ended - began)
        if reached((len(times) >= runs, ended >= end)):
            return times


def snapshot() -> dict[str, Any]:
    """The state of the board that may spoil a measurement."""
    return {
        **board.clocks(),
        "temperature_c": board.temperature_c(),
        "throttled": board.throttled(since_boot=False),
        "swapped_mib": board.swapped_mib(),
    }


def main() -> int:
    """Print the result of one repeat, or the error of ours that prevented it."""
    try:
        result = measure(json.loads(sys.argv[1]))
    except EdgeError as error:
        result = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
