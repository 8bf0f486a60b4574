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

import solver_accuracy
import solver_gates
import solver_plot
import solver_rows
import solver_sizes
import solver_warm
from measure import measure, parsed, parser
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
    measure(
        SECTIONS,
        args.only,
        Bench(args.out, args.quick, args.reuse, args.repeats, args.cap_s),
        args.out / "solvers.json",
        "Convex solvers, side by side",
        threads=1,
        quick=args.quick or args.reuse,
        draw=solver_plot.draw,
    )


def _arguments() -> argparse.Namespace:
    p = parser(__doc__, SECTIONS)
    p.add_argument("--reuse", action="store_true", help="keep the peers' times of earlier runs")
    p.add_argument("--repeats", type=int, default=5, help="of runs shorter than a second")
    p.add_argument("--cap-s", type=float, default=30.0, help="CPU seconds of one run")
    return parsed(p, SECTIONS)


if __name__ == "__main__":
    main()
