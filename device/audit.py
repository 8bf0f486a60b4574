"""`edgesolve audit`: is every head that the device learnt what its stored moments give, and nothing else?

Each generation is read, its seal and hashes checked, its window looked at, and its convex program solved again, from
the bundle's source moments and the stored windows alone. On the build that solved it the head comes out bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgesolve.device import adapt, device_key, gate
from edgesolve.device.bundle import Bundle
from edgesolve.device.errors import BundleError, StateError
from edgesolve.device.generation import Damaged, Generation, folders, read_generation
from edgesolve.device.in_force import GENERATIONS, named
from edgesolve.device.runtime import Head, factory_head
from edgesolve.device.solve import N0, solve, source_moments
from edgesolve.kernels.moments import Moments, pooled

VERDICTS = ("reproduced", "within_gap", "cannot_replay", "differs")
"""From the best to the worst; an audit's verdict is the worst of its generations'."""

RIDGE = 1e-4
"""Share of the mean variance added before covariances are inverted: float32 storage blurs them by less."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One folder of the state: `found`, or `why` it can't be read."""

    number: int
    folder: Path
    found: Generation | None
    why: str = ""


class _Differs(Exception):
    pass


class _CannotReplay(Exception):
    pass


def audit(bundle: Bundle, store) -> dict[str, Any]:
    """{"generations": [{"generation", "rejected", "sealed", "verdict", "max_abs", "relative_gap", "sentence"}],
    "verdict"}, of every generation in the state folder, rejected ones too; nothing is changed.

    verdict : "reproduced" (the same float32 weights), "within_gap" (other rounding; its objective lies within the
    gap that the gate allows), "differs" (damaged, or not what its moments give) or "cannot_replay" (its window, or
    one that it was solved with, is not kept). max_abs : greatest difference of a weight or intercept; relative_gap :
    certified distance of the stored head from the optimum. Both None without a replay.
    """
    items = kept(store.path)
    known = {item.number: item.found for item in items if item.found}
    keyed = device_key.read(store.path) is not None
    found = [_entry(bundle, item, known, keyed) for item in items]
    worst = max((VERDICTS.index(entry["verdict"]) for entry in found), default=0)
    return {"generations": found, "verdict": VERDICTS[worst], "bundle_sha256": bundle.sha256}


def audit_text(found: dict[str, Any]) -> str:
    """The result for people."""
    from edgesolve.device.views import table

    if not found["generations"]:
        return "Nothing was learnt: the factory head is in force."
    rows = [
        [e["generation"], e["verdict"], e["max_abs"], e["relative_gap"], e["sentence"]]
        for e in found["generations"]
    ]
    head = ["generation", "verdict", "max difference", "relative gap", ""]
    return f"{table(rows, head)}\nverdict: {found['verdict']}"


def kept(state: Path) -> list[Kept]:
    """Every finished generation under `state`, oldest first, rejected ones too."""
    key, items = device_key.read(state), []
    for number, folder in folders(state / GENERATIONS):
        if folder.suffix == ".tmp":
            continue
        try:
            items.append(Kept(number, folder, read_generation(folder, number, key=key)))
        except (Damaged, StateError) as why:
            items.append(Kept(number, folder, None, str(why)))
        except Exception as why:  # its hashes are right: written by something else
            items.append(Kept(number, folder, None, f"it can't be read ({why})"))
    return items


def parts(found: Generation) -> list[tuple[int, float]]:
    """(number, weight) of the generations whose windows this one was solved on, its own first."""
    return [
        (found.number if part["generation"] is None else part["generation"], part["weight"])
        for part in found.provenance.get("parts", [])
    ]


def window(found: Generation, known: dict[int, Generation]) -> Moments:
    """The weighted sum of the windows that `found` was solved on. Raises LookupError naming the one that is gone."""
    total = None
    for number, weight in parts(found):
        arrays = known[number].window if number in known else None
        if arrays is None:
            raise LookupError(f"the window of generation {number} is not kept")
        moments = Moments.from_arrays(arrays)
        moments = moments if weight == 1.0 else moments.scaled(weight)
        total = moments if total is None else total + moments
    if total is None:
        raise LookupError("no window is kept")
    return total


def implausible(arrays: dict[str, np.ndarray]) -> str | None:
    """Why these can't be the moments of any rows and targets, or None.

    Looked at: finite, n > 0, covariances positive semidefinite to float32, and no more of the targets' variance
    explained than there is: tr(C S^-1 C') <= v (Cauchy-Schwarz, over all features at once).
    """
    try:
        moments = Moments.from_arrays(arrays)
    except ValueError as error:
        return str(error).rstrip(".")
    values = (moments.n, moments.stt, moments.sx, moments.sxx, moments.stx, moments.st)
    if not all(np.isfinite(value).all() for value in values):
        return "they hold NaN or inf"
    if not moments.n > 0:
        return f"they count {moments.n:g} rows"
    S, C, v = moments.centred()
    if float(np.asarray(arrays["v"]).item()) < 0:
        return "the targets' variance is negative"
    smallest, trace = float(np.linalg.eigvalsh(S)[0]), float(np.trace(S))
    if smallest < -1e-6 * trace:
        return f"the smallest eigenvalue of the covariance is {smallest:.3g}"
    if trace <= 0:
        return "the features don't vary, the targets do" if np.any(C) else None
    explained = np.linalg.solve(S + RIDGE * trace / len(S) * np.eye(len(S)), C.T)
    if float(np.vdot(C.T, explained)) > v * (1 + 1e-6) + 1e-12 * abs(moments.stt) / moments.n:
        return "the features explain more of the targets than the targets vary"
    return None


def _entry(bundle: Bundle, item: Kept, known: dict[int, Generation], keyed: bool) -> dict[str, Any]:
    found = item.found
    entry = {
        "generation": item.number,
        "rejected": item.folder.suffix == ".rejected",
        "sealed": found.sealed if found and keyed else None,
        "verdict": "differs",
        "max_abs": None,
        "relative_gap": None,
    }
    try:
        if found is None:
            raise _Differs(item.why)
        sentence = _replay(bundle, found, known, entry)
    except _CannotReplay as why:
        entry["verdict"], sentence = "cannot_replay", str(why)
    except (_Differs, BundleError) as why:
        sentence = str(why)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as why:
        sentence = f"its record is not what edgesolve writes ({type(why).__name__}: {why})"
    entry["sentence"] = f"{sentence[:1].upper()}{sentence[1:].rstrip('.')}."
    if entry["sealed"] is False:
        entry["sentence"] += " It doesn't carry the mark of this device's key."
    return entry


def _replay(bundle: Bundle, found: Generation, known, entry: dict[str, Any]) -> str:
    """Fills in verdict and figures; returns the sentence. Raises _Differs or _CannotReplay."""
    record = found.provenance
    if record["bundle_sha256"] != bundle.sha256:
        raise _CannotReplay(
            f"it was solved for bundle {record['bundle_sha256'][:12]}…, this is {bundle.sha256[:12]}…"
        )
    chain = _chain(found, known)
    backend = record["backend"]
    if backend not in bundle.backends:
        raise _CannotReplay(f"the bundle has no {backend}")
    head = Head.from_arrays(found.arrays, f"generation {found.number}")
    if record.get("reason") == "returned":
        entry["max_abs"] = _difference(head, factory_head(bundle, backend))
        if entry["max_abs"] or found.statistics:
            raise _Differs("it says that it is the factory head, and is not")
        entry["verdict"] = "reproduced"
        return f"the factory head{chain}"
    try:
        seen = window(found, known)
    except LookupError as why:
        raise _CannotReplay(f"{why}{chain}") from why
    _check_windows(bundle, found, known)
    reference = bundle.reference(backend)
    source = source_moments(reference)
    start = _start(bundle, found, known)
    solved = solve(bundle, backend, source, seen, record["mass"], start=start)
    again = Head(solved.weights.astype(np.float32), solved.intercept.astype(np.float32))
    if head.weights.shape != again.weights.shape:
        raise _Differs(f"its weights are {head.weights.shape}, not {again.weights.shape}")
    entry["max_abs"] = _difference(head, again)
    entry["relative_gap"] = gap_of(bundle, backend, source, seen, record["mass"], head)
    limit = gate.Limits().relative_gap
    if entry["max_abs"] and not entry["relative_gap"] <= limit:
        raise _Differs(
            f"its objective lies {entry['relative_gap']:.2g} above the optimum of its own moments, "
            f"{limit:.0e} is allowed"
        )
    _check_gate(record, head, factory_head(bundle, backend), reference, entry["relative_gap"])
    entry["verdict"] = "within_gap" if entry["max_abs"] else "reproduced"
    how = "within the gap of" if entry["max_abs"] else "bit for bit"
    others = len(parts(found)) - 1
    earlier = f" and {others} earlier" if others else ""
    return f"the head is {how} what its window{earlier} and the source give{chain}"


def _chain(found: Generation, known: dict[int, Generation]) -> str:
    """What there is to say about its parent. Raises _Differs where there can't be such a parent."""
    told = found.provenance["parent"]
    if not 0 <= found.parent < found.number or told not in (found.parent, 0):
        raise _Differs(
            f"its seal names generation {found.parent} as parent, its provenance {told!r}"
        )
    if found.parent and found.parent not in known:
        return f"; its parent, {named(None) if not told else f'generation {told}'}, is not kept"
    return ""


def _check_windows(bundle: Bundle, found: Generation, known: dict[int, Generation]) -> None:
    """Raises _Differs where a window is no record of rows, of other features, or of another number of rows."""
    record = found.provenance
    if record["features_sha256"] != adapt.features_sha256(
        bundle, record["backend"], found.statistics
    ):
        raise _Differs("its features_sha256 is not that of its statistics")
    for number, weight in parts(found):
        other = known[number]
        if other.provenance["features_sha256"] != record["features_sha256"]:
            raise _Differs(f"the window of generation {number} has other features")
        if not (np.isfinite(weight) and 0 < weight <= 1):
            raise _Differs(f"the window of generation {number} has weight {weight!r}")
        why = implausible(other.window)
        if why:
            raise _Differs(f"the moments of generation {number} are none of any rows: {why}")
    if found.window is None:
        return
    n = float(np.asarray(found.window["n"]).item())
    low, high = expected_rows(record)
    if not low * (1 - 1e-9) <= n <= high * (1 + 1e-9):
        raise _Differs(f"its window counts {n:g} rows, its provenance {low:g}")


def expected_rows(record: dict[str, Any]) -> tuple[float, float]:
    """Between how many rows the own window of a generation with this provenance must count."""
    if "merged" in record:
        n = sum(part["weight"] * part["n"] for part in record["merged"])
        return n, n
    fit = record["n"] - record["n"] // 4  # the last of four judges
    return fit, fit * (adapt.LABEL_WEIGHT if record.get("target") == "labels" else 1.0)


def _start(bundle: Bundle, found: Generation, known: dict[int, Generation]) -> np.ndarray | None:
    """The weights that the solve began at: they decide which point within the gap the group penalty ends at."""
    told = found.provenance["parent"]
    if found.provenance.get("reason") == "forgotten" or (told and told not in known):
        return None
    backend = found.provenance["backend"]
    return known[told].arrays["weights"] if told else factory_head(bundle, backend).weights


def gap_of(
    bundle: Bundle, backend: str, source: Moments, seen: Moments, mass: float, head: Head
) -> float:
    """Certified relative distance of any head from the optimum of `solve`'s program, its intercept included.

    Formed here anew, not by `solve`: whoever solved it, and however, is not trusted.
    """
    from edgesolve.kernels import gap
    from edgesolve.kernels.losses import SquaredMoments
    from edgesolve.kernels.penalties import GroupL2, lam_max
    from edgesolve.kernels.ridge import ridge_absolute

    together = pooled(source, seen, mass * seen.n / (seen.n + N0))
    spec = bundle.manifest["solve"]
    relative = bundle.backends[backend].get("ridge", spec["ridge"])
    loss, penalty = SquaredMoments.of(together, ridge_absolute(together, relative)), None
    if spec["penalty"] != "ridge":
        starts = bundle.arrays(bundle.file(backend, "head"))["starts"]
        penalty = GroupL2(spec["lam"] * lam_max(loss, GroupL2(1.0, starts)), starts)
    weights = head.weights.astype(np.float64)
    found, objective = gap.duality_gap(loss, penalty, weights)
    shift = head.intercept - loss.intercept(weights)
    extra = 0.5 * float(shift @ shift)
    return gap.relative(loss, found + extra, objective + extra)


def _check_gate(record, head: Head, factory: Head, reference, relative_gap: float) -> None:
    """Raises _Differs where the anchors don't say what the gate wrote down; one anchor may be a tie."""
    found = anchor_figures(head, factory, reference, relative_gap)
    room = 1.0 / len(reference["anchor_rows"]) + 1e-9
    for name in ("anchor_agreement_old", "anchor_agreement_new"):
        if not abs(found[name] - record["gate"][name]) <= room:
            raise _Differs(
                f"its {name} is {found[name]:.3f}, its provenance says {record['gate'][name]!r}"
            )


def anchor_figures(head: Head, factory: Head, reference, relative_gap: float) -> dict[str, float]:
    """What the gate can say about a head without any frame: its figures on the source anchors."""
    rows, logits = reference["anchor_rows"].astype(np.float32), reference["anchor_logits"]
    new, old = head(rows), factory(rows)
    evidence = gate.Evidence(new, old, logits, new, old, logits, relative_gap)
    figures = gate.judge(evidence)[1]
    return {
        key: figures[key]
        for key in ("anchor_agreement_old", "anchor_agreement_new", "relative_gap")
    }


def _difference(a: Head, b: Head) -> float:
    return float(max(np.abs(a.weights - b.weights).max(), np.abs(a.intercept - b.intercept).max()))
