"""The build report: a table for the terminal, a page for people."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

INK, BLUE, GREY, DARK = "#6b7280", "#2563eb", "#9ca3af", "#1e3a8a"


def table(report: dict[str, Any], out: str) -> str:
    """What was won and lost, and where the page is."""
    from rich.console import Console
    from rich.table import Table

    t = Table(title=f"{out}: everything from {report['split']} on became a convex head")
    for name in ("", "before", "after", "ratio"):
        t.add_column(name, justify="left" if not name else "right")
    for key in ("params", "macs", "bytes"):
        b, a = report[key]["before"], report[key]["after"]
        t.add_row(key, f"{b:,}", f"{a:,}", f"{a / b:.3f}")
    for key in ("accuracy", "agreement"):
        b, a = report[key]["before"], report[key]["after"]
        t.add_row(f"{key} (held-out)", _percent(b), _percent(a), "")
    for e in report["int8"]:
        name, before = e["backend"], report["bytes"]["before"]
        t.add_row(f"{name}: bytes", f"{before:,}", f"{e['bytes']:,}", f"{e['bytes'] / before:.3f}")
        t.add_row(f"{name}: agreement", "100.00 %", _percent(e["agreement"]), "")
        took = e["float_milliseconds"], e["milliseconds"]
        t.add_row(
            f"{name}: ms, from float", *(f"{v:.2f}" for v in took), f"{took[1] / took[0]:.3f}"
        )
        t.add_row(f"{name}: default", "", *(e["reason"].split(":")[0], ""))
    text = io.StringIO()
    Console(file=text, width=100).print(t)
    gap = report["head"]["relative_gap"]
    return (
        text.getvalue()
        + f"certificate: relative duality gap {gap:.1e}; report: {Path(out) / 'report.html'}"
    )


def html(report: dict[str, Any]) -> str:
    """One self-contained page: no scripts, no external assets, readable light and dark."""
    from importlib.resources import files

    from jinja2 import Environment

    template = (files("edgesolve.host") / "report.html.j2").read_text()
    environment = Environment(autoescape=True)
    environment.filters["percent"] = _percent
    plots = {"cost": _cost_plot(report), "ridge": _ridge_plot(report)}
    if len(report["search"]) > 1:
        plots["search"] = _search_plot(report)
    if report.get("decomposition"):
        plots["frontier"] = _frontier_plot(report)
        plots["errors"] = _error_plot(report["decomposition"]["steps"])
    return environment.from_string(template).render(r=report, plots=plots)


def _percent(value: float | None) -> str:
    return "no labels" if value is None else f"{100 * value:.2f} %"


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK, labelsize=8)
    for side in axes.spines.values():
        side.set_color(GREY)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _svg(figure) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "edgesolve", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    found = text.getvalue()
    return found[found.index("<svg") :]


def _cost_plot(report: dict[str, Any]) -> str:
    """Multiply-adds per layer, replaced ones hollow."""
    layers = [e for e in report["layers"] if e["macs"]]
    figure, axes = _figure(8.2, 2.4)
    kept = [e["decision"] == "kept" for e in layers]
    at = range(len(layers))
    axes.bar(
        at,
        [e["macs"] / 1e6 for e in layers],
        color=[BLUE if k else "none" for k in kept],
        edgecolor=[BLUE if k else GREY for k in kept],
        linewidth=1,
    )
    legend = "layer, in order; hollow: replaced; green: the convex head"
    if report.get("decomposition"):
        after = {s["layer"]: s["macs"]["after"] for s in report["decomposition"]["steps"]}
        smaller = [
            after.get(e["layer"], 0) / 1e6 if k else 0.0 for e, k in zip(layers, kept, strict=True)
        ]
        axes.bar(at, smaller, color=DARK)
        legend += "; dark: what decomposition left"
    axes.bar([len(layers)], [report["head"]["macs"] / 1e6], color="#059669")
    axes.set_ylabel("million multiply-adds")
    axes.set_xlabel(legend)
    return _svg(figure)


def _frontier_plot(report: dict[str, Any]) -> str:
    """Predicted divergence against parameters, and what was built."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    d = report["decomposition"]
    figure, axes = _figure(4.0, 2.4)
    points = sorted((e["params"], e["divergence"]) for e in d["frontier"])
    axes.semilogy(*zip(*points, strict=True), "o-", color=BLUE, markersize=4, label="predicted")
    built = report["params"]["after"]
    axes.semilogy(
        [built],
        [d["divergence"] + d["head_divergence"]],
        "s",
        color="#059669",
        label="built, measured",
    )
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("parameters")
    axes.set_ylabel("KL from the original, nats")
    axes.legend(frameon=False, fontsize=7, labelcolor=INK)
    return _svg(figure)


def _error_plot(steps: list[dict[str, Any]]) -> str:
    """Measured against predicted relative error of every fitted layer; on the line they agree."""
    figure, axes = _figure(4.0, 2.4)
    pairs = [(s["error"]["predicted"], s["error"]["measured"]) for s in steps if s["error"]]
    if pairs:
        x, y = zip(*pairs, strict=True)
        top = 1.05 * max(x + y)
        axes.plot([0, top], [0, top], color=GREY, linewidth=1)
        axes.plot(x, y, "o", color=BLUE, markersize=4)
    axes.set_xlabel("predicted error of a layer")
    axes.set_ylabel("measured")
    return _svg(figure)


def _ridge_plot(report: dict[str, Any]) -> str:
    figure, axes = _figure(4.0, 2.2)
    ridges, errors = zip(*report["head"]["ridge_path"], strict=True)
    axes.semilogx(ridges, errors, "o-", color=BLUE, markersize=4)
    axes.axvline(report["head"]["ridge"], color=GREY, linestyle=":")
    axes.set_xlabel("ridge, relative")
    axes.set_ylabel("held-out squared error")
    return _svg(figure)


def _search_plot(report: dict[str, Any]) -> str:
    figure, axes = _figure(4.0, 2.2)
    found = sorted(report["search"], key=lambda e: e["params_replaced"])
    x = [e["params_replaced"] for e in found]
    y = [e["agreement_loss"] for e in found]
    axes.plot(x, y, "o-", color=BLUE, markersize=4)
    for e in found:
        axes.annotate(
            e["split"], (e["params_replaced"], e["agreement_loss"]), fontsize=7, color=INK
        )
    axes.set_xlabel("parameters replaced")
    axes.set_ylabel("agreement lost, points")
    return _svg(figure)
