"""Training and compression by block coordinate descent, side by side with Adam and with the published steps.

    make bench-bcd                                        everything (hours: --seeds 0 takes a fifth)
    python benchmarks/bench_bcd.py --only prune           one section again; the others stay in the table
    python benchmarks/bench_bcd.py --only mnist --seeds 0,1 --ranks 40 --sweeps 30
    python benchmarks/bench_bcd.py --quick                small subsets, two sweeps, to see that it runs

Tables go to stdout, progress to stderr, everything to OUT/bcd.json, .md and .png, the trace of every run, a row
per sweep, to OUT/bcd_traces.jsonl (--quick: to OUT/quick). A missed bar is printed as MISSED and does not change
the exit code.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bcd_prune
import bcd_sections as sections
import bcd_sweep
import torch
from measure import measure, parsed, parser

SECTIONS = {
    "mnist": sections.mnist,
    "activity": sections.human_activity,
    "prune": bcd_prune.prune,
    "sweep": bcd_sweep.sweep_time,
    "published": bcd_prune.published,
}


@dataclass(frozen=True)
class Bench:
    """`sweeps`: of the command line, or 0 for a section's own."""

    quick: bool
    seeds: tuple[int, ...]
    ranks: tuple[int, ...]
    modes: tuple[str, ...]
    sweeps: int
    gradient_every: int

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full


def main() -> None:
    args = _arguments()
    bench = Bench(
        args.quick, args.seeds, args.ranks, args.modes, args.sweeps, 0 if args.quick else 5
    )
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    traces = args.out / "bcd_traces.jsonl"

    def kept(name: str, run):
        """The section with its traces in a file of their own."""

        def section(bench):
            figures, details = run(bench)
            keep_traces(traces, name, details.pop("traces", {}))
            return figures, details

        return section

    measure(
        {name: kept(name, run) for name, run in SECTIONS.items()},
        args.only,
        bench,
        args.out / "bcd.json",
        "Block coordinate descent, measured",
        threads=args.threads,
        quick=args.quick,
        draw=lambda record, path: draw(traces, path),
    )


def keep_traces(path: Path, section: str, traces: dict[str, list[dict[str, Any]]]) -> None:
    """Replace one section's rows; those of the others stay."""
    lines = path.read_text().splitlines() if path.is_file() else []
    lines = [line for line in lines if json.loads(line)["section"] != section]
    for run, rows in traces.items():
        lines += [json.dumps({"section": section, "run": run, **row}) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))


def draw(traces: Path, path: Path) -> None:
    """The objective, and K times the least squared gradient, by sweep, as a PNG at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs: dict[str, list[dict[str, Any]]] = {}
    for line in traces.read_text().splitlines():
        row = json.loads(line)
        runs.setdefault(row["run"], []).append(row)
    if not runs:
        return
    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    for run, rows in runs.items():
        theirs = {"linestyle": "--"} if "published" in run else {}
        for axis, name in zip(axes, ("objective", "k_min_gradient_sq"), strict=True):
            points = [(r["sweep"], r[name]) for r in rows if r[name]]
            if points:
                axis.plot(*zip(*points, strict=True), label=run, linewidth=1, **theirs)
    for axis, title in zip(axes, ("L", "K min ||g||²"), strict=True):
        axis.set_yscale("log")
        axis.set_title(title)
        axis.set_xlabel("sweep")
        axis.grid(alpha=0.3)
    if len(runs) <= 16:
        axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _arguments() -> argparse.Namespace:
    p = parser(__doc__, SECTIONS)
    p.add_argument("--seeds", type=_numbers, default=(0, 1, 2, 3, 4), metavar="0,1")
    p.add_argument("--ranks", type=_numbers, default=(40, 220), metavar="40,220", help="of mnist")
    p.add_argument(
        "--modes", default=",".join(sections.MNIST_MODES), metavar="A,B", help="of mnist"
    )
    p.add_argument("--sweeps", type=int, default=0, help="instead of a section's own")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    args = parsed(p, SECTIONS)
    args.modes = tuple(args.modes.split(","))
    if unknown := set(args.modes) - set(sections.MNIST_MODES):
        known = ", ".join(sections.MNIST_MODES)
        p.error(f"--modes: no {', '.join(sorted(unknown))}; there are {known}")
    if args.quick:
        args.seeds, args.ranks = args.seeds[:1], args.ranks[:1]
    return args


def _numbers(words: str) -> tuple[int, ...]:
    return tuple(int(word) for word in words.split(","))


if __name__ == "__main__":
    main()
