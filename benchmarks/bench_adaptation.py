"""Adaptation without labels beside published methods: CIFAR-10-C, JPEG, activity, keywords; no harm; alarms.

    make bench-adaptation                                       everything, about an hour on one core
    python benchmarks/bench_adaptation.py --only corruptions --seeds 1 --reuse
    python benchmarks/bench_adaptation.py --quick               two corruptions, one seed

A seed decides which frames form the window; windows and judged frames share none. Tables go to stdout, progress to
stderr, everything to OUT/adaptation.json and .md (--quick: to OUT/quick). A missed bar is printed as MISSED and does
not change the exit code.
"""

from __future__ import annotations

import argparse

import adaptation_harm as harm
import adaptation_others as others
import adaptation_sections as sections
import torch
from adaptation_common import Bench
from job import Job
from measure import measure, parsed, parser, with_one_blas_thread

SECTIONS = {
    "corruptions": sections.corruptions,
    "jpeg": sections.recompressed,
    "sizes": sections.sizes,
    "levers": sections.levers,
    "harmless": harm.harmless,
    "alarms": harm.alarms,
    "keywords": others.keywords,
    "activity": others.activity,
}


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        Job(args.out, args.quick, args.reuse, args.threads), args.seeds, judged=args.judged
    )
    measure(
        SECTIONS,
        args.only,
        bench,
        args.out / "adaptation.json",
        "Adaptation without labels, measured",
        threads=args.threads,
        quick=args.quick,
    )


def _arguments() -> argparse.Namespace:
    p = parser(__doc__, SECTIONS)
    p.add_argument("--reuse", action="store_true", help="keep bundles built from other sources")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--judged", type=int, default=2000, help="test frames that judge a method")
    return parsed(p, SECTIONS)


if __name__ == "__main__":
    with_one_blas_thread()
    main()
