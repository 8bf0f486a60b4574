"""Do torch, ONNX Runtime and LiteRT agree; and is the exported head the solver's?"""

from __future__ import annotations

from typing import Any

import numpy as np
import real_data
from environment import edgesolve, say
from figures import Figure, at_most
from job import RECIPES, Job
from main_accuracy import original_logits

from edgesolve.device.bundle import Bundle, open_bundle
from edgesolve.device.runtime import factory_head, open_runtime, source_statistics
from edgesolve.device.teacher import open_teacher
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.ridge import ridge

LOGITS = 1e-4
HEAD = 1e-5


def run(job: Job) -> tuple[list[Figure], dict[str, Any]]:
    figures, details = [], {}
    for name in job.names("resnet56", "resnet20", "dscnn"):
        bundle, title = open_bundle(job.bundle(name)), RECIPES[name].title
        x = job.test(name).x[: job.size(1000, 200)]
        say(f"parity of {name} on {len(x)} test items")
        pairs = _pairs(job, name, bundle, x)
        details[name] = {}
        for what, (a, b) in pairs.items():
            worst, same = float(np.abs(a - b).max()), int((a.argmax(1) == b.argmax(1)).sum())
            largest = float(np.abs(a).max())
            details[name][what] = {"max_abs": worst, "same": same, "largest_logit": largest}
            figures.append(_row(f"{title}: {what}", worst, same, len(x), largest))
        verified = edgesolve("verify", bundle.path)
        details[name]["verify"] = verified.report["backends"]
        figures += [_verify(title, kind, e, verified.command) for kind, e in _kinds(verified)]
        relative = exported_head(bundle)
        details[name]["head"] = relative
        figures.append(
            at_most(
                f"{title}: exported head, relative to the float64 re-solve on the anchors",
                relative["re-solved"],
                HEAD,
                measured=f"{relative['re-solved']:.1e}",
                baseline=f"the same float64 weights rounded to float32: {relative['rounded']:.1e}",
            )
        )
    return figures, details


def _pairs(job: Job, name: str, bundle: Bundle, x: np.ndarray) -> dict[str, tuple]:
    reference = _torch_logits(name, bundle, x)
    source = source_statistics(bundle)
    teacher = {
        kind: open_teacher(bundle, kind, job.threads).run(x, 0.0, source.mean, source.var).logits
        for kind in bundle.backends
    }
    student = {
        kind: open_runtime(bundle, backend=kind, threads=job.threads).logits(x)
        for kind in bundle.backends
    }
    return {
        "original, torch / ONNX": (reference, original_logits(job, name, x)),
        "teacher graph, torch / ONNX": (reference, teacher["onnx"]),
        "teacher graph, torch / LiteRT": (reference, teacher["litert"]),
        "bundle, ONNX / LiteRT": (student["onnx"], student["litert"]),
    }


def _torch_logits(name: str, bundle: Bundle, x: np.ndarray) -> np.ndarray:
    """The unchanged network in torch, from our definition and the published weights alone."""
    import networks
    import torch
    from safetensors.torch import load_file

    depths = {"resnet20": 20, "resnet56": 56}
    model = networks.cifar_resnet(depths[name]) if name in depths else networks.dscnn()
    model.load_state_dict(load_file(real_data.weights(RECIPES[name].weights)), strict=False)
    frames = torch.from_numpy(np.moveaxis(x, -1, 1).astype(np.float32))
    if name in depths:
        mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        mean, std = (torch.tensor(v)[:, None, None] for v in (mean, std))
        frames = (frames / 255 - mean) / std
    with torch.no_grad():
        return torch.cat([model.eval()(part) for part in frames.split(100)]).numpy()


def _row(what: str, worst: float, same: int, n: int, largest: float) -> Figure:
    return Figure(
        what,
        f"{worst:.1e}, same top-1 on {same} of {n}",
        f"≤ {LOGITS:.0e}, all",
        worst <= LOGITS and same == n,
        f"largest logit {largest:.1f}",
        value=worst,
    )


def _kinds(verified):
    return [(k, e) for k, e in verified.report["backends"].items() if "skipped" not in e]


def _verify(title: str, kind: str, entry: dict[str, Any], command: str) -> Figure:
    """The bundle's own 32 frames: logits of the student, torch against this runtime."""
    return Figure(
        f"{title}: bundle, torch / {kind}, the build's 32 frames",
        f"{entry['logits']:.1e}, same top-1 on {entry['top1']:.0%}",
        f"≤ {LOGITS:.0e}, all",
        entry["logits"] <= LOGITS and entry["top1"] == 1.0,
        f"re-normalised rows {entry.get('adapted_rows', float('nan')):.1e}, "
        f"teacher {entry['teacher']:.1e}",
        command,
        entry["logits"],
    )


def exported_head(bundle: Bundle) -> dict[str, float]:
    """Largest difference on the anchor rows, relative to the largest prediction.

    `re-solved`: the shipped float32 head in float32, against a float64 solve from the shipped moments (whose
    covariance is float32). `rounded`: what rounding that solve's weights alone costs.
    """
    reference = bundle.arrays("reference.safetensors")
    prefix = "moments."
    arrays = {k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)}
    solved = ridge(Moments.from_arrays(arrays), bundle.manifest["solve"]["ridge"])
    anchors = reference["anchor_rows"]
    exact = anchors.astype(np.float64) @ solved.weights + solved.intercept
    shipped = factory_head(bundle)(anchors.astype(np.float32))
    rounded = anchors.astype(np.float64) @ solved.weights.astype(np.float32) + solved.intercept
    largest = np.abs(exact).max()
    return {
        "re-solved": float(np.abs(shipped - exact).max() / largest),
        "rounded": float(np.abs(rounded - exact).max() / largest),
    }
