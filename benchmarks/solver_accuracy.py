"""Accuracy from few labels: the convex gated head beside Adam's heads of equal size, and the ablations.

    python benchmarks/solver_accuracy.py [--quick] [--seeds 5] [--out bench_out]

CIFAR-10, 10 to 100 labelled samples of each class, ResNet-20 frozen and without its last block (solver_fewshot.py).
Progress on stderr, tables on stdout, OUT/solver_accuracy.json and .png. A missed bar is printed as MISSED.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import solver_ablations
import solver_adam
import torch
from environment import ROOT, environment, say
from figures import Figure, at_least, plain, plain_rows, text
from solver_fewshot import CLASSES, Draw, Features, grouped, ridge_by_loo

from edgesolve.kernels.fista import fista
from edgesolve.kernels.losses import SquaredRows
from edgesolve.kernels.penalties import GroupL2, lam_max
from edgesolve.kernels.polish import one_vs_all_polish
from edgesolve.kernels.softmax import Softmax
from edgesolve.kernels.solve import solve

RATIO = 0.03
"""lam of every group penalty here, as a share of its lam_max."""

SHARE = 0.1
"""The ridge beside a group penalty or a cross-entropy, as a share of leave-one-out's for the squared loss: the
penalty shrinks as well, and p (1 - p) of ten equal classes is 0.09."""

NAMES = {
    "linear": "linear probe, ridge",
    "features": "random ReLU features, ridge",
    "ridge": "gated, ridge (ours)",
    "filters": "gated by 16 of the removed block's filters, ridge",
    "group": "gated, joint group-l2 + ridge",
    "softmax": "gated, softmax + ridge",
    "polish": "gated, one-vs-all + polish",
    "adam_chosen": "Adam, ReLU convolution, chosen",
    "adam_chosen_ce": "Adam, ReLU convolution, cross-entropy, chosen",
    "adam_chosen_sq": "Adam, ReLU convolution, squared error, chosen",
    "adam_best": "Adam, ReLU convolution, best of grid",
    "vector_chosen": "Adam, ReLU vector head, chosen",
    "vector_best": "Adam, ReLU vector head, best of grid",
}


def run(options) -> tuple[list[Figure], dict[str, Any]]:
    """`options` has out and quick, and may have seeds. One thread: every time here is CPU seconds."""
    torch.set_num_threads(1)
    out, quick = options.out, options.quick
    out.mkdir(parents=True, exist_ok=True)
    seeds = range(2 if quick else getattr(options, "seeds", 5))
    features = Features.load(out.parent if quick else out, quick)
    draws = [features.draw(seed) for seed in seeds]
    table, details = _accuracy(features, draws, (10, 25) if quick else (10, 25, 50, 100), quick)
    figures = _figures(table, draws[0])
    more, ablations = solver_ablations.run(draws, 10 if quick else 50, quick)
    details |= {"accuracy": table, "ablations": ablations}
    _plot(table, ablations["curves"], out)
    return figures + more, details


def _accuracy(features, draws, ks, quick):
    """{k: {method: {"accuracy": [...], "cpu_s": [...]}}} over the draws."""
    pilot = features.draw(solver_adam.PILOT)
    stored = CLASSES * (draws[0].gated.shape[1] + 1)
    hidden = solver_adam.hidden_of(stored, pilot.z.shape[2])
    settings, table = {}, {k: {name: {"accuracy": [], "cpu_s": []} for name in NAMES} for k in ks}
    for k in ks:
        for name, z in (("adam", pilot.z), ("vector", pilot.linear)):
            found = solver_adam.choose(pilot, z, k, hidden, quick)
            settings |= {(k, f"{name}_{which}"): setting for which, setting in found.items()}
            say(f"{k} a class, {name}: { ({which: tuple(s) for which, s in found.items()}) }")
    for draw in draws:
        for k in ks:
            for name, accuracy, seconds in _methods(draw, k, hidden, settings):
                table[k][name]["accuracy"].append(accuracy)
                table[k][name]["cpu_s"].append(seconds)
            last = {name: round(v["accuracy"][-1], 1) for name, v in table[k].items()}
            say(f"seed {draw.seed}, {k} a class: {last}")
    chosen = {f"{k} {name}": s._asdict() for (k, name), s in settings.items()}
    return table, {"stored": stored, "hidden": hidden, "settings": chosen}


def _methods(draw: Draw, k: int, hidden: int, settings):
    """Yields (method, accuracy, CPU seconds of the fit)."""
    n, Y = CLASSES * k, draw.labels(k)
    ridges = {}
    for name, rows in (
        ("linear", draw.linear),
        ("features", draw.random_features),
        ("ridge", draw.gated),
        ("filters", draw.filtered),
    ):
        began = time.process_time()
        U, b, ridges[name] = ridge_by_loo(rows[:n], Y)
        seconds = time.process_time() - began
        yield name, draw.accuracy(rows, U, b), seconds
    for name, fit in (("group", _group), ("softmax", _softmax), ("polish", _polish)):
        began = time.process_time()
        found = fit(grouped(draw.gated[:n]), Y, ridges["ridge"])
        seconds = time.process_time() - began
        yield name, draw.accuracy(draw.gated, found.weights, found.intercept), seconds
    before = {}
    for name in (name for name in NAMES if (k, name) in settings):
        z, setting = (draw.z if "adam" in name else draw.linear), settings[k, name]
        key = (z.ndim, setting)
        before[key] = before.get(key) or solver_adam.final(draw, z, k, hidden, setting)
        yield name, *before[key]


def _group(design, Y, ridge):
    loss = SquaredRows.of(design, Y, SHARE * ridge)
    top = lam_max(loss, GroupL2(1.0, design.starts))
    return solve(loss, GroupL2(RATIO * top, design.starts), tol=1e-4)


def _softmax(design, Y, ridge):
    loss = Softmax.of(design, Y, SHARE * ridge)
    return fista(loss, GroupL2(0.0, design.starts), tol=1e-2, max_iter=150)


def _polish(design, Y, ridge):
    return one_vs_all_polish(
        design, Y, ratio=RATIO, polish_ratio=RATIO, ridge=SHARE * ridge, tol=1e-3
    )


def _figures(table, draw: Draw) -> list[Figure]:
    figures = []
    for k, methods in table.items():
        ours, adam = (np.array(methods[name]["accuracy"]) for name in ("ridge", "adam_chosen"))
        what = f"{k} samples a class: gated head less Adam's ReLU head of equal size, same draws"
        figures.append(
            at_least(
                what,
                float((ours - adam).mean()),
                0.0,
                " points",
                measured=f"{spread(ours - adam)} points",
                baseline=f"ours {spread(ours)}, Adam {spread(adam)}, "
                f"best of grid {spread(methods['adam_best']['accuracy'])} %",
            )
        )
    for k, methods in table.items():
        for name, found in methods.items():
            value = float(np.mean(found["accuracy"]))
            measured = f"{spread(found['accuracy'])} %, {np.median(found['cpu_s']):.2f} CPU s"
            figures.append(plain(f"{k} a class: {NAMES[name]}", value, measured=measured))
    return figures


def spread(values) -> str:
    """Mean ± standard deviation over the draws."""
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def _plot(table, curves, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    ks = list(table)
    shown = (
        "linear",
        "features",
        "ridge",
        "filters",
        "group",
        "polish",
        "adam_chosen",
        "vector_chosen",
    )
    for i, name in enumerate(shown):
        values = np.array([table[k][name]["accuracy"] for k in ks])
        at = np.array(ks) * 1.015 ** (i - 3)
        left.errorbar(at, values.mean(1), values.std(1, ddof=1), capsize=2, label=NAMES[name])
    left.set(xscale="log", xticks=ks, xlabel="labelled samples of each class", ylabel="accuracy, %")
    left.set_xticklabels(ks)
    left.minorticks_off()
    left.legend(fontsize=8)
    for name, points in curves.items():
        seconds, error = np.array(points).T
        right.plot(seconds, np.maximum(error, 1e-12), ".-", label=name)
    right.set(xscale="log", yscale="log", xlabel="CPU seconds", ylabel="(P − P*) / P*")
    right.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(out / "solver_accuracy.png", dpi=120)
    plt.close()


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="to see that it runs")
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--out", type=Path, default=ROOT / "bench_out")
    args = p.parse_args()
    out = args.out.resolve() / "quick" if args.quick else args.out.resolve()
    env, began = environment(1), time.perf_counter()
    figures, details = run(SimpleNamespace(out=out, quick=args.quick, seeds=args.seeds))
    seconds = time.perf_counter() - began
    print(text(figures))
    record = {"environment": env, "seconds": seconds, "quick": args.quick}
    record |= {"figures": plain_rows(figures), "details": details}
    (out / "solver_accuracy.json").write_text(json.dumps(record, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
