"""What people read: tables of the results that `--json` prints."""

from __future__ import annotations

import json
from typing import Any

from edgesolve.device import operator, signature
from edgesolve.device.bundle import Bundle


def table(rows: list[list[Any]], head: list[str] | None = None) -> str:
    """Left-aligned text, right-aligned numbers, two spaces apart."""
    cells = [[_cell(v) for v in row] for row in ([head] if head else []) + rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(widths))]
    lines = [
        "  ".join(
            c.rjust(w) if right else c.ljust(w)
            for c, w, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


# -- inspect -----------------------------------------------------------------------------------


def inspect(bundle: Bundle) -> dict[str, Any]:
    m = bundle.manifest
    report = json.loads(bundle.read("report.json")) if "report.json" in m["files"] else {}
    keys = ("params", "macs", "bytes", "accuracy", "agreement", "layers", "head", "int8")
    return {
        "name": m["name"],
        "sha256": bundle.sha256,
        "schema_version": m["schema_version"],
        "input": m["input"],
        "classes": m["classes"],
        "split": m["split"],
        "rows": m["rows"],
        "backends": {
            name: {
                **{k: v for k, v in entry.items() if k != "patch"},
                "adaptable": bool(entry["patch"]),
            }
            for name, entry in m["backends"].items()
        },
        "files": {name: entry["bytes"] for name, entry in m["files"].items()},
        **{k: report[k] for k in keys if k in report},
    }


def inspect_text(found: dict[str, Any]) -> str:
    shape = "×".join(map(str, found["input"]["shape"]))
    lines = [
        f"{found['name']}  (sha256 {found['sha256'][:12]}…, schema {found['schema_version']})",
        f"input {shape} {found['input']['dtype']}, {len(found['classes'])} classes, "
        f"head from {found['split']}: {found['rows']['gates']} {found['rows']['gate_source']} gates",
        "",
    ]
    if "params" in found:
        rows = [
            [key, f"{found[key]['before']:,}", f"{found[key]['after']:,}",
             f"{found[key]['after'] / found[key]['before']:.3f}"]
            for key in ("params", "macs", "bytes")
        ]  # fmt: skip
        for key in ("accuracy", "agreement"):
            rows.append([key, percent(found[key]["before"]), percent(found[key]["after"]), ""])
        lines += [table(rows, ["", "before", "after", "ratio"]), ""]
    if "layers" in found:
        rows = [
            [e["layer"], e["op"], e["params"], e["macs"], e["decision"]] for e in found["layers"]
        ]
        lines += [table(rows, ["layer", "op", "params", "macs", "decision"]), ""]
    if found.get("int8"):
        rows = [
            [e["backend"], e["bytes"], percent(e["accuracy"]), percent(e["agreement"]),
             e["milliseconds"], e["float_milliseconds"], e["reason"]]
            for e in found["int8"]
        ]  # fmt: skip
        head = ["backend", "bytes", "accuracy", "agreement", "ms", "float ms", "used by default"]
        lines += [table(rows, head), ""]
    rows = [[name, size] for name, size in found["files"].items()]
    return "\n".join([*lines, table(rows, ["file", "bytes"])])


# -- verify, predict, eval ---------------------------------------------------------------------


def verify_text(found: dict[str, Any]) -> str:
    lines = [f"{len(found['files'])} files match their hashes; {found['signature']}."]
    for name, entry in found["backends"].items():
        if "skipped" in entry:
            lines.append(f"{name}: skipped, {entry['skipped']}")
            continue
        parts = [f"{k} {v:.1e}" for k, v in entry.items() if isinstance(v, float) and k != "top1"]
        whom = "torch" if entry["precision"] == "float32" else "the build's own int8 run"
        lines.append(f"{name} ({entry['runtime']}): top-1 {percent(entry['top1'])}; largest "
                     f"differences from {whom}: {', '.join(parts)}")  # fmt: skip
    return "\n".join(lines)


def predict_text(found: dict[str, Any]) -> str:
    return table(
        [[i["name"], i["class"], i["score"]] for i in found["items"]], ["item", "class", "score"]
    )


def eval_text(found: dict[str, Any]) -> str:
    rows = [
        [e["class"], e["n"], percent(e["accuracy"]), percent(e["agreement"])]
        for e in found["per_class"]
    ]
    rows.append(["all", found["n"], percent(found["accuracy"]), percent(found["agreement"])])
    end = f"generation {found['generation']} on {found['backend']}"
    if found["original_accuracy"] is not None:
        end += f"; the original network: {percent(found['original_accuracy'])}"
    return table(rows, ["class", "n", "accuracy", "agreement"]) + "\n" + end


# -- recalibrate, status -----------------------------------------------------------------------


def recalibrate_text(found: dict[str, Any]) -> str:
    lines = [f"{found['decision']}: {found['reason']}. {found['sentence']}"]
    parts = [
        f"{found['n']} frames",
        f"{found['seconds']:.1f} s",
        f"peak {found['peak_rss_mib']:.0f} MiB",
    ]
    if found.get("drift"):
        parts.append(f"drift {found['drift']['score']:.1f} (1 = alarm)")
    if found["relative_gap"] is not None:
        parts.append(f"relative gap {found['relative_gap']:.1e}")
    lines.append(", ".join(parts))
    if found.get("gate"):
        g = found["gate"]
        lines.append(
            f"agreement with the re-normalised teacher on held-out frames "
            f"{percent(g['heldout_agreement_old'])} -> {percent(g['heldout_agreement_new'])}; "
            f"on source anchors {percent(g['anchor_agreement_old'])} -> {percent(g['anchor_agreement_new'])}; "
            f"{percent(found['flipped'])} of the answers change"
        )
    lines.append(f"in force: {_head(found['generation'])} (before: {_head(found['previous'])}), "
                 f"mode {found.get('mode', '–')}, {found['runtime']}")  # fmt: skip
    return "\n".join([*lines, *found["notes"], *found.get("skipped", [])])


def _head(generation: int) -> str:
    return f"generation {generation}" if generation else "the factory head"


def status(bundle: Bundle, store) -> dict[str, Any]:
    current = store.current(bundle_sha256=bundle.sha256)
    notes, at = list(store.notes), store.pointer(bundle.sha256)
    history = store.history()
    provenance = current.provenance if current else {}
    return {
        "schema": 1,
        "bundle": bundle.manifest["name"],
        "bundle_sha256": bundle.sha256,
        "signature": signature.check(bundle, signature.trusted_keys(), required=False),
        "state": str(store.path),
        "generation": current.number if current else 0,
        "committed": at["committed"] if at else True,
        "candidate": bool(store.candidate(bundle.sha256)),
        "frozen": operator.frozen(store),
        "previous": current.parent if current else 0,
        "renormalised": bool(current and current.statistics),
        "backend": provenance.get("backend"),
        "target": provenance.get("target"),
        "drift": provenance.get("drift"),
        "relative_gap": provenance.get("relative_gap"),
        "last": history[-1] if history else None,
        "decisions": len(history),
        "notes": notes,
    }


def status_text(found: dict[str, Any]) -> str:
    lines = [
        f"{found['bundle']}: {_head(found['generation'])} in force"
        + (f", previous {_head(found['previous'])}" if found["generation"] else ""),
        f"state {found['state']}, {found['decisions']} decisions",
    ]
    if found["candidate"]:
        lines.append("a proposed head waits: edgesolve approve, or edgesolve reject")
    if not found["committed"]:
        lines.append("the head in force is on probation")
    if found["frozen"]:
        lines.append("learning is frozen: edgesolve unfreeze lets it learn again")
    if found["last"]:
        lines.append(f"last: {found['last'].get('decision')} ({found['last'].get('reason')})")
    return "\n".join([*lines, *found["notes"]])


# -- doctor, warmup ----------------------------------------------------------------------------


def doctor(found: list) -> dict[str, Any]:
    rows = [
        {"name": c.name, "status": c.status, "found": c.found, "advice": c.advice} for c in found
    ]
    return {"checks": rows, "faults": sum(c.status == "fault" for c in found)}


def doctor_text(found: dict[str, Any]) -> str:
    rows = [[c["status"], c["name"], c["found"], c["advice"]] for c in found["checks"]]
    return table(rows, ["", "check", "found", "advice"])


def warmup_text(found: dict[str, Any]) -> str:
    if not found["kernels"]:
        return "Numba is missing or switched off: the NumPy path is used, nothing to compile."
    rows = [[k["kernel"], round(k["seconds"], 2)] for k in found["kernels"]]
    return table(rows, ["kernel", "seconds"]) + f"\ncompiled into {found['cache']}"
