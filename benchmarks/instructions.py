"""Compares instruction counts of the emulated board with the accepted ones: a regression shows.

    python benchmarks/instructions.py            count once, print the table, fail above the tolerance
    python benchmarks/instructions.py --renew    count RUNS times, write the reference

Needs the kit of deploy/arm64 with the wheel installed; `count_instructions.py` counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CPU = os.environ.get("ARM_CPU") or "cortex-a72"
REFERENCE = ROOT / "benchmarks" / "reference" / f"{CPU}.json"
RENEW = "`make reference-arm64`"
RUNS = 3
TOLERANCE = 0.03
"""Five times what folder, cache and environment move (0.5 %)."""

Report = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--renew", action="store_true", help="write the reference")
    shown = REFERENCE.relative_to(ROOT)
    if parser.parse_args().renew:
        # Equal runs count equally to the last digit: a longer environment moves the stack.
        made = reference_of([counted(padding=1000 * run) for run in range(RUNS)])
        if 3 * made["spread"] > TOLERANCE:
            sys.exit(f"Runs differ by {made['spread']:.1%}, over {TOLERANCE / 3:.0%}: not written.")
        REFERENCE.parent.mkdir(exist_ok=True)
        REFERENCE.write_text(json.dumps(made, indent=2) + "\n")
        print(f"{shown}: {len(made['counts'])} counts, spread {made['spread']:.2%}")
        return
    if not REFERENCE.is_file():
        sys.exit(f"{shown} is missing: write it with {RENEW}.")
    lines, failure = compare(counted(), json.loads(REFERENCE.read_text()))
    print("\n".join(lines))
    if failure:
        sys.exit(failure)


def compare(found: Report, reference: Report) -> tuple[list[str], str | None]:
    """(the table and remarks, the sentence that fails the check or None).

    Counts are comparable between equal versions alone: with others nothing fails.
    """
    lines, allowed, was = table(found, reference), 1.0 + reference["tolerance"], reference["counts"]
    ratios = {name: count / was[name] for name, count in found["counts"].items() if name in was}
    above = [name for name, ratio in ratios.items() if ratio > allowed]
    below = [name for name, ratio in ratios.items() if ratio * allowed < 1.0]
    unmatched = sorted(found["counts"].keys() ^ was.keys())
    new, old = found["versions"], reference["versions"]
    changed = [
        f"{name} {new.get(name)}, was {old.get(name)}"
        for name in sorted(new.keys() | old.keys())
        if new.get(name) != old.get(name)
    ]
    if below:
        lines.append(f"Less than the reference: {'; '.join(below)}. Keep it with {RENEW}.")
    if changed:
        lines.append(f"Nothing is judged: {'; '.join(changed)}. Renew the reference with {RENEW}.")
        return lines, None
    if above:
        return lines, (
            f"More than {reference['tolerance']:.0%} above the reference: {'; '.join(above)}. "
            f"If that is meant, renew it with {RENEW} and commit it."
        )
    if unmatched:
        return lines, f"Without a pair: {'; '.join(unmatched)}. Renew the reference with {RENEW}."
    return lines, None


def table(found: Report, reference: Report) -> list[str]:
    """Name, instructions, reference and ratio; then the solves that take other iterations."""
    was, steps = reference["counts"], reference["iterations"]
    width = max(map(len, found["counts"]))
    lines = [f"{'':{width}}  instructions     reference   ratio"]
    for name, count in found["counts"].items():
        known = f"{was[name]:13,} {count / was[name]:7.3f}" if name in was else f"{'none':>13}"
        lines.append(f"{name:{width}} {count:13,} {known}")
    for name, n in found["iterations"].items():
        if n != steps.get(name, n):
            lines.append(f"{name}: {n} iterations, the reference took {steps[name]}.")
    return lines


def reference_of(reports: list[Report]) -> Report:
    """The medians of some runs; `spread` is the largest max/min - 1 among the names."""
    runs = {name: [r["counts"][name] for r in reports] for name in reports[0]["counts"]}
    return {
        "cpu": CPU,
        "versions": reports[0]["versions"],
        "runs": len(reports),
        "spread": round(max(max(n) / min(n) - 1.0 for n in runs.values()), 5),
        "tolerance": TOLERANCE,
        "counts": {name: round(statistics.median(n)) for name, n in runs.items()},
        "iterations": reports[0]["iterations"],
    }


def counted(padding: int = 0) -> Report:
    """One run on the emulated board, with so many more bytes in its environment."""
    began = time.perf_counter()
    with tempfile.NamedTemporaryFile(prefix="icount-") as marks:
        variables = {"ARM_CPU": CPU, "ARM_ICOUNT": "1", "ICOUNT_OUT": marks.name}
        done = subprocess.run(
            [ROOT / "deploy/arm64/python", "-P", ROOT / "benchmarks/count_instructions.py"],
            env={**os.environ, **variables, "PADDING": padding * "x"},
            stdout=subprocess.PIPE,
            text=True,
        )
    if done.returncode:
        sys.exit(f"The emulated Python could not count: it ended with {done.returncode}.")
    report = json.loads(done.stdout)
    report["versions"]["qemu"] = qemu_version()
    print(f"counted in {time.perf_counter() - began:.0f} s", flush=True)
    return report


def qemu_version() -> str:
    told = subprocess.run(["qemu-aarch64", "--version"], capture_output=True, text=True, check=True)
    return told.stdout.split()[2]  # qemu-aarch64 version 7.2.22 (Debian ...


if __name__ == "__main__":
    main()
