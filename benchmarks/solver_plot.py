"""Time against relative gap, one panel per problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from solvers import OURS


def draw(sections: dict[str, dict[str, Any]], path: Path) -> None:
    """The PNG at `path`, from the sections of solvers.json."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {k: v for s in sections.values() for k, v in s["details"].get("runs", {}).items()}
    if not panels:
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 3.4 * rows), squeeze=False)
    for axis, (title, found) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, title, found)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis, title: str, found: dict[str, Any]) -> None:
    for name, measured in found.items():
        points = isinstance(measured, dict) and measured["points"]
        if not points:
            continue
        x = [p["cpu_s"] for p in points]
        y = [max(p["gap"] / p["objective"], 1e-13) for p in points]
        ours = {"linewidth": 2.5, "color": "black", "zorder": 3} if name == OURS else {}
        axis.loglog(x, y, marker="o", markersize=3, label=name, **ours)
    axis.axhline(1e-6, color="grey", linewidth=0.6)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("CPU seconds")
    axis.set_ylabel("relative duality gap")
    axis.legend(fontsize=7)
