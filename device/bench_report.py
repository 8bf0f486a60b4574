"""A benchmark result for people: a table for the terminal, a page for the browser."""

from __future__ import annotations

from html import escape
from typing import Any

from edgesolve.device.bench_stats import fewest_runs

_WIDTH, _HEIGHT = 640, 140
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --paper: #fff; --soft: #6b7280; --line: #2563eb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --paper: #14171f; --soft: #9ca3af; --line: #7aa2ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 680px; margin: 2rem auto; padding: 0 1rem; }
td { padding: .15rem 1rem .15rem 0; } td + td { font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; } .bar { fill: var(--line); } text { fill: var(--soft);
  font-size: 11px; } .trace { fill: none; stroke: var(--line); } .INVALID { color: #dc2626; }
"""


def table(result: dict[str, Any]) -> str:
    """The result as aligned lines; what the number of runs can't support is "n/a, needs 662"."""
    lines = [f"{name:<14}{value}" for name, value in _rows(result)]
    return "\n".join(lines)


def html(result: dict[str, Any]) -> str:
    """One self-contained page: the table, a histogram of all runs, and each repeat's trace."""
    title = f"{result['model']['name']}: {result['verdict']}"
    cells = "".join(f"<tr><td>{escape(k)}<td>{escape(v)}" for k, v in _rows(result))
    traces = "".join(
        f"<h3>Repeat {i}</h3>{_trace(times)}" for i, times in enumerate(result["runs_ms"], 1)
    )
    pooled = [time for times in result["runs_ms"] for time in times]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f'<h1 class="{result["verdict"]}">{escape(title)}</h1><table>{cells}</table>'
        f"<h2>All runs</h2>{_histogram(pooled)}<h2>In order</h2>{traces}</html>\n"
    )


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    environment = result["environment"]
    low, high = result["p50_ci_ms"]
    rows = [
        ("verdict", ", ".join([result["verdict"], *result["reasons"]])),
        ("model", f"{result['model']['name']}, {result.get('runtime')}"),
        (
            "board",
            f"{environment['board'] or environment['soc']}, {environment['threads']} thread(s)",
        ),
        ("p50", f"{result['p50_ms']:.3f} ms  [{low:.3f}, {high:.3f}]"),
        *((f"p{name} at most", _bound(result, name)) for name in ("90", "99", "99.9")),
        (
            "max",
            f"{result['max_ms']:.3f} ms of {result['n']} runs in {result['repeats']} processes",
        ),
        (
            "cold start",
            f"{result['cold_start_ms']:.0f} ms, of which import {result['import_ms']:.0f}, "
            f"load {result['load_ms']:.0f}, first {result['first_ms']:.1f}",
        ),
        ("peak memory", f"{result['peak_rss_mib']:.0f} MiB resident"),
    ]
    rows += [(f"  {name}", f"{ms:.3f} ms") for name, ms in result["stages"].items()]
    if result["parity"]:
        parity = result["parity"]
        rows.append(
            ("parity", f"max |difference| {parity['max_abs']:.1e}, top-1 {parity['top1']:.1%}")
        )
    if "against" in result:
        other = result["against"]
        ci = result["ratio_ci"]
        interval = f"  [{ci[0]:.2f}, {ci[1]:.2f}]" if ci else ""
        rows.append(
            (
                "against",
                f"{other['model']['name']}: p50 {other['p50_ms']:.3f} ms, "
                f"{result['ratio']:.2f} times ours{interval}",
            )
        )
    return rows + [("warning", warning) for warning in result["warnings"]]


def _bound(figures: dict[str, Any], name: str) -> str:
    value = figures[f"p{name.replace('.', '')}_ms"]
    return f"n/a, needs {fewest_runs(float(name))}" if value is None else f"{value:.3f} ms"


def _histogram(times: list[float], bins: int = 40) -> str:
    low, high = min(times), max(times)
    width = (high - low) / bins or 1.0
    counts = [0] * bins
    for time in times:
        counts[min(int((time - low) / width), bins - 1)] += 1
    step, tall = _WIDTH / bins, _HEIGHT / max(counts)
    bars = "".join(
        f'<rect class="bar" x="{i * step:.1f}" width="{step - 1:.1f}" '
        f'y="{_HEIGHT - count * tall:.1f}" height="{count * tall:.1f}"/>'
        for i, count in enumerate(counts)
    )
    return _svg(bars, f"{low:.3f} ms", f"{high:.3f} ms", "Histogram of latencies")


def _trace(times: list[float]) -> str:
    high = max(times) or 1.0
    step = _WIDTH / max(len(times) - 1, 1)
    points = " ".join(
        f"{i * step:.1f},{_HEIGHT * (1 - time / high):.1f}" for i, time in enumerate(times)
    )
    line = f'<polyline class="trace" points="{points}"/>'
    return _svg(line, "0 ms to " + f"{high:.3f} ms", f"run {len(times)}", "Latency of each run")


def _svg(body: str, left: str, right: str, label: str) -> str:
    return (
        f'<svg viewBox="0 -4 {_WIDTH} {_HEIGHT + 24}" role="img" aria-label="{label}">{body}'
        f'<text x="0" y="{_HEIGHT + 16}">{left}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 16}" text-anchor="end">{right}</text></svg>'
    )
