"""The solvers for the gated-ReLU group lasso, side by side with adelie, celer, skglm, pyscnn and Clarabel.

    make bench-solvers                                  everything, hours on two cores
    python benchmarks/bench_solvers.py --only c1        one section again; the others stay in the table
    python benchmarks/bench_solvers.py --reuse          keep the peers' times of an earlier call (not to be quoted)
    python benchmarks/bench_solvers.py --quick          problems a quarter as large, to see that it runs

Every solver runs on one thread of one core, in a process of the peers' environment (.venv-peers). CPU seconds of
the solve alone, without imports and compilation; a referee computes objective and gap of the returned weights.
Programs have no intercept; targets are centred. Tables go to stdout, progress to stderr, everything to
OUT/solvers.json, .md and .png. A missed bar is printed as MISSED and does not change the exit code.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import solver_accuracy
import solver_gates
import solver_plot
import solver_rows
import solver_sizes
import solver_warm
from environment import ROOT, environment, say, short
from figures import aligned, keep, plain_rows, text
from solver_runs import Bench

SECTIONS = {
    "tiny": solver_rows.tiny,
    "c1": solver_rows.c1,
    "c10": solver_rows.c10,
    "warm": solver_warm.warm,
    "sizes": solver_sizes.sizes,
    "accuracy": solver_accuracy.run,
    "gates": solver_gates.run,
}


def main() -> None:
    args = _arguments()
    bench = Bench(args.out, args.quick, args.reuse, args.repeats, args.cap_s)
    bench.out.mkdir(parents=True, exist_ok=True)
    record, bars = bench.out / "solvers.json", []
    for name in args.only:
        say(f"== {name}")
        env, began = environment(threads=1), time.perf_counter()
        figures, details = SECTIONS[name](bench)
        seconds = time.perf_counter() - began
        print(f"\n{name} ({seconds:.0f} s, commit {env['commit']})\n{text(figures)}", flush=True)
        for caption, rows in details.get("tables", {}).items():
            print(f"\n{caption}\n{aligned(rows)}", flush=True)
        bars += [f.met for f in figures if f.met is not None]
        section = {"environment": env, "seconds": seconds, "quick": bench.quick or bench.reuse}
        section |= {"figures": plain_rows(figures), "details": details}
        sections = keep(record, SECTIONS, name, section, "Convex solvers, side by side")
        solver_plot.draw(sections, record.with_suffix(".png"))
    page = record.with_suffix(".md")
    print(f"\n{sum(bars)} of {len(bars)} bars met; {short(record)}, {short(page)}")


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", default=",".join(SECTIONS), metavar="A,B")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--reuse", action="store_true", help="keep the peers' times of earlier runs")
    p.add_argument("--repeats", type=int, default=5, help="of runs shorter than a second")
    p.add_argument("--cap-s", type=float, default=30.0, help="CPU seconds of one run")
    p.add_argument("--out", type=Path, default=ROOT / "bench_out")
    args = p.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(SECTIONS):
        p.error(f"--only: no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    args.out = args.out.resolve() / "quick" if args.quick else args.out.resolve()
    return args


if __name__ == "__main__":
    main()
