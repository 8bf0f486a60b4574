"""Sections tiny, c1 and c10: the rows of the comparison and their bars."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from figures import Figure, at_least, at_most
from solver_runs import ERRORS, GAPS, GOAL, Bench, Measured, compare, measure, optimum
from solvers import OURS, SOLVERS

RATIOS = (0.1, 0.01)
BARS = {"digits": 3.0, "features": 3.0, "fewshot": 20.0}
VECTOR_BAR, FEWSHOT_VECTOR_BAR = 5.0, 3.0
LONGER = 4
"""Ten programs may take so many times the cap of one."""
ONE_VS_ALL = [name for name in SOLVERS if name != "clarabel"]
HEADER = ["solver", *ERRORS, *GAPS, "smallest gap", "note"]


def tiny(bench: Bench) -> tuple[list[Figure], dict[str, Any]]:
    """The conversions of `lam`: everyone must reach the same objective, or nothing else is worth printing."""
    figures = []
    for title, more in (
        ("c = 1", {"outputs": 1}),
        ("c = 3, one-vs-all", {"outputs": 3, "by_output": True}),
        ("c = 3, joint", {"outputs": 3}),
    ):
        path = bench.problem("tiny", 0.1, **more)
        found = {name: measure(bench, path, name, [SOLVERS[name].exact]) for name in SOLVERS}
        best, _ = optimum(found)
        ran = {name: m.runs[-1]["objective"] / best - 1.0 for name, m in found.items() if m.runs}
        worst = max(ran, key=ran.get)
        if ran[worst] > 1e-8:
            raise SystemExit(
                f"tiny, {title}: {worst} ends {ran[worst]:.1e} above {best}: converted?"
            )
        skips = [f"{name}: {m.note}" for name, m in found.items() if not m.runs]
        figures.append(
            at_most(
                f"tiny, {title}: objectives differ by at most",
                ran[worst],
                1e-8,
                baseline="; ".join([f"{', '.join(ran)} agree", *skips]),
            )
        )
    return figures, {}


def c1(bench: Bench) -> tuple[list[Figure], dict[str, Any]]:
    """One output: every row against the fastest peer."""
    figures, details = [], {"tables": {}, "runs": {}}
    for turn, (name, ratio) in enumerate((n, r) for n in BARS for r in RATIOS):
        title = f"{name}, {ratio} lam_max"
        found = compare(bench, bench.problem(name, ratio), list(SOLVERS), turn)
        figures += versus_peers(title, found, BARS[name])
        describe(details, title, found)
    return figures, details


def c10(bench: Bench) -> tuple[list[Figure], dict[str, Any]]:
    """Ten outputs at once, against the peers' ten one-vs-all programs at the same share of their lam_max."""
    figures, details = [], {"tables": {}, "runs": {}}
    patient = replace(bench, cap_s=LONGER * bench.cap_s)
    for turn, (name, ratio) in enumerate((n, r) for n in ("features", "fewshot") for r in RATIOS):
        title = f"{name}, {ratio} lam_max, c = 10"
        joint = compare(patient, bench.problem(name, ratio, outputs=10), [OURS, "adelie"], turn)
        apart_path = bench.problem(name, ratio, outputs=10, by_output=True)
        apart = compare(patient, apart_path, ONE_VS_ALL, turn)
        ours = joint[OURS].seconds(GOAL, optimum(joint)[0])
        figures.append(ratio_figure(f"{title}: joint, against one-vs-all", ours, apart, VECTOR_BAR))
        describe(details, f"{title}, joint", joint)
        describe(details, f"{title}, one-vs-all", apart)
        if name == "fewshot":
            alone = compare(bench, bench.problem(name, ratio), [OURS])
            single = alone[OURS].seconds(GOAL, optimum(alone)[0])
            figures.append(_growth(title, ours, single))
    return figures, details


def versus_peers(title: str, found: dict[str, Measured], bar: float) -> list[Figure]:
    """One figure with a bar for GOAL, and one without for each certified gap."""
    best, _ = optimum(found)
    figures = [ratio_figure(title, found[OURS].seconds(GOAL, best), found, bar)]
    for goal in GAPS:
        figures.append(
            ratio_figure(f"{title}, to {goal}", found[OURS].seconds(goal, best), found, 0, goal)
        )
    return figures


def ratio_figure(
    what: str, ours: float | None, found: dict[str, Measured], bar: float, goal: str = GOAL
) -> Figure:
    """How many times as long the fastest peer of `found` takes to `goal`; a peer that was cut off counts as its cap."""
    best, _ = optimum(found)
    times = {n: m.seconds(goal, best) for n, m in found.items() if n != OURS}
    times = {n: t for n, t in times.items() if t is not None}
    fastest = min(times, key=times.get, default=None)
    baseline = f"{fastest} {times[fastest]:.3g} s" if fastest else "no peer arrived"
    if ours is None or fastest is None:
        shown = "not reached" if ours is None else f"{ours:.3g} s"
        met = (ours is not None) if bar else None
        return Figure(what, shown, f"≥ {bar:g}×" * bool(bar), met, baseline)
    ratio = times[fastest] / ours
    shown = f"{ratio:.2f}× ({ours:.3g} s)"
    if not bar:
        return Figure(what, shown, baseline=baseline, value=ratio)
    return at_least(what, ratio, bar, "×", measured=shown, baseline=baseline)


def _growth(title: str, ours: float | None, single: float | None) -> Figure:
    what = f"{title}: times as long as c = 1"
    if ours is None or single is None:
        return Figure(what, "not reached", f"≤ {FEWSHOT_VECTOR_BAR:g}×", False)
    return at_most(
        what, ours / single, FEWSHOT_VECTOR_BAR, "×", baseline=f"{ours:.3g} s, {single:.3g} s"
    )


def describe(details: dict[str, Any], title: str, found: dict[str, Measured]) -> None:
    """Put the table of CPU seconds and the runs behind it into `details`."""
    best, bound = optimum(found)
    caption = f"{title}; CPU seconds; P* = {best:.9g}, known to {(best - bound) / best:.0e}"
    rows = []
    for name, measured in found.items():
        times = [measured.seconds(goal, best) for goal in (*ERRORS, *GAPS)]
        gaps = [run["gap"] / run["objective"] for run in measured.runs]
        smallest = f"{min(gaps):.0e}" if gaps else ""
        shown = ["–" if t is None else f"{t:.3g}" for t in times]
        rows.append([name, *shown, smallest, measured.note])
    details["tables"][caption] = [HEADER, *rows]
    details["runs"][title] = {
        "best": best,
        "bound": bound,
        **{name: {"version": m.version, "points": m.points()} for name, m in found.items()},
    }
