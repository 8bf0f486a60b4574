"""What every benchmark of several sections does: run them, print their tables, keep the record, count the bars."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from environment import ROOT, environment, say, short
from figures import Figure, aligned, keep, plain_rows, text

Section = Callable[[Any], tuple[list[Figure], dict[str, Any]]]


def measure(
    sections: Mapping[str, Section],
    names: list[str],
    bench: object,
    record: Path,
    title: str,
    *,
    threads: int,
    quick: bool,
    draw: Callable[[dict, Path], None] = lambda kept, path: None,
) -> None:
    """Run `names` of `sections`, each called with `bench`; sections measured earlier stay in `record` (JSON, .md).

    A section gives its figures and details, of which `tables` (caption -> rows) are printed too.
    `draw(every section's record, path of a PNG)` is called after each.
    """
    record.parent.mkdir(parents=True, exist_ok=True)
    bars = []
    for name in names:
        say(f"== {name}")
        env, began = environment(threads), time.perf_counter()
        figures, details = sections[name](bench)
        seconds = time.perf_counter() - began
        print(f"\n{name} ({seconds:.0f} s, commit {env['commit']})\n{text(figures)}", flush=True)
        for caption, rows in details.get("tables", {}).items():
            print(f"\n{caption}\n{aligned(rows)}", flush=True)
        bars += [f.met for f in figures if f.met is not None]
        section = {"environment": env, "seconds": seconds, "quick": quick}
        section |= {"figures": plain_rows(figures), "details": details}
        draw(keep(record, sections, name, section, title), record.with_suffix(".png"))
    page = record.with_suffix(".md")
    print(f"\n{sum(bars)} of {len(bars)} bars met; {short(record)}, {short(page)}")


def parser(description: str, sections: Mapping[str, Section]) -> argparse.ArgumentParser:
    """With --only, --quick and --out."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", default=",".join(sections), metavar="A,B")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--out", type=Path, default=ROOT / "bench_out")
    return p


def parsed(p: argparse.ArgumentParser, sections: Mapping[str, Section]) -> argparse.Namespace:
    """`only` as a list of known sections; `out` whole, in a folder of its own where --quick."""
    args = p.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(sections):
        p.error(f"--only: no section {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
    args.out = args.out.resolve() / "quick" if args.quick else args.out.resolve()
    return args


def shares(p: argparse.ArgumentParser, given: str) -> tuple[float, ...]:
    """What --budgets lists, shares of the weights such as .5,.3."""
    try:
        return tuple(float(b) for b in given.split(",") if b)
    except ValueError:
        p.error(f"--budgets: shares such as .5,.3, got {given}")


def with_one_blas_thread() -> None:
    """Start again with one unless the caller chose: two make thousands of small products slower, and BLAS reads this
    once, when it is loaded."""
    if "OPENBLAS_NUM_THREADS" not in os.environ:
        one = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], one)
