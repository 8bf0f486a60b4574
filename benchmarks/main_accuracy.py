"""Accuracy and size: the bundle beside the unchanged network, both in ONNX Runtime, on test items."""

from __future__ import annotations

from typing import Any

import numpy as np
from environment import say
from figures import Figure, at_least, plain
from job import RECIPES, Job

from edgesolve.device.graph import open_graph
from edgesolve.device.runtime import open_runtime

BARS = {"resnet56": (92.0, 92.8, 220_000), "resnet20": (90.2, 91.0, None)}


def run(job: Job) -> tuple[list[Figure], dict[str, Any]]:
    figures, details = [], {}
    for name in job.names("resnet56", "resnet20", "dscnn"):
        bundle, test = job.bundle(name), job.test(name)
        test = test.take(slice(job.size(len(test), 2000)))
        say(f"accuracy of {name} on {len(test)} test items")
        student = predictions(open_runtime(bundle, backend="onnx", threads=job.threads), test.x)
        original = original_predictions(job, name, test.x)
        details[name] = {
            "n": len(test),
            "accuracy": percent(student == test.y),
            "original_accuracy": percent(original == test.y),
            "agreement": percent(student == original),
            "build": {k: v for k, v in job.builds[name].items() if k != "report"},
            "report": _sizes(job.builds[name]["report"]),
        }
        figures += _figures(name, details[name])
    return figures, details


def _figures(name: str, d: dict[str, Any]) -> list[Figure]:
    title, command = RECIPES[name].title, d["build"]["command"]
    size, head = d["report"], d["report"]["head"]
    error = 100 * np.sqrt(0.01 * d["accuracy"] * (1 - 0.01 * d["accuracy"]) / d["n"])
    what = f"{title}, test accuracy on {d['n']:,} (s.e. {error:.1f})"
    measured = f"{d['accuracy']:.2f} %, agreement {d['agreement']:.2f} %"
    more = {
        "measured": measured,
        "baseline": f"original {d['original_accuracy']:.2f} %",
        "command": command,
    }
    if name not in BARS:
        rows = [plain(what, d["accuracy"], **more)]
    else:
        bar, stretch, replaced = BARS[name]
        note = f" (stretch {stretch} {'met' if d['accuracy'] >= stretch else 'not met'})"
        rows = [at_least(what, d["accuracy"], bar, bar_note=note, **more)]
        if replaced:
            what = f"{title}, parameters that the head stands for"
            rows.append(_replaced(what, head["replaced_params"], replaced, size))
    for what, key in (("parameters", "params"), ("multiply-adds", "macs"), ("ONNX bytes", "bytes")):
        before, after = size[key]["before"], size[key]["after"]
        ratio = f"{after:,} ({after / before:.3f} of the original)"
        rows.append(plain(f"{title}, {what}", after, measured=ratio, baseline=f"{before:,}"))
    return rows


def _replaced(what: str, found: int, bar: int, size: dict[str, Any]) -> Figure:
    head = size["head"]["params"]
    return Figure(
        what,
        f"{found:,}, by {head:,}",
        f"≥ {bar:,}",
        found >= bar,
        f"{size['params']['before']:,} in the original",
        value=float(found),
    )


def _sizes(report: dict[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("split", "params", "macs", "bytes", "head", "agreement")}


def predictions(runtime, x: np.ndarray) -> np.ndarray:
    """Classes (n,) from an opened bundle."""
    return runtime.logits(x).argmax(1)


def original_predictions(job: Job, name: str, x: np.ndarray) -> np.ndarray:
    return original_logits(job, name, x).argmax(1)


def original_logits(job: Job, name: str, x: np.ndarray) -> np.ndarray:
    """Logits (n, c) of the unchanged network, exported by the same build."""
    graph = open_graph(str(job.original(name)), threads=job.threads)
    step = 100
    return np.concatenate([graph(x[i : i + step])[0] for i in range(0, len(x), step)])


def percent(hits: np.ndarray) -> float:
    return 100.0 * float(np.mean(hits))
