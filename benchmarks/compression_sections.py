"""The sections of the compression benchmark: each gives figures with their bars, and tables.

python benchmarks/compression_sections.py 512 .5    one whole pass over 512 images, as a line of JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import real_data
import torch
from compression_cases import Case, keyword_spotter, mobilenet, resnet, squeezenet
from compression_methods import (
    OURS,
    Answer,
    Balf,
    Prepared,
    Worth,
    carried_out,
    digest,
    faster,
    in_weight_space,
    independent,
    ours,
    planned,
    prepare,
    searched_ranks,
    to_budget,
    uniform,
    vbmf_ranks,
    worth,
)
from environment import say
from figures import Figure, at_least, at_most, plain

from edgesolve.host.chain import pivoted
from edgesolve.host.fit import FitOptions
from edgesolve.host.metric import Metric
from edgesolve.host.plan import FORMATS, choose
from edgesolve.host.rank_search import SearchOptions
from edgesolve.host.sites import Site
from edgesolve.host.survey import factorise

BARS = {0.9: 0.10, 0.8: 0.15, 0.7: 0.30, 0.6: 0.90, 0.5: 1.6, 0.4: 2.8, 0.3: 5.0}
"""Share of the weights -> largest drop allowed, in points: ResNet-20, CIFAR-10, 1,024 images."""
ALDS = {
    0.901: -0.09,
    0.826: 0.40,
    0.763: 1.50,
    0.699: 3.37,
    0.643: 5.24,
    0.591: 7.42,
    0.547: 10.5,
    0.500: 25.2,
    0.425: 44.0,
    0.358: 55.0,
    0.282: 66.9,
}
"""Share of the parameters -> drop in points without fine-tuning, as published for ResNet-20 on CIFAR-10 (ALDS,
Liebenwein et al. 2021; second-hand, compression.md section 13). Another base network: compare drops."""
ROUNDING = 1e-4
"""An error below this share of a layer's spread is compared with that spread: its square is a difference of sums
in which float64 leaves no more digits."""
MEASURED_AS_PREDICTED = 1e-6
SECONDS = 60.0
IMAGES = 1024
BUILT = "ours, faster forms"
HEADING = [
    "method",
    "budget",
    "weights",
    "MACs",
    "drop",
    "held-out KL",
    "seconds",
    "latency",
    "file",
]
Result = tuple[list[Figure], dict[str, Any]]


def resnet20(bench) -> Result:
    """Our pass at every budget of the table and of ALDS, against BALF and uniform SVD on the same images."""
    prepared = _resnet20(bench)
    case = prepared.case
    balf = Balf(case)
    budgets = bench.shares(tuple(BARS), (0.7, 0.4))
    also = () if bench.quick or bench.budgets else tuple(b for b in ALDS if b not in budgets)
    found: list[Worth] = []
    answers: dict[float, Answer] = {}
    for b in (*budgets, *also):
        answers[b] = ours(prepared, b)
        found.append(_noted(worth(case, answers[b], latency=b in budgets)))
        found += [_noted(worth(case, f(b))) for f in (balf, _uniform(case)) if b in budgets]
    found += _as_built(case, budgets)
    own = {w.budget: w for w in found if w.method == OURS}
    figures = [_against_bar(b, own[b], found) for b in budgets]
    figures += [_beside_alds(b, own[b]) for b in (*budgets, *also) if b in ALDS]
    figures += _as_predicted(case, answers.values())
    figures += _whole_passes(bench, prepared, own[budgets[-1]], answers[budgets[-1]])
    extra = _ablations(prepared, case, budgets) if bench.ablate else []
    points = _points(found) | {"ALDS, published": [(b, d) for b, d in ALDS.items()]}
    points |= {"bar": [(b, d) for b, d in BARS.items()]}
    return figures, {
        "tables": {
            "ResNet-20: shares of weights and multiply-adds (identity blocks neither stored nor counted), drop in "
            "points; p50 latency (ONNX Runtime, one thread) and ONNX file over the original's, where identity "
            f"blocks are stored whole; once for all budgets: {_spent(prepared, balf)}": _table(
                found + extra
            ),
            "Per layer at the smallest budget": _layers(answers[min(answers)]),
        },
        "points": {case.title: points},
        "rows": [asdict(w) for w in found + extra],
    }


def sigma(bench) -> Result:
    """Calibrated on CIFAR-100 images instead of CIFAR-10's, at 70 % of the weights."""
    prepared = _resnet20(bench)
    case = prepared.case
    other = np.load(real_data.folder() / "cifar100" / "x_test.npy")[: len(case.x)]
    foreign = _prepared(replace(case, x=other), bench)
    found = []
    for method, calibrated in (("CIFAR-10", prepared), ("CIFAR-100", foreign)):
        answer = ours(calibrated, 0.7, method=method)
        found.append(_noted(worth(case, answer, latency=False)))
    own, foreign = found
    what = f"{case.title}, 70 % of the weights: drop with CIFAR-100 frames minus with CIFAR-10's"
    baseline = f"CIFAR-10 {own.drop:.2f}, CIFAR-100 {foreign.drop:.2f} points"
    figure = at_most(what, foreign.drop - own.drop, 1.0, " points", baseline=baseline)
    return [figure], {"tables": {"Where the frames came from": _table(found)}}


NETS: dict[str, tuple[Callable[..., Case], tuple[float, ...]]] = {
    "resnet56": (lambda q: resnet(56, 512, 1000, 256 if q else 10_000), (0.9, 0.7, 0.5, 0.3)),
    "dscnn": (lambda q: keyword_spotter(), (0.9, 0.7, 0.5, 0.3)),
    "squeezenet": (
        lambda q: squeezenet(*((32, 32, 64) if q else (300, 100, 600))),
        (0.9, 0.7, 0.5),
    ),
    "mobilenet": (lambda q: mobilenet(*((32, 32, 64) if q else (300, 100, 600))), (0.9, 0.7, 0.5)),
}


def frontiers(bench) -> Result:
    """Drop against weights left on other networks; on the ImageNet sample only the drop means anything."""
    figures, tables, points, rows = [], {}, {}, {}
    for name in bench.nets or (("dscnn",) if bench.quick else tuple(NETS)):
        make, budgets = NETS[name]
        case = make(bench.quick)
        prepared, balf = _prepared(case, bench), Balf(case)
        found, answers = [], []
        for b in bench.shares(budgets, (0.7, 0.5)):
            for method in (lambda b: ours(prepared, b), balf, _uniform(case)):  # noqa: B023
                try:
                    answer = method(b)
                except ValueError as error:
                    say(f"{case.title} at {b:g}: {error}")
                    continue
                found.append(_noted(worth(case, answer)))
                answers += [answer] if answer.compression else []
        figures += [_ahead(case, w, found) for w in found if w.method == OURS]
        figures += _as_predicted(case, answers)
        caption = (
            f"{case.title} (base {case.expected[0]:.2f} %, {len(case.x)} frames to calibrate on, "
        )
        caption += f"{len(case.test)} to test on); once for all budgets: {_spent(prepared, balf)}"
        tables[caption], points[case.title] = _table(found), _points(found)
        if answers:
            tables[f"{case.title}, per layer at {answers[-1].budget:.0%}"] = _layers(answers[-1])
        rows[name] = [asdict(w) for w in found]
    return figures, {"tables": tables, "points": points, "rows": rows}


def ranks(bench) -> Result:
    """Ranks of VBMF, of the continuous search and of one ratio beside the allocator's, fitted both ways."""
    prepared, budget, found = _resnet20(bench), 0.5, []
    case = prepared.case
    first = ours(prepared, budget)
    began = time.perf_counter()
    plan = choose(prepared.surveys, "params", budget * case.weights)
    picked = {node: c for node, c in plan.chosen.items() if c.format != "dense"}
    chosen = {"exact allocator": (picked, time.perf_counter() - began)}
    few = SearchOptions(warmup=bench.size(20, 3), iterations=bench.size(40, 5))
    layers = [s for s in case.found if s.weight.shape[2:] != (1, 1)]
    for name, select in (
        ("VBMF", vbmf_ranks),
        ("continuous search", lambda c, l: searched_ranks(c, l, few)),
        ("one ratio", lambda c, l: {s.node: s.weight.shape[:2] for s in l}),
    ):
        began = time.perf_counter()
        picked = to_budget(case, layers, select(case, layers), budget)
        chosen[name] = (picked, time.perf_counter() - began)
    for name, (picked, seconds) in chosen.items():
        plan = planned(case, picked, budget) if name != "exact allocator" else None
        began = time.perf_counter()
        chains = {
            s.node: pivoted(factorise(_weight_metric(s), s.shape, picked[s.node], sweeps=3))
            for s in case.found
            if s.node in picked
        }
        spent = seconds + time.perf_counter() - began
        plainly = in_weight_space(case, f"{name}, weight space", budget, chains, spent)
        passed = carried_out(prepared, plan, budget, method=f"{name}, our pass") if plan else first
        for answer in (plainly, replace(passed, method=f"{name}, our pass")):
            found.append(_noted(worth(case, answer, latency=False)))
    best = next(w for w in found if w.method == "exact allocator, our pass")
    figures = [
        at_least(
            f"held-out KL over the exact allocator's, ranks by {w.method}",
            w.kl / best.kl,
            1.0,
            " times",
            baseline=f"drop {w.drop:.2f} against {best.drop:.2f} points",
        )
        for w in found
        if w.method.endswith("our pass") and w is not best
    ]
    caption = (
        "ResNet-20 at 50 % of the weights: who chooses the ranks, and how the layers are fitted"
    )
    return figures, {"tables": {caption: _table(found)}, "rows": [asdict(w) for w in found]}


@cache
def _resnet20(bench) -> Prepared:
    """Looked at once for all sections."""
    sizes = bench.size(IMAGES, 256), bench.size(2000, 500), bench.size(10_000, 1000)
    return _prepared(resnet(20, *sizes), bench)


def _prepared(case: Case, bench) -> Prepared:
    say(f"{case.title}: {case.weights:,} weights, original {case.expected[0]:.2f} %")
    # CP has no closed form, and takes most of the time: a quick run does without.
    prepared = prepare(case, ("tucker2",) if bench.quick else FORMATS)
    say("  " + ", ".join(f"{k} {s:.1f} s" for k, s in prepared.seconds.items()))
    return prepared


def _uniform(case: Case) -> Callable[[float], Answer]:
    return lambda budget: uniform(case, budget)


def _noted(w: Worth) -> Worth:
    latency = "" if w.latency is None else f", latency x {w.latency:.2f}"
    say(
        f"  {w.method} {w.budget:.3f}: weights {w.weights:.4f}, drop {w.drop:.2f}, KL {w.kl:.4f}, "
        f"{w.seconds:.1f} s{latency}"
    )
    return w


def _against_bar(b: float, own: Worth, found: list[Worth]) -> Figure:
    what = f"ResNet-20, CIFAR-10, {b:.0%} of the weights: drop"
    others = [w for w in found if w.budget == b and w.method != OURS]
    baseline = ", ".join(f"{w.method} {w.drop:.2f}" for w in others)
    ahead = all(own.drop < w.drop for w in others if w.method != BUILT)
    if b not in BARS:
        return plain(what, own.drop, " points", baseline=baseline)
    figure = at_most(what, own.drop, BARS[b], " points", baseline=baseline, bar_note=", ahead")
    return replace(figure, met=bool(figure.met and ahead))


def _beside_alds(b: float, own: Worth) -> Figure:
    what = f"ResNet-20, CIFAR-10, {b:.1%} of the weights: drop, beside ALDS as published"
    return at_most(what, own.drop, ALDS[b], " points")


def _ahead(case: Case, own: Worth, found: list[Worth]) -> Figure:
    others = [w for w in found if w.budget == own.budget and w.method != OURS]
    what = f"{case.title}, {own.budget:.0%} of the weights: drop"
    baseline = ", ".join(f"{w.method} {w.drop:.2f}" for w in others)
    if not others:
        return plain(what, own.drop, " points", baseline="none reaches it")
    return at_most(what, own.drop, min(w.drop for w in others), " points", baseline=baseline)


def _as_predicted(case: Case, answers: Iterable[Answer]) -> list[Figure]:
    steps = [s for a in answers for s in a.compression.steps if s.error]
    if not steps:
        return []
    worst = max(
        abs(s.error["predicted"] - s.error["measured"]) / max(s.error["measured"], ROUNDING)
        for s in steps
    )
    what = f"{case.title}: a layer's error, predicted over measured, worst of {len(steps)}"
    return [at_most(what, worst, MEASURED_AS_PREDICTED)]


def _whole_passes(bench, prepared: Prepared, own: Worth, answer: Answer) -> list[Figure]:
    """Processes of their own that do everything once: seconds, bytes of the answer, peak memory."""
    b, n = own.budget, len(prepared.case.x)
    if bench.quick:
        return []
    again = _whole(n, b, bench.threads)
    few, many = (_whole(m, b, bench.threads) for m in (2 * n, 8 * n))
    split = ", ".join(f"{k} {s:.0f} s" for k, s in again["seconds"].items())
    same = digest(answer.module) == again["digest"]
    ratio = many["peak_mib"] / few["peak_mib"]
    peaks = f"{few['peak_mib']:.0f} MiB at {2 * n:,} images, {many['peak_mib']:.0f} at {8 * n:,}"
    total = sum(again["seconds"].values())
    identical = "identical" if same else "different"
    return [
        at_most(
            f"seconds, everything at {b:.0%}, {n:,} images", total, SECONDS, " s", baseline=split
        ),
        Figure("bytes of all weights, two processes", identical, "identical", same),
        at_most("peak memory, four times the images", ratio, 1.1, " times", baseline=peaks),
    ]


def _whole(n: int, budget: float, threads: int) -> dict[str, Any]:
    say(f"  one process, {n} images")
    command = [sys.executable, __file__, str(n), str(budget), str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _once(n: int, budget: float, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    case = resnet(20, n, 1, 1)
    prepared = prepare(case)
    answer = ours(prepared, budget)
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return {
        "seconds": prepared.seconds | {"plan and pass": answer.seconds},
        "digest": digest(answer.module),
        "peak_mib": int(peak.split()[1]) / 1024,
    }


def _as_built(case: Case, budgets: tuple[float, ...]) -> list[Worth]:
    """What `edgesolve build` makes: ranks in blocks of 8 channels, only forms that were faster, nothing pivoted."""
    prepared, found = faster(prepare(case, pivots=False, align=8)), []
    for b in budgets:
        try:
            answer = ours(prepared, b, FitOptions(pivots=False), method=BUILT)
        except ValueError:  # no faster form is that small
            continue
        found.append(_noted(worth(case, answer)))
    return found


def _ablations(prepared: Prepared, case: Case, budgets: tuple[float, ...]) -> list[Worth]:
    found = []
    tucker2, plainly = prepare(case, ("tucker2",)), prepare(case, pivots=False)
    for b in [b for b in budgets if b <= 0.5] or budgets:
        answers = (
            ours(tucker2, b, method="Tucker-2 only"),
            ours(prepared, b, FitOptions(clamp_steps=0), method="no clamp steps"),
            ours(prepared, b, method="no Fisher metric", gammas=False),
            ours(plainly, b, FitOptions(pivots=False), method="no identity blocks"),
            independent(prepared, b),
        )
        found += [_noted(worth(case, a)) for a in answers]
    return found


def _weight_metric(site: Site) -> Metric:
    return Metric.weight_space(site.weight.reshape(len(site.weight), -1))


def _table(found: list[Worth]) -> list[list[str]]:
    return [HEADING] + [
        [
            w.method,
            f"{w.budget:.1%}",
            f"{w.weights:.2%}",
            f"{w.macs:.2%}",
            f"{w.drop:.2f}",
            f"{w.kl:.4f}",
            f"{w.seconds:.1f}",
            "" if w.latency is None else f"{w.latency:.2f}",
            "" if w.file is None else f"{w.file:.2f}",
        ]
        for w in found
    ]


def _layers(answer: Answer) -> list[list[str]]:
    rows = [["layer", "form", "ranks", "weights", "predicted", "held out", "ridge", "why"]]
    for s in answer.compression.steps:
        share = s.params["after"] / s.params["before"]
        error = s.error or {"predicted": np.nan, "held_out": np.nan}
        numbers = [f"{share:.0%}", f"{error['predicted']:.3f}", f"{error['held_out']:.3f}"]
        ridge = "" if s.ridge is None else f"{s.ridge:g}"
        rows.append([s.layer, s.step, "x".join(map(str, s.ranks)), *numbers, ridge, s.reason])
    return rows


def _points(found: list[Worth]) -> dict[str, list[tuple[float, float]]]:
    names = dict.fromkeys(w.method for w in found)
    return {name: [(w.weights, w.drop) for w in found if w.method == name] for name in names}


def _spent(prepared: Prepared, balf: Balf) -> str:
    own = ", ".join(f"{k} {s:.0f} s" for k, s in prepared.seconds.items())
    return f"{own}; BALF's moments {balf.seconds:.0f} s"


if __name__ == "__main__":
    print(json.dumps(_once(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))))
