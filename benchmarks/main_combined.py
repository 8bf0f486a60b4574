"""Head, decomposition and int8 together: bytes, latency and accuracy beside the original network."""

from __future__ import annotations

from typing import Any

from environment import edgesolve, say
from figures import Figure, at_least, at_most
from job import RECIPES, Job
from main_accuracy import original_predictions, percent, predictions

from edgesolve.device.runtime import open_runtime

NAME = "resnet56_small"


def run(job: Job) -> tuple[list[Figure], dict[str, Any]]:
    if not job.names(NAME):
        return [], {}
    bundle, test = job.bundle(NAME), job.test(NAME)
    built, title = job.builds[NAME], RECIPES[NAME].title
    test = test.take(slice(job.size(len(test), 500)))
    say(f"accuracy of {NAME} on {len(test)} test items")
    right = {
        backend: percent(
            predictions(open_runtime(bundle, backend=backend, threads=job.threads), test.x)
            == test.y
        )
        for backend in ("onnx-int8", "onnx")
    }
    base = percent(original_predictions(job, NAME, test.x) == test.y)
    (row,) = built["report"]["int8"]
    before = built["report"]["bytes"]["before"]
    say(f"bench {NAME}")
    took = {backend: _bench(job, backend) for backend in right}
    ours = took["onnx-int8"]
    figures = [
        at_least(
            f"{title}: bytes of the original's ONNX file over backbone and head",
            before / row["bytes"],
            6.0,
            " times",
            baseline=f"{before:,} bytes; ours {row['bytes']:,}, in float {row['float_bytes']:,}",
            command=built["command"],
        ),
        at_least(
            f"{title}: p50 of the original over ours, batch 1, one thread, ONNX Runtime",
            ours["ratio"],
            2.0,
            " times",
            baseline=f"{ours['against']['p50_ms']:.3f} ms; ours {ours['p50_ms']:.3f}, in float "
            f"{took['onnx']['ratio']:.2f} times; {ours['verdict']} {', '.join(ours['warnings'])}",
            command=ours["command"],
        ),
        at_most(
            f"{title}: points lost on {len(test):,} test images",
            base - right["onnx-int8"],
            1.5,
            baseline=f"{base:.2f} %; ours {right['onnx-int8']:.2f} %, in float {right['onnx']:.2f} %",
            command=built["command"],
        ),
    ]
    keys = ("p50_ms", "ratio", "ratio_ci", "verdict", "warnings")
    details = {
        "accuracy": right,
        "original_accuracy": base,
        "bench": {k: {j: v[j] for j in keys} for k, v in took.items()},
        "int8": row,
    }
    return figures, details


def _bench(job: Job, backend: str) -> dict[str, Any]:
    args = ("--against", job.original(NAME), "--backend", backend, "--threads", 1)
    args += ("--state", job.state(f"bench_{NAME}"), *["--quick"] * job.quick)
    done = edgesolve("bench", job.bundle(NAME), *args)
    return {**done.report, "command": done.command}
