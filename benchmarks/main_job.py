"""The figures of the main job: each beside its bar and a baseline of the same run.

    make bench-main                                     everything, about half an hour on two cores
    python benchmarks/main_job.py --only latency,cold   one part again; the others stay in the table
    python benchmarks/main_job.py --quick               small subsets, to see that it runs

Tables go to stdout, progress to stderr, everything to OUT/main_job.json and OUT/main_job.md (--quick: to
OUT/quick). A missed bar is printed as MISSED and does not change the exit code.
"""

from __future__ import annotations

import argparse
import os

import main_accuracy
import main_combined
import main_device
import main_parity
import main_shift
from job import Job
from measure import measure, parsed, parser

SECTIONS = {
    "accuracy": main_accuracy.run,
    "shift": main_shift.run,
    "parity": main_parity.run,
    "latency": main_device.latency,
    "cost": main_device.cost,
    "cold": main_device.cold,
    "combined": main_combined.run,
}


def main() -> None:
    args = _arguments()
    measure(
        SECTIONS,
        args.only,
        Job(args.out, args.quick, args.reuse, args.threads),
        args.out / "main_job.json",
        "The main job, measured",
        threads=args.threads,
        quick=args.quick,
    )


def _arguments() -> argparse.Namespace:
    p = parser(__doc__, SECTIONS)
    p.add_argument("--reuse", action="store_true", help="keep bundles built from other sources")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="of in-process evaluations")
    return parsed(p, SECTIONS)


if __name__ == "__main__":
    main()
