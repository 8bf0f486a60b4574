"""A figure with the bar it was held against; and tables of them as text, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """`met` is None where there is no bar. `baseline` was measured in the same run."""

    what: str
    measured: str
    bar: str = ""
    met: bool | None = None
    baseline: str = ""
    command: str = ""
    value: float | None = None

    @property
    def verdict(self) -> str:
        return {None: "", True: "met", False: "MISSED"}[self.met]


def at_least(what: str, value: float, bar: float, unit: str = " %", **more: Any) -> Figure:
    return _against(what, value, bar, unit, value >= bar, "≥", more)


def at_most(what: str, value: float, bar: float, unit: str = "", **more: Any) -> Figure:
    return _against(what, value, bar, unit, value <= bar, "≤", more)


def plain(what: str, value: float, unit: str = " %", **more: Any) -> Figure:
    """A figure without a bar."""
    more.setdefault("measured", f"{number(value)}{unit}")
    return Figure(what, value=float(value), **more)


def _against(what, value, bar, unit, met, sign, more) -> Figure:
    more.setdefault("measured", f"{number(value)}{unit}")
    more["bar"] = f"{sign} {number(bar)}{unit}" + more.pop("bar_note", "")
    return Figure(what, met=bool(met), value=float(value), **more)


def number(value: float) -> str:
    """Two decimals, or two digits where that would show nothing."""
    small = value != 0 and abs(value) < 0.05
    return f"{value:.1e}" if small else f"{value:,.2f}"


def text(figures: list[Figure]) -> str:
    """Columns for a terminal."""
    rows = [["what", "measured", "bar", "", "baseline, same run"]]
    rows += [[f.what, f.measured, f.bar, f.verdict, f.baseline] for f in figures]
    return aligned(rows)


def aligned(rows: list[list[str]]) -> str:
    """Columns for a terminal; the first row is the heading, the last column may be of any length."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    rule = ["-" * w for w in [*widths, len(rows[0][-1])]]
    return "\n".join(
        "  ".join([*(c.ljust(w) for c, w in zip(row[:-1], widths, strict=True)), row[-1]]).rstrip()
        for row in [rows[0], rule, *rows[1:]]
    )


def markdown(sections: dict[str, dict[str, Any]], title: str) -> str:
    """One table per section, and those in its details; `sections` as main_job.json holds them."""
    lines = [f"# {title}", ""]
    for name, section in sections.items():
        env = section["environment"]
        versions = ", ".join(f"{k} {v}" for k, v in env["packages"].items() if v)
        lines += [
            f"## {name}",
            "",
            f"commit {env['commit']}, {env['time']}, {section['seconds']:.0f} s; {env['soc']}, "
            f"{env['cpus']} CPUs, {env['os']}, Python {env['python']}; {versions}; "
            f"load {env['load']}{'; --quick: fewer frames, not to be quoted' * section['quick']}",
            "",
            "| what | measured | bar | met | baseline, same run | command |",
            "|---|--:|--:|---|---|---|",
        ]
        for f in section["figures"]:
            verdict = {None: "", True: "yes", False: "**MISSED**"}[f["met"]]
            cells = [f["what"], f["measured"], f["bar"], verdict, f["baseline"]]
            cells = [cell.replace("|", "\\|") for cell in cells]
            lines.append(
                "| " + " | ".join([*cells, f"`{f['command']}`" * bool(f["command"])]) + " |"
            )
        for caption, rows in section["details"].get("tables", {}).items():
            lines += [
                "",
                caption,
                "",
                "| " + " | ".join(rows[0]) + " |",
                "|---" * len(rows[0]) + "|",
            ]
            lines += ["| " + " | ".join(row) + " |" for row in rows[1:]]
        lines.append("")
    return "\n".join(lines)


def keep(
    record: Path, order: Iterable[str], name: str, section: dict[str, Any], title: str
) -> dict[str, Any]:
    """Put one section into `record` and the Markdown beside it; sections of earlier runs stay, with their
    environment, in `order`. Returns all of them."""
    sections = json.loads(record.read_text()) if record.is_file() else {}
    sections[name] = section
    sections = {key: sections[key] for key in order if key in sections}
    record.write_text(json.dumps(sections, indent=1, default=float) + "\n")
    record.with_suffix(".md").write_text(markdown(sections, title))
    return sections


def plain_rows(figures: list[Figure]) -> list[dict[str, Any]]:
    return [asdict(f) for f in figures]


def spread(values: list[float]) -> str:
    """Mean and range of several windows."""
    mean = sum(values) / len(values)
    return f"{mean:.1f} % ({min(values):.1f} to {max(values):.1f}, {len(values)} windows)"
