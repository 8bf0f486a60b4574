"""Faults injected into the state folder of a device: what loads afterwards.

    python benchmarks/bench_faults.py                   everything (about two minutes of one core)
    python benchmarks/bench_faults.py --only damage     one section again; the others stay in the table
    python benchmarks/bench_faults.py --quick           a twentieth of the points

    faults     every durable system call of every operation: kill -9 before and after it, half of a write, a power cut
               (what was not synced is lost), ENOSPC, EIO, EROFS, once and from there on
    damage     every file of a state: flipped bits, cut, zeroed, grown, lost
    contend    two processes change one state while a third reads it and one of them is killed
    mutants    the same on stores that are wrong: they must be found out

After each the head in use must be the one before or the one after, every byte of it, and take another commit and go
back again. Tables go to stdout, everything to OUT/faults.json and .md (--quick: to OUT/quick). A missed bar is
printed as MISSED and does not change the exit code.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from environment import ROOT, say
from figures import Figure, at_least, at_most, plain
from measure import measure, parsed, parser, with_one_blas_thread

sys.path.insert(0, str(ROOT / "tests" / "device"))
import store_faults

COMMAND = "python benchmarks/bench_faults.py --only "
Section = tuple[list[Figure], dict]


@dataclass(frozen=True)
class Bench:
    quick: bool
    folder: Path

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full


def faults(bench: Bench) -> Section:
    found = store_faults.inject(bench.folder, bench.size(1, 20), say)
    columns = ["calls", "points", "killed", "raised", "done"]
    rows = [["operation", *columns, "wrong"]]
    rows += [[n, *(str(c[key]) for key in columns), str(len(c["bad"]))] for n, c in found.items()]
    points, bad = _points(found), _bad(found)
    figures = [
        _enough("distinct points: operation, system call, fault", points, 2000, bench),
        at_most("states neither old nor new, or that can't be loaded", len(bad), 0),
        at_most("operations that ended in a defect of ours", _total(found, "crashed"), 0),
        plain("killed, by kill -9 or a power cut", _total(found, "killed"), ""),
        plain("failed with one sentence", _total(found, "raised"), ""),
    ]
    caption = "done: the fault hit what may fail, such as deleting an older generation"
    return _named(figures, "faults"), {"tables": {caption: rows}, "bad": bad}


def damage(bench: Bench) -> Section:
    found = store_faults.damage(bench.folder, bench.size(24, 2), say)
    columns = ["points", "unchanged", "fell back"]
    rows = [["file", *columns, "wrong"]]
    rows += [[n, *(str(c[key]) for key in columns), str(len(c["bad"]))] for n, c in found.items()]
    points, bad = _points(found), _bad(found)
    figures = [
        _enough("damaged files tried", points, 1000, bench),
        at_most("states that loaded neither the head in use nor the one before", len(bad), 0),
        plain("fell back to the one before", _total(found, "fell back"), ""),
    ]
    caption = "in use after each damage: the same head, or the one before it"
    return _named(figures, "damage"), {"tables": {caption: rows}, "bad": bad}


def contend(bench: Bench) -> Section:
    found = store_faults.contend(bench.folder, bench.size(60, 5), say)
    figures = [
        at_most("reads of a half-written state, failed writers", len(found["bad"]), 0),
        plain("reads between changes", found["reads"], ""),
        plain("changes by two processes", found["changes"], ""),
        plain("refused because the other held the lock", found["busy"], ""),
    ]
    return _named(figures, "contend"), found


def mutants(bench: Bench) -> Section:
    figures, sentences = [], {}
    for name in store_faults.MUTANTS:
        with store_faults.mutant(name):
            if name == "unchecked":
                found = store_faults.damage(bench.folder, 1, say)
            else:
                found = store_faults.inject(bench.folder, 37)
        bad = sentences[name] = _bad(found)
        figures.append(at_least(f"found wrong: {name}, of {_points(found)}", len(bad), 1, ""))
    return _named(figures, "mutants"), {"bad": sentences}


SECTIONS: dict[str, Callable[[Bench], Section]] = {
    "faults": faults,
    "damage": damage,
    "contend": contend,
    "mutants": mutants,
}


def main() -> None:
    args = parsed(parser(__doc__, SECTIONS), SECTIONS)
    memory = Path("/dev/shm")  # a kill needs no slow disk, and a power cut is played
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        measure(
            SECTIONS,
            args.only,
            Bench(args.quick, Path(folder)),
            args.out / "faults.json",
            "Faults in the state folder",
            threads=1,
            quick=args.quick,
        )


def _enough(what: str, n: int, bar: int, bench: Bench) -> Figure:
    return plain(what, n, "") if bench.quick else at_least(what, n, bar, "")


def _points(found: dict) -> int:
    return _total(found, "points")


def _total(found: dict, key: str) -> int:
    return sum(counts[key] for counts in found.values())


def _bad(found: dict) -> list[str]:
    return [sentence for counts in found.values() for sentence in counts["bad"]]


def _named(figures: list[Figure], section: str) -> list[Figure]:
    return [replace(f, command=COMMAND + section) for f in figures]


if __name__ == "__main__":
    with_one_blas_thread()
    main()
