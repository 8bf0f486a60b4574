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
import time
from pathlib import Path

import main_accuracy
import main_device
import main_parity
import main_shift
from environment import ROOT, environment, say, short
from figures import keep, plain_rows, text
from job import Job

SECTIONS = {
    "accuracy": main_accuracy.run,
    "shift": main_shift.run,
    "parity": main_parity.run,
    "latency": main_device.latency,
    "cost": main_device.cost,
    "cold": main_device.cold,
}


def main() -> None:
    args = _arguments()
    job = Job(args.out, args.quick, args.reuse, args.threads)
    job.out.mkdir(parents=True, exist_ok=True)
    record, bars = job.out / "main_job.json", []
    for name in args.only:
        say(f"== {name}")
        env, began = environment(job.threads), time.perf_counter()
        figures, details = SECTIONS[name](job)
        seconds = time.perf_counter() - began
        print(f"\n{name} ({seconds:.0f} s, commit {env['commit']})\n{text(figures)}", flush=True)
        bars += [f.met for f in figures if f.met is not None]
        section = {"environment": env, "seconds": seconds, "quick": job.quick}
        section |= {"figures": plain_rows(figures), "details": details}
        keep(record, SECTIONS, name, section, "The main job, measured")
    page = record.with_suffix(".md")
    print(f"\n{sum(bars)} of {len(bars)} bars met; {short(record)}, {short(page)}")


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", default=",".join(SECTIONS), metavar="A,B")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--reuse", action="store_true", help="keep bundles built from other sources")
    p.add_argument("--out", type=Path, default=ROOT / "bench_out")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="of in-process evaluations")
    args = p.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(SECTIONS):
        p.error(f"--only: no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    args.out = args.out.resolve() / "quick" if args.quick else args.out.resolve()
    return args


if __name__ == "__main__":
    main()
