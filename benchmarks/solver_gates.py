"""Gates side by side: seeded 1×1 and 3×3, the removed block's own, cheap copies of those; taken in the bank's
order, grown greedily by the adjoint, or switched on by the group penalty; compared at equal bytes and MACs.

    python benchmarks/solver_gates.py            about 9 minutes of one core; 4 more on the first call,
                                                 which computes activations into OUT/gates (350 MB)
    python benchmarks/solver_gates.py --quick    ResNet-20 on fewer images, to see that it runs

Heads are distilled without labels from CIFAR-10 training images (no mirrored ones) with the ridge, two ramps per
filter, directions shared by all sizes of a bank, and judged on test images. Tables go to stdout, progress to
stderr, everything to OUT/gates.json, .md and .png (--quick: to OUT/quick).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import ROOT, environment, say, short
from figures import Figure, aligned, keep, plain, plain_rows, text
from gate_banks import DATA_DRIVEN, OWN, POOL, SEEDED, Gates, group_order
from gate_data import Place, place
from gate_heads import RAMPS, judge

from edgesolve.host.distill import SAMPLE
from edgesolve.host.gates import RowMaker, greedy_order

TITLES = {"resnet20": "ResNet-20, last block", "resnet56": "ResNet-56, last 3 blocks"}
SEEDS = (0, 1, 2)
SIZES, QUICK_SIZES = (8, 16, 24, 32, 48, 64, 96), (8, 32)
RANKS = (4, 8)
BUDGETS = {
    "n_bytes": (30, 40, 60, 80, 120, 160, 200),
    "macs": (250, 350, 500, 700, 1000, 1600, 2500),
}
"""kB and thousands of multiply-adds at which the gates are compared."""


@dataclass(frozen=True, slots=True)
class Options:
    """`quick`: one network, few images, two sizes, one seed; its figures are not to be quoted."""

    out: Path
    quick: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """One head: m filters, r directions. n_bytes : seeded gates as their seed; n_params : as a bundle stores it.

    accuracy, agreement : percent of the test images.
    """

    network: str
    gates: str
    choice: str
    seed: int
    m: int
    r: int
    n_params: int
    n_bytes: int
    macs: int
    accuracy: float
    agreement: float

    @property
    def way(self) -> str:
        return f"{self.gates}, {self.choice}"


def run(options: Options) -> tuple[list[Figure], dict[str, Any]]:
    torch.set_num_threads(1)
    names = ("resnet20",) if options.quick else tuple(TITLES)
    n_train, n_test = (1500, 1000) if options.quick else (12000, 10000)
    figures, tables, kept = [], {}, []
    for name in names:
        here = place(name, options.out / "gates", n_train, n_test)
        points = _points(here, options.quick)
        kept += points
        error = 100 * float((here.test.logits.argmax(1) != here.test.y).mean())
        title = f"{TITLES[name]} (original {100 - error:.2f} %)"
        tables[f"{title}: heads"] = _heads(points)
        for cost, unit in (("n_bytes", "kB"), ("macs", "k MACs")):
            tables[f"{title}: accuracy / agreement at equal {unit}"] = _equal(points, cost, unit)
        figures += _figures(TITLES[name], points)
    draw(kept, options.out / "gates.png")
    return figures, {"tables": tables, "points": [asdict(p) for p in kept]}


def _points(here: Place, quick: bool) -> list[Point]:
    z, logits = here.train.sample(SAMPLE)
    seeds, steps = (SEEDS[:1], QUICK_SIZES) if quick else (SEEDS, SIZES)
    points = []
    for gates in (*SEEDED, *DATA_DRIVEN):
        for seed in seeds if gates.seeded else (0,):
            say(
                f"{here.name}: {gates.name}, seed {seed}"
                if gates.seeded
                else f"{here.name}: {gates.name}"
            )
            bank = gates.make(here, z, seed)
            make = RowMaker.of(z, logits, bank, 64, max(RANKS))
            most = min(len(make.gates), max(steps))
            every = make.rows(range(len(make.gates)), 1)
            orders = {"greedy": greedy_order(every, z, logits, most)}
            if gates.seeded or gates is OWN:
                orders["first"] = list(range(most))
                orders["group"] = group_order(every, z, logits, most)
            sizes = [(m, r) for m in steps if m <= most for r in RANKS]
            for choice, order in orders.items():
                points += _judged(here, gates, choice, seed, make, order, sizes)
    if not quick:
        # The whole bank, for a seeded head of as many bytes as the largest head of the block's own filters.
        make = RowMaker.of(z, logits, SEEDED[0].make(here, z, 0), 64, max(RANKS))
        large = [(m, r) for m in (POOL // 2, POOL) for r in RANKS]
        points += _judged(here, SEEDED[0], "first", 0, make, list(range(POOL)), large)
    return points


def _judged(here: Place, gates: Gates, choice, seed, make: RowMaker, order, sizes) -> list[Point]:
    found = judge(here, make.rows(order, RAMPS), sizes)
    return [
        Point(
            here.name,
            gates.name,
            choice,
            seed,
            m,
            r,
            *_cost(here, gates, choice, m, r, make.pool.shape[1]),
            v.accuracy,
            v.agreement,
        )
        for (m, r), v in found.items()
    ]


def _cost(
    here: Place, gates: Gates, choice: str, m: int, r: int, cells: int
) -> tuple[int, int, int]:
    """(numbers in a bundle, bytes with gates from their seed, multiply-adds); as Rows.n_params and Rows.macs count."""
    d, p, classes = (
        here.cut.shape[0],
        here.cut.shape[1] * here.cut.shape[2],
        here.test.logits.shape[1],
    )
    length = RAMPS * m * (r + 1) + cells * d
    rest = r * (d + 1) + 2 * d + (length + 1) * classes
    stored = 4 * rest + gates.n_bytes(m, d, choice != "first")
    per_position = gates.macs(m, d) + r * d + RAMPS * m * (r + 1) + d
    return rest + gates.n_params(m, d), stored, p * per_position + length * classes


def _heads(points: list[Point]) -> list[list[str]]:
    """One row per head of 8 directions, seeds averaged; the JSON has the others too."""
    rows = [
        ["gates", "choice", "filters", "params", "kB stored", "k MACs", "accuracy %", "agreement %"]
    ]
    for group in _by(points, "way", "m", "r"):
        p = group[0]
        if p.r == max(RANKS):
            cost = [f"{p.n_params:,}", f"{p.n_bytes / 1e3:.1f}", f"{p.macs / 1e3:,.0f}"]
            measured = [_spread([getattr(q, k) for q in group]) for k in ("accuracy", "agreement")]
            rows.append([p.gates, p.choice, str(p.m), *cost, *measured])
    return rows


def _spread(values: list[float]) -> str:
    """Mean, and half the range of several seeds."""
    more = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{more}"


def _equal(points: list[Point], cost: str, unit: str) -> list[list[str]]:
    budgets = BUDGETS[cost]
    rows = [["gates, choice", *(f"{b} {unit}" for b in budgets)]]
    for group in _by(points, "way"):
        found = [_at(group, cost, 1000 * b) for b in budgets]
        rows.append(
            [group[0].way, *("–" if f is None else f"{f[0]:.2f} / {f[1]:.2f}" for f in found)]
        )
    return rows


def _at(points: list[Point], cost: str, budget: float) -> tuple[float, float] | None:
    """(accuracy, agreement) of one way at a cost: between the heads that no cheaper one agrees more than.

    Linear in the logarithm of the cost; beyond the dearest head that head; None below the cheapest.
    """
    curve = []
    for group in sorted(_by(points, "m", "r"), key=lambda g: getattr(g[0], cost)):
        mean = [float(np.mean([getattr(p, k) for p in group])) for k in ("accuracy", "agreement")]
        if not curve or mean[1] > curve[-1][2]:
            curve.append((np.log(getattr(group[0], cost)), *mean))
    x, *measured = np.array(curve).T
    if np.log(budget) < x[0]:
        return None
    return tuple(float(np.interp(np.log(budget), x, y)) for y in measured)


def _figures(title: str, points: list[Point]) -> list[Figure]:
    """Own filters against the best seeded bank at three budgets, and what choosing wins."""
    figures = []
    for cost, unit, budgets in (
        ("n_bytes", "kB", (40, 80, 160)),
        ("macs", "k MACs", (350, 700, 2500)),
    ):
        for budget in budgets:
            found = {g[0].gates: [] for g in _by(points, "gates")}
            for group in _by(points, "way"):
                at = _at(group, cost, 1000 * budget)
                found[group[0].gates] += [(at[1], at[0], group[0].way)] if at else []
            best = {k: max(v) for k, v in found.items() if v}
            seeded = max(best[g.name] for g in SEEDED if g.name in best)
            top = max((best[g.name] for g in DATA_DRIVEN if g.name in best), default=seeded)
            own = best.get(OWN.name)
            said = f"block's own {own[1]:.2f} % ({own[0]:.2f})" if own else "block's own don't fit"
            figures.append(
                plain(
                    f"{title}, {budget} {unit}: accuracy (agreement)",
                    top[1],
                    measured=f"{said}; best: {top[2]} {top[1]:.2f} % ({top[0]:.2f})",
                    baseline=f"{seeded[2]} {seeded[1]:.2f} % ({seeded[0]:.2f})",
                )
            )
    for gates in (*SEEDED, OWN):
        for choice in ("greedy", "group"):
            gain = _gain([p for p in points if p.gates == gates.name], choice)
            shown = (
                f"{np.mean(gain):+.2f} points of agreement ({min(gain):+.2f} to {max(gain):+.2f})"
            )
            what = f"{title}, {gates.name}: {choice} over the bank's first"
            figures.append(plain(what, float(np.mean(gain)), measured=shown))
    return figures


def _gain(points: list[Point], choice: str) -> list[float]:
    """Agreement won at equal filters, directions and seed, where there was something to choose from."""
    first = {(p.seed, p.m, p.r): p.agreement for p in points if p.choice == "first"}
    whole = max(p.m for p in points if p.choice == choice)
    most = whole if points[0].gates == OWN.name else whole + 1
    return [
        p.agreement - first[p.seed, p.m, p.r] for p in points if p.choice == choice and p.m < most
    ]


def _by(points: list[Point], *keys: str) -> list[list[Point]]:
    """Points in groups of equal `keys`, in order of appearance."""
    groups: dict[tuple, list[Point]] = {}
    for p in points:
        groups.setdefault(tuple(getattr(p, k) for k in keys), []).append(p)
    return list(groups.values())


def draw(points: list[Point], path: Path) -> None:
    """Agreement against bytes and against multiply-adds; a line per gates, their best choice at every cost."""
    from matplotlib.figure import Figure as Canvas

    networks = _by(points, "network")
    canvas = Canvas(figsize=(11, 4.2 * len(networks)), layout="constrained")
    grid = canvas.subplots(len(networks), 2, squeeze=False)
    for axes, mine in zip(grid, networks, strict=True):
        for axis, (cost, label) in zip(
            axes, (("n_bytes", "bytes"), ("macs", "multiply-adds")), strict=True
        ):
            for k, group in enumerate(_by(mine, "gates")):
                heads = _by(group, "choice", "m", "r")
                xy = [(getattr(h[0], cost), np.mean([p.agreement for p in h])) for h in heads]
                edge = [(x, y) for x, y in sorted(xy) if y >= max(v for u, v in xy if u <= x)]
                axis.plot(*zip(*edge, strict=True), "o-", ms=3, color=f"C{k}", label=group[0].gates)
            axis.set(xscale="log", xlabel=f"{label} of the head", ylabel="agreement, %")
            axis.set_title(TITLES[mine[0].network], fontsize=10)
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8)
    canvas.savefig(path, dpi=110)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true")
    p.add_argument("--out", type=Path, default=ROOT / "bench_out")
    args = p.parse_args()
    options = Options(
        args.out.resolve() / "quick" if args.quick else args.out.resolve(), args.quick
    )
    options.out.mkdir(parents=True, exist_ok=True)
    env, began = environment(threads=1), time.perf_counter()
    figures, details = run(options)
    seconds = time.perf_counter() - began
    print(f"gates ({seconds:.0f} s, commit {env['commit']})\n{text(figures)}")
    for caption, rows in details["tables"].items():
        print(f"\n{caption}\n{aligned(rows)}")
    section = {"environment": env, "seconds": seconds, "quick": args.quick}
    section |= {"figures": plain_rows(figures), "details": details}
    record = options.out / "gates.json"
    keep(record, ["gates"], "gates", section, "Gates, side by side")
    print(
        f"\n{short(record)}, {short(record.with_suffix('.md'))}, {short(record.with_suffix('.png'))}"
    )


if __name__ == "__main__":
    main()
