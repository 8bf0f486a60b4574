"""`edgesolve forget`: exact unlearning. The head becomes what it would be, had some windows never been seen.

A head is the optimum for a sum of moments, so that leaving a window out of the sum and solving again leaves nothing
of it behind: no approximation, no frame needed. What can't be separated goes altogether, with a sentence saying so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from edgesolve.device import audit, candidate, gate
from edgesolve.device.atomic import sync_folder, unwritable
from edgesolve.device.bundle import Bundle
from edgesolve.device.errors import UsageError
from edgesolve.device.generation import Generation, folders, remove
from edgesolve.device.in_force import GENERATIONS, named
from edgesolve.device.runtime import Head, factory_head
from edgesolve.device.solve import solve, source_moments
from edgesolve.kernels.moments import Moments

Rows = dict[int, "float | None"]
"""Generations that brought rows in, each with its time (unix s; None: not known any more)."""


def forget(
    bundle: Bundle, store, *, generations: set[int] | None = None, since: float | None = None
) -> dict[str, Any]:
    """Forget the windows of some generations, and of all since a moment (unix s); returns the report.

    {"decision": "accepted", "reason": "forgotten", "generation", "previous", "solved", "forgotten", "left_out",
    "deleted", "relative_gap", "n", "sentence"}: `solved` is whether a new generation was solved and committed, else an
    earlier one, or the factory head (0), is in force again; `left_out` are windows that went too, because they
    weren't kept any more or had been merged with those that had to go.

    Every folder whose head saw such rows is deleted (not overwritten: a flash card may hold old blocks for a while),
    rejected and unreadable ones as well, and so is a candidate. A kill at any moment leaves a head in force, old or
    new; calling again completes it. Raises UsageError, StateError or BusyError.
    """
    if not generations and since is None:
        raise UsageError("forget: name generations, or a moment since which to forget.")

    def doomed(number: int, when: float | None) -> bool:
        late = since is not None and (when is None or when >= since)
        return late or number in (generations or ())

    with store.lock():
        before = _folders(store)
        items = audit.kept(store.path)
        known = {item.number: item.found for item in items if item.found}
        saw = {number: _saw(found, known) for number, found in known.items()}
        hit = {number for number, rows in saw.items() if any(doomed(*row) for row in rows.items())}
        gone = {n for number in hit for n, when in saw[number].items() if doomed(n, when)}
        used = store.current(bundle.sha256)
        report = _report(used, gone)
        suspect = hit | {item.number for item in items if item.found is None}
        if used and used.number in hit:
            _replace(bundle, store, used, known, doomed, suspect, report)
        now = store.current(bundle.sha256)
        report["generation"] = now.number if now else 0
        _delete(store, suspect - {report["generation"]})
        report["deleted"] = sorted(set(before) - set(_folders(store)))
        report["sentence"] = _sentence(report, hit, used)
        store.journal({"time": time.time(), **_short(report, bundle)})
    return report


def _report(used: Generation | None, gone: set[int]) -> dict[str, Any]:
    return {
        "decision": "accepted",
        "reason": "forgotten",
        "previous": used.number if used else 0,
        "solved": False,
        "forgotten": sorted(gone),
        "left_out": [],
        "relative_gap": None,
        "n": 0,
    }


def _replace(bundle: Bundle, store, used: Generation, known, doomed, suspect, report) -> None:
    """Put a head in force that never saw the rows: solved on what is left, or an earlier one."""
    # Statistics can't be taken apart: they were estimated from the window, not summed.
    clean = None if used.statistics else _solved(bundle, used, known, doomed, report)
    if clean is None:
        _go_back(bundle, store, suspect)
        return
    # First what isn't needed: a commit keeps the newest few, and these must not crowd out clean ones.
    _delete(store, suspect - {used.number, *(number for number, _ in audit.parts(used))})
    at = store.pointer(bundle.sha256)
    committed = at is None or at["committed"]  # else the new one is on probation as well
    store.commit(*clean[:3], window=clean[3], committed=committed)


def rows_of(found: Generation) -> Rows:
    """The generations whose rows lie in this one's own window: itself, or those merged into it."""
    merged = found.provenance.get("merged")
    if merged is not None:
        return {part["generation"]: part["time"] for part in merged}
    if found.provenance.get("reason") == "returned":
        return {}  # the factory head: nothing was learnt from that window
    return {found.number: found.provenance.get("time")}


def remaining(
    found: Generation, known: dict[int, Generation], keep: Callable[[int], bool]
) -> list[tuple[int, float]]:
    """(number, weight) of the windows that `found` is solved on without those that `keep` refuses.

    Each generation's recalibration let all earlier windows count `decay` times as much. Where one was never seen,
    neither was its decay: the windows before it get that factor back.
    """
    left, decays = [], 1.0
    for number, weight in audit.parts(found):
        if keep(number):
            left.append((number, weight / decays))
        else:
            record = known.get(number, found).provenance
            decays *= record.get("options", {}).get("decay") or 1.0
    return left


def merged(left: list[tuple[int, float]], known: dict[int, Generation]) -> Moments | None:
    """The weighted sum of the windows that are left; None where there is none."""
    total = None
    for number, weight in left:
        part = Moments.from_arrays(known[number].window).scaled(weight)
        total = part if total is None else total + part
    return total


def _saw(found: Generation, known: dict[int, Generation]) -> Rows:
    """Every generation whose rows had a say in this head."""
    rows = rows_of(found)
    for number, _ in audit.parts(found):
        rows.update(rows_of(known[number]) if number in known else {number: _latest(number, known)})
    return rows


def _latest(number: int, known: dict[int, Generation]) -> float | None:
    """A time before which a generation that isn't kept was made: that of the next one that is."""
    later = (found.provenance.get("time") for n, found in known.items() if n > number)
    return min((when for when in later if when is not None), default=None)


def _solved(bundle: Bundle, used: Generation, known, doomed, report):
    """What to commit: (head, statistics, provenance, window), solved on the windows that are left; None: there is
    nothing left, or the new head fails what the gate can check without frames."""

    from importlib.metadata import version

    def keep(number: int) -> bool:
        found = known.get(number)
        if found is None or found.window is None:
            report["left_out"].append(number)
            return False
        rows = rows_of(found)
        others = [n for n, when in rows.items() if not doomed(n, when)]
        if len(others) < len(rows):
            report["left_out"] += others  # one sum by now: they can't be told apart
            return False
        return True

    left = remaining(used, known, keep)
    seen = merged(left, known)
    if seen is None or not seen.n > 0:
        return None
    record = used.provenance
    backend, mass = record["backend"], record["mass"]
    window = seen.to_arrays(np.float64)
    reference = bundle.reference(backend)
    # From what is stored, so that an audit solves the same program.
    again = Moments.from_arrays(window)
    solved = solve(bundle, backend, source_moments(reference), again, mass)
    head = Head(solved.weights.astype(np.float32), solved.intercept.astype(np.float32))
    factory = factory_head(bundle, backend)
    figures = audit.anchor_figures(head, factory, reference, solved.relative_gap)
    if not _passes(head, figures):
        return None
    pieces = [
        {"generation": n, "weight": weight * share, "n": rows, "time": when}
        for number, weight in left
        for n, share, rows, when in _pieces(known[number])
    ]
    report.update(solved=True, relative_gap=solved.relative_gap, n=round(seen.n))
    same = ("backend", "mode", "mass", "options", "target", "features_sha256", "bundle", "runtime")
    provenance = {
        **{key: record[key] for key in same if key in record},
        **{key: report[key] for key in ("decision", "reason", "forgotten", "relative_gap", "n")},
        "status": solved.status.name.lower(),
        "time": time.time(),
        "edgesolve": version("edgesolve"),
        "bundle_sha256": bundle.sha256,
        "parent": used.number,
        "window_sha256": None,
        "parts": [{"generation": None, "weight": 1.0}],
        "merged": pieces,
        "gate": figures,
    }
    return head.to_arrays(), None, provenance, window


def _pieces(found: Generation):
    """(generation, weight, rows, time) of what lies in this one's own window."""
    merged = found.provenance.get("merged")
    if merged is None:
        n = float(np.asarray(found.window["n"]).item())
        return [(found.number, 1.0, n, found.provenance.get("time"))]
    return [tuple(part[key] for key in ("generation", "weight", "n", "time")) for part in merged]


def _passes(head: Head, figures: dict[str, float]) -> bool:
    limits = gate.Limits()
    finite = np.isfinite(head.weights).all() and np.isfinite(head.intercept).all()
    lost = figures["anchor_agreement_old"] - figures["anchor_agreement_new"]
    return bool(
        finite and figures["relative_gap"] <= limits.relative_gap and lost <= limits.anchor_loss
    )


def _go_back(bundle: Bundle, store, suspect: set[int]) -> None:
    """To the newest generation that never saw the rows, or to the factory head, by atomic steps."""
    found = store.current(bundle.sha256)
    while found is not None and found.number in suspect:
        store.rollback(bundle.sha256)
        found = store.current(bundle.sha256)


def _folders(store) -> list[str]:
    """Everything under the state folder that may hold windows or heads."""
    names = [f"{GENERATIONS}/{folder.name}" for _, folder in folders(store.path / GENERATIONS)]
    return names + [path.name for path in store.path.glob("candidate*")]


def _delete(store, numbers: set[int]) -> None:
    """Remove these generations, whatever they are called, what is half-written, and any candidate."""
    try:
        for number, folder in folders(store.path / GENERATIONS):
            if number in numbers or folder.suffix == ".tmp":
                # Renamed first: a half-deleted folder must not look like a generation.
                aside = folder.with_suffix(".tmp")
                if aside != folder:
                    remove(aside)
                    os.rename(folder, aside)
                remove(aside)
                sync_folder(store.path / GENERATIONS)
        candidate.discard(store.path)
        for path in store.path.glob("candidate*"):
            remove(path)
        sync_folder(store.path)
    except OSError as error:
        raise unwritable(store.path, error) from error


def _sentence(report: dict[str, Any], hit: set[int], used: Generation | None) -> str:
    now = named(None) if not report["generation"] else f"generation {report['generation']}"
    if not hit:
        return f"No head that is kept saw such rows; {now} stays in force."
    if used is None or used.number not in hit:
        return f"The head in force never saw these rows; {now} stays."
    if not report["solved"]:
        return f"The head that saw these rows is gone; {now}, which never saw them, is in force."
    text = f"The head was solved again without these rows; {now} is in force."
    if report["left_out"]:
        others = ", ".join(map(str, report["left_out"]))
        text += (
            f" Also without the windows of generations {others}: not kept, or in one sum with them."
        )
    return text


def _short(report: dict[str, Any], bundle: Bundle) -> dict[str, Any]:
    keys = ("decision", "reason", "generation", "n", "relative_gap", "forgotten")
    return {**{key: report[key] for key in keys}, "bundle": bundle.manifest["name"]}
