"""The status page: one HTML document without scripts or anything from elsewhere, for phones and desks, light and dark.

Bars are SVG attributes, so that the page needs no inline style and its policy can forbid them.
"""

from __future__ import annotations

import math
import time
from html import escape
from typing import Any

from edgesolve.device import reasons
from edgesolve.device.page_style import STYLE
from edgesolve.device.triage import SENTENCES as DRIFT

REFRESH_S = 10
# Runs that support a percentile: operations.md, section 10.
FEWEST = {"p50": 11, "p90": 64, "p99": 662}
MOST_CLASSES = 12
NOTHING = "–"
MODES = {
    "off": "learning is off",
    "observe": "observes and reports",
    "propose": "proposes, a person decides",
    "auto": "updates itself",
}
DECISIONS = {
    "accepted": ("good", "Accepted"),
    "proposed": ("accent", "Proposed"),
    "kept": ("quiet", "Kept"),
    "rollback": ("warn", "Rolled back"),
    "rolled_back": ("warn", "Rolled back"),
}
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Crect width='16' "
    "height='16' rx='4' fill='%230b63b6'/%3E%3Cpath d='M4 11l3-4 2 2 3-4' fill='none' stroke='white' "
    "stroke-width='1.6'/%3E%3C/svg%3E"
)


def render(status: dict[str, Any], *, may_command: bool, message: str = "") -> str:
    """The whole page for `Control.status()`. Buttons only with `may_command`; every text is escaped.

    It asks for itself again after REFRESH_S seconds, except while a proposal waits: whoever reads one
    shouldn't lose the place. What isn't known reads "–", never 0.
    """
    status = _shaped(status)
    device = _text(status.get("device"))
    waits = bool(status["candidate"])
    refresh = "" if waits else f'<meta http-equiv="refresh" content="{REFRESH_S};url=/">'
    body = "".join(
        (
            _header(status, device),
            f'<div class="note accent" role="status">{escape(message)}</div>' if message else "",
            _adapting(status["adapting"]),
            _candidate(status["candidate"], may_command) if waits else "",
            f'<div class="grid"><div>{_in_force(status)}{_latency(status)}</div>'
            f"<div>{_drift(status)}{_resources(status)}</div></div>",
            _generations(status, may_command),
            _decisions(status),
            _footer(status, may_command, waits),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}'
        f"<title>{device} · edgesolve</title>"
        f'<link rel="icon" href="{_ICON}"><style>{STYLE}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )


def proposal_id(status: dict[str, Any]) -> str:
    """What tells the proposal of `status` from another one; "" if there is none.

    A decision from the page names it: the page may be older than the proposal that waits now.
    """
    found = status.get("candidate")
    return str(found.get("time")) if isinstance(found, dict) and found else ""


_PARTS = ("adapting", "candidate", "drift", "latency_ms", "probation", "skipped", "window")
_LISTS = ("generations", "history")


def _shaped(status: dict[str, Any]) -> dict[str, Any]:
    """With every part a dict and every list a list, whatever was given: a page must always come."""
    parts = {key: found if isinstance(found := status.get(key), dict) else {} for key in _PARTS}
    lists = {
        key: [item for item in found if isinstance(item, dict)]
        if isinstance(found := status.get(key), list)
        else []
        for key in _LISTS
    }
    return {**status, **parts, **lists}


# -- sections


def _header(status: dict[str, Any], device: str) -> str:
    pills = [_pill("good", "Ready") if status.get("ready") else _pill("bad", "Not ready")]
    if status.get("frozen"):
        pills.append(_pill("warn", "Frozen"))
    if status.get("candidate"):
        pills.append(_pill("accent", "Proposal waiting"))
    if status.get("probation"):
        pills.append(_pill("warn", "On probation"))
    mode = _known(MODES, status.get("mode"))
    what = " · ".join(_text(part) for part in (status.get("bundle"), status.get("backend"), mode))
    return (
        f'<header><div><h1>{device}</h1><span class="dim">{what}</span></div>'
        f'<div class="pills">{"".join(pills)}</div></header>'
    )


def _adapting(found: dict[str, Any]) -> str:
    if not found:
        return ""
    step = str(found.get("step") or "working")
    pause = ", paused to cool down" if found.get("paused") else ""
    kind = "warn" if pause else "accent"
    return (
        f'<div class="note {kind}"><b>{escape(step[:1].upper() + step[1:])}</b>, '
        f"{_number(found.get('seconds'), 's', 1)}{pause}. Answers go on meanwhile.</div>"
    )


def _candidate(found: dict[str, Any], may_command: bool) -> str:
    gate = found["gate"] if isinstance(found.get("gate"), dict) else {}
    target = _known(reasons.TARGETS, found.get("target"))
    choices = ("approve", "Approve", "main"), ("reject", "Reject", "")
    buttons = _buttons(may_command, *choices, about=proposal_id({"candidate": found}))
    figures = (
        ("Answers that change", _percent(found.get("flipped")), "of the held-out frames"),
        ("Agreement, held-out frames", _change(gate, "heldout_agreement"), "with its target"),
        ("Agreement, anchors", _change(gate, "anchor_agreement"), "with the original network"),
        ("Certificate", _exponent(found.get("relative_gap")), "relative gap to the optimum"),
    )
    return (
        '<section class="wants"><h2>A new head waits for your decision</h2>'
        f'<p class="dim">Solved {_when(found.get("time"))} from {_number(found.get("n"), "frames")} in '
        f"{_number(found.get('seconds'), 's', 1)}. Its target: {_text(target)}. "
        f"Nothing changes until it is approved, and it can be rolled back.</p><h3>What would change</h3>"
        f"{_figures(figures)}{_classes(found.get('classes'))}{buttons}</section>"
    )


def _classes(found: list[dict[str, Any]] | None) -> str:
    if not isinstance(found, list):
        return ""
    moves = [
        (change, before, after, item.get("class"))
        for item in found
        if _is_number(before := item.get("before")) and _is_number(after := item.get("after"))
        if abs(change := after - before) >= 0.0005
    ]
    if not moves:
        return "<h3>Classes</h3><p>No class gains or loses answers.</p>"
    moves.sort(key=lambda move: -abs(move[0]))
    shown, rest = sorted(moves[:MOST_CLASSES], key=lambda move: -move[0]), moves[MOST_CLASSES:]
    widest = max(abs(move[0]) for move in shown)
    rows = "".join(
        f'<span title="{_text(name)}">{_text(name)}</span>{_diverging(change / widest)}'
        f'<span class="number minor">{_percent(before, 1)} → {_percent(after, 1)}</span>'
        f'<span class="number">{_signed(100 * change)}</span>'
        for change, before, after, name in shown
    )
    note = f'<p class="dim">and {len(rest)} classes that change less.</p>' if rest else ""
    return (
        "<h3>Share of the answers by class</h3>"
        '<div class="change"><span class="head">Class</span>'
        '<span class="head ends"><span>loses</span><span>gains</span></span>'
        '<span class="head number minor">now → then</span><span class="head number">points</span>'
        f"{rows}</div>{note}"
    )


def _in_force(status: dict[str, Any]) -> str:
    generation = status.get("generation")
    name = "Factory head" if generation == 0 else f"Generation {_number(generation)}"
    trial = status["probation"]
    if trial:
        state = _pill("warn", "On probation")
    elif generation == 0:
        state = _pill("quiet", "As shipped")
    elif status.get("committed"):
        state = _pill("good", "Committed")
    else:
        state = _pill("warn", "Not yet committed")
    rows = [] if generation == 0 else _origin(status)
    rows += [
        ("Answers given", _number(status.get("inferences_total"))),
        ("Errors", _number(status.get("errors_total"))),
        ("Running for", _duration(status.get("uptime_s"))),
        ("Signature", _text(status.get("signature"))),
    ]
    if trial:
        left = _duration(trial.get("seconds_left"))
        more = _number(trial.get("inferences_left"), "answers")
        rows.insert(0, ("Until it is committed", f"{left} and {more}"))
        rows.insert(1, ("Restarts it survives", _number(trial.get("tries_left"))))
    return f'<section><h2>In force</h2><p class="big">{name}</p>{state}{_rows(rows)}</section>'


def _origin(status: dict[str, Any]) -> list[tuple[str, str]]:
    target = status.get("target")
    return [
        ("In force for", _duration(status.get("head_age_s"))),
        ("Target", _text(_known(reasons.TARGETS, target))),
    ]


def _latency(status: dict[str, Any]) -> str:
    found = status["latency_ms"]
    figures = []
    for name, fewest in FEWEST.items():
        value = found.get(name)
        text = _number(value, "ms", 1)
        if not _is_number(value) and _is_number(found.get("n")) and found["n"] < fewest:
            text = f"n/a, needs {fewest}"
        figures.append((name, text, ""))
    return (
        f"<section><h2>Latency</h2>{_figures(figures, 'figures close')}"
        f'<p class="dim">of the last {_number(found.get("n"), "answers")}; p90 and p99 are upper bounds. '
        f"Deadlines missed: {_number(status.get('deadline_misses_total'))}.</p></section>"
    )


def _window(found: dict[str, Any]) -> str:
    n, capacity = found.get("n"), found.get("capacity")
    kept = "frames are stored" if found.get("stores_frames") else "frames are in memory only"
    return (
        f"<h3>Window</h3>{_bar(_share(n, capacity), f'{_number(n)} of {_number(capacity)} frames')}"
        f'<p>{_number(n)} of {_number(capacity, "frames")} <span class="dim">· {kept}</span></p>'
    )


def _drift(status: dict[str, Any]) -> str:
    found, window = status["drift"], _window(status["window"])
    if not found:
        note = f'<p class="dim">No window was tested yet.</p>{window}'
        return f'<section><h2>Drift</h2><p class="big">Not measured</p>{note}</section>'
    score, threshold = found.get("score"), found.get("threshold")
    alarm = bool(found.get("alarm"))
    scale = 1.5
    if _is_number(score) and _is_number(threshold) and threshold > 0:
        scale = max(1.5, 1.15 * score / threshold)
    share = _share(score, None if not _is_number(threshold) else threshold * scale)
    state = _pill("warn", "Alarm") if alarm else _pill("good", "No alarm")
    label = f"drift score {_number(score, '', 2)}, threshold {_number(threshold, '', 2)}"
    kind = _known(DRIFT, found.get("kind"))
    return (
        f'<section><h2>Drift</h2><p class="big">{_number(score, "", 2)} '
        f"<small>of {_number(threshold, '', 2)} for an alarm</small></p>{state}"
        f"{_bar(share, label, 'warn' if alarm else '', mark=1 / scale)}<p>{_text(kind)}</p>"
        f'<p class="dim">Without drift, one window in {_number(found.get("windows_per_false_alarm"))} '
        f"would alarm.</p>{window}</section>"
    )


def _resources(status: dict[str, Any]) -> str:
    throttled = status.get("throttled")
    if not isinstance(throttled, (list, tuple)):
        limits = "not measured"
    else:
        names = [str(one).replace("_", " ") for one in throttled]
        limits = " ".join(_pill("warn", name) for name in names) or "nothing"
    written, budget = status.get("written_today_mib"), status.get("write_budget_mib")
    share = _share(written, budget)
    years = status.get("card_years_projected")
    rows = [
        ("Temperature", _number(status.get("soc_temp_c"), "°C", 1, "not measured")),
        ("Slowed down by", limits),
        ("Memory", _number(status.get("rss_mib"), "MiB", 0, "not measured")),
        ("Updates today", _number(status.get("updates_today"))),
        ("Rollbacks ever", _number(status.get("rollbacks_total"))),
        ("Written in all", _number(status.get("written_total_mib"), "MiB", 1)),
    ]
    if years is not None:
        rows.append(("Card lasts, projected", _number(years, "years", 1)))
    text = f"{_number(written, 'MiB', 1)} of {_number(budget, 'MiB')} written today"
    kind = "bad" if share is not None and share > 0.9 else ""
    return (
        f"<section><h2>Resources</h2><p>{text}</p>{_bar(share, text, kind)}{_rows(rows)}</section>"
    )


def _generations(status: dict[str, Any], may_command: bool) -> str:
    rows = "".join(_generation(item) for item in status["generations"])
    table = (
        '<div class="wide"><table><thead><tr><th>Generation<th>Solved<th class="minor">From'
        '<th class="minor">Frames<th class="minor">Target<th class="minor">Gap'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    if not rows:
        table = '<p class="dim">Nothing was learnt yet; the factory head is in force.</p>'
    button, previous = "", status.get("previous")
    if status.get("generation"):
        to = f"generation {_number(previous)}" if previous else "the factory head"
        button = _buttons(may_command, ("rollback", f"Roll back to {to}", ""))
    return f"<section><h2>Generations</h2>{table}{button}</section>"


def _generation(item: dict[str, Any]) -> str:
    state = ""
    if item.get("in_force"):
        committed = item.get("committed")
        state = _pill("good", "In force") if committed else _pill("warn", "On probation")
    number, parent = item.get("generation"), item.get("parent")
    name = "factory" if number == 0 else _number(number)
    cells = (
        f"<b>{name}</b> {state}",
        _when(item.get("time")),
        "factory" if parent == 0 else _number(parent),
        _number(item.get("n")),
        _text(str(item.get("target") or NOTHING).replace("_", " ")),
        _exponent(item.get("relative_gap")),
    )
    minor = (2, 3, 4, 5)
    return f"<tr>{''.join(_cell(cell, i in minor) for i, cell in enumerate(cells))}</tr>"


def _cell(content: str, minor: bool) -> str:
    return f'<td class="minor">{content}</td>' if minor else f"<td>{content}</td>"


def _decisions(status: dict[str, Any]) -> str:
    items = "".join(_decision(item) for item in reversed(status["history"]))
    skipped = ", ".join(
        f"{_text(name).replace('_', ' ')} {_number(count)}×"
        for name, count in status["skipped"].items()
    )
    note = f'<p class="dim">Put off since the start: {skipped}.</p>' if skipped else ""
    return (
        f"<section><h2>Last decisions</h2><ol>{items}</ol>"
        f"{'' if items else '<p class=dim>None yet.</p>'}{note}</section>"
    )


def _decision(item: dict[str, Any]) -> str:
    decision, reason = item.get("decision"), item.get("reason")
    kind, word = DECISIONS.get(str(decision), ("quiet", decision))
    facts = [f"<code>{_text(reason)}</code>", _when(item.get("time"))]
    if _is_number(item.get("generation")):
        facts.append(
            "factory head"
            if item["generation"] == 0
            else f"generation {_number(item['generation'])}"
        )
    if item.get("n"):
        facts.append(_number(item["n"], "frames"))
    if _is_number(item.get("seconds")):
        facts.append(_number(item["seconds"], "s", 1))
    return (
        f"<li><div>{_pill(kind, word)}</div><div>{escape(reasons.sentence(reason))}<br>"
        f'<span class="dim">{" · ".join(facts)}</span></div></li>'
    )


def _footer(status: dict[str, Any], may_command: bool, waits: bool) -> str:
    freeze = ("unfreeze", "Unfreeze", "") if status.get("frozen") else ("freeze", "Freeze", "")
    control = _buttons(may_command, ("recalibrate", "Recalibrate now", ""), freeze)
    if not may_command:
        control = "<span>Read only. For the buttons, open <code>/login?token=…</code> once.</span>"
    pace = "waits with you for a decision" if waits else f"refreshes every {REFRESH_S} s"
    return (
        f"<footer>{control}<span>This page {pace}. "
        '<a href="/status.json">status.json</a> · <a href="/metrics">metrics</a></span></footer>'
    )


# -- small parts


def _buttons(may_command: bool, *buttons: tuple[str, str, str], about: str = "") -> str:
    if not may_command:
        return ""
    hidden = f'<input type="hidden" name="about" value="{escape(about)}">' if about else ""
    inner = "".join(
        f'<button name="command" value="{name}"{f" class={kind}" if kind else ""}>{label}</button>'
        for name, label, kind in buttons
    )
    return f'<form method="post" action="/command">{hidden}{inner}</form>'


def _pill(kind: str, text: Any) -> str:
    return f'<span class="pill {kind}">{_text(text)}</span>'


def _figures(figures, kind: str = "figures") -> str:
    cells = ""
    for name, value, note in figures:
        known = "" if value[:1].isdigit() else ' class="none"'
        small = f"<small>{note}</small>" if note else ""
        cells += f"<div><dt>{_text(name)}</dt><dd{known}>{value}{small}</dd></div>"
    return f'<dl class="{kind}">{cells}</dl>'


def _rows(rows) -> str:
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    return f'<dl class="rows">{cells}</dl>'


def _bar(share: float | None, label: str, kind: str = "", mark: float | None = None) -> str:
    """A bar of `share` (0 to 1; None: empty), with a line at `mark`."""
    fill = (
        "" if share is None else f'<rect class="fill {kind}" width="{100 * share:.2f}" height="8"/>'
    )
    line = (
        "" if mark is None else f'<rect class="mark" x="{100 * mark:.2f}" width=".6" height="8"/>'
    )
    return (
        f'<svg viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f'<rect class="track" width="100" height="8"/>{fill}{line}</svg>'
    )


def _diverging(share: float) -> str:
    """A bar from the middle: right for a gain, left for a loss; `share` in -1..1."""
    width = 50 * min(1.0, abs(share))
    kind, x = ("gain", 50.0) if share > 0 else ("loss", 50.0 - width)
    return (
        '<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="8"/>'
        f'<rect class="fill {kind}" x="{x:.2f}" width="{width:.2f}" height="8"/>'
        '<rect class="mark" x="49.8" width=".4" height="8"/></svg>'
    )


# -- values in words


def _known(words: dict[str, str], key: Any) -> Any:
    return words.get(key, key) if isinstance(key, str) else key


def _is_number(value: Any) -> bool:
    kind = isinstance(value, (int, float)) and not isinstance(value, bool)
    return kind and math.isfinite(value)


def _text(value: Any) -> str:
    return NOTHING if value is None or value == "" else escape(str(value))


def _number(value: Any, unit: str = "", digits: int = 0, missing: str = NOTHING) -> str:
    if not _is_number(value):
        return missing
    return f"{value:,.{digits}f}{f' {unit}' if unit else ''}".replace(",", "\u2009")


def _percent(value: Any, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %" if _is_number(value) else NOTHING


def _change(figures: dict[str, Any], name: str) -> str:
    old, new = (_percent(figures.get(f"{name}_{when}")) for when in ("old", "new"))
    return f"{old.removesuffix(' %')} → {new}"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _exponent(value: Any) -> str:
    return f"{value:.1e}" if _is_number(value) else NOTHING


def _share(part: Any, whole: Any) -> float | None:
    if not (_is_number(part) and _is_number(whole) and whole > 0):
        return None
    return min(1.0, max(0.0, part / whole))


def _duration(seconds: Any) -> str:
    if not _is_number(seconds) or seconds < 0:
        return NOTHING
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size or (seconds >= size and size < 86400):
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _when(moment: Any) -> str:
    """A unix time in UTC; text (a time already written down) as it is."""
    if isinstance(moment, str):
        return _text(moment)
    try:
        return (
            time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))
            if _is_number(moment)
            else NOTHING
        )
    except (OverflowError, OSError, ValueError):
        return NOTHING
