"""Closed-form compression without labels and without fine-tuning, side by side with low-rank baselines.

    make bench-compression                                     everything, about an hour on two cores
    python benchmarks/bench_compression.py --only sigma        one section again; the others stay in the table
    python benchmarks/bench_compression.py --budgets .5,.3     other shares of the weights (not to be quoted)
    python benchmarks/bench_compression.py --ablate            section resnet20 with parts of the recipe left out
    python benchmarks/bench_compression.py --quick             few frames, two budgets, to see that it runs

Budgets are shares of the weights of all convolutions and linear layers; biases are out on both sides. Tables go to
stdout, progress to stderr, everything to OUT/compression.json, .md and .png (--quick: to OUT/quick). A missed bar
is printed as MISSED and does not change the exit code.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compression_sections as sections
import torch
from measure import measure, parsed, parser, shares, with_one_blas_thread

SECTIONS = {
    "resnet20": sections.resnet20,
    "sigma": sections.sigma,
    "frontiers": sections.frontiers,
    "ranks": sections.ranks,
}


@dataclass(frozen=True)
class Bench:
    """`budgets`: those of the command line, or (). `nets`: of the frontiers, or ()."""

    quick: bool
    ablate: bool
    budgets: tuple[float, ...]
    nets: tuple[str, ...]
    threads: int

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def shares(self, full: tuple[float, ...], quick: tuple[float, ...]) -> tuple[float, ...]:
        return self.budgets or (quick if self.quick else full)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    measure(
        SECTIONS,
        args.only,
        Bench(args.quick, args.ablate, args.budgets, args.nets, args.threads),
        args.out / "compression.json",
        "Closed-form compression, measured",
        threads=args.threads,
        quick=args.quick,
        draw=draw,
    )


def draw(kept: dict[str, dict[str, Any]], path: Path) -> None:
    """Drop against weights left, one panel per network, as a PNG at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {k: v for s in kept.values() for k, v in s["details"].get("points", {}).items()}
    if not panels:
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 4 * rows), squeeze=False)
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, points in lines.items():
            ours = (
                {"linewidth": 2.5, "color": "black", "zorder": 3} if name == sections.OURS else {}
            )
            x, y = zip(*sorted(points), strict=True)
            axis.plot([100 * v for v in x], y, marker="o", markersize=3, label=name, **ours)
        # Linear up to a point, so that negative drops and those of 80 points fit in one panel.
        axis.set_yscale("symlog", linthresh=1.0)
        axis.set_ylim(-1.0, 100.0)
        axis.grid(alpha=0.3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("weights left, %")
        axis.set_ylabel("drop, points")
        axis.legend(fontsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _arguments() -> argparse.Namespace:
    p = parser(__doc__, SECTIONS)
    p.add_argument("--ablate", action="store_true", help="leave out parts of the recipe in turn")
    p.add_argument("--budgets", default="", metavar=".5,.3", help="instead of a section's own")
    p.add_argument("--nets", default="", metavar="A,B", help=f"of {', '.join(sections.NETS)}")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    args = parsed(p, SECTIONS)
    args.nets = tuple(n for n in args.nets.split(",") if n)
    if unknown := set(args.nets) - set(sections.NETS):
        p.error(f"--nets: no network {', '.join(sorted(unknown))}")
    args.budgets = shares(p, args.budgets)
    return args


if __name__ == "__main__":
    with_one_blas_thread()
    main()
