"""The objective of block coordinate descent, in float64 sums, and its trace over the sweeps."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from edgesolve.host.bcd_blocks import BLOCK_BYTES, row_blocks
from edgesolve.host.bcd_problem import Problem, Settings, State, full, square

ROUNDING = {"float32": 2e-6, "float64": 1e-12}
"""Share of the objective below which a rise is rounding: its sums are float64, its residuals are not."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The five parts of the objective, as written in host/bcd.py."""

    loss: float
    relu: float
    link: float
    layers: float
    formats: float

    @property
    def total(self) -> float:
        return self.loss + self.relu + self.link + self.layers + self.formats


def objective(problem: Problem, settings: Settings, state: State) -> Terms:
    """The Terms at `state`; its A must belong to its W, b and V."""
    g, r, t = settings.gamma, settings.rho, settings.tau
    V, U, last = state.V, state.U, problem.n_layers - 1
    held = [(w, c) for w, c in zip(state.W, state.C, strict=True) if c is not None]
    return Terms(
        0.5 * gap(V[last], problem.y),
        0.5 * g * sum(relu_gap(v, u) for v, u in zip(V[:last], U[:last], strict=True)),
        0.5 * g * gap(V[last], U[last]),
        0.5 * r * sum(gap(u, a) for u, a in zip(U, state.A, strict=True)),
        0.5 * t * sum(square(w - full(c)) for w, c in held),
    )


def logged_objective(settings: Settings, terms: Terms) -> float:
    """What the authors' code logs: it weighs the loss by γ/2, the updates by 1/2."""
    return terms.total + (settings.gamma - 1.0) * terms.loss


@dataclass
class Trace:
    """One row per sweep, as JSON lines; `rises` counts those of the true objective beyond rounding."""

    settings: Settings
    rows: list[dict] = field(default_factory=list)

    def add(self, sweep: int, terms: Terms, *, seconds: float, gradient=None, checks=()) -> dict:
        """K min ||g||² is over the sweeps where a gradient was taken, so that it is an upper bound."""
        known = [row["gradient"] for row in self.rows if row["gradient"] is not None]
        if gradient is not None:
            known.append(gradient)
        done = sweep - self.rows[0]["sweep"] if self.rows else 0
        row = {
            "sweep": sweep,
            "seconds": seconds,
            "objective": terms.total,
            **{f"objective_{k}": v for k, v in asdict(terms).items()},
            "logged": logged_objective(self.settings, terms),
            "gradient": gradient,
            "k_min_gradient_sq": done * min(known) ** 2 if known else None,
            "blocks": [{**asdict(c), "holds": c.holds} for c in checks],
        }
        self.rows.append(row)
        return row

    @property
    def rises(self) -> int:
        return self._rises("objective", ROUNDING[self.settings.dtype])

    @property
    def logged_rises(self) -> int:
        return self._rises("logged", ROUNDING[self.settings.dtype])

    @property
    def block_rises(self) -> int:
        """Blocks that raised the objective."""
        return sum(b["drop"] < -b["slack"] for row in self.rows for b in row["blocks"])

    @property
    def violations(self) -> int:
        """Blocks whose decrease fell short of what the theory says."""
        return sum(not b["holds"] for row in self.rows for b in row["blocks"])

    def write(self, path: Path) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def _rises(self, name, share):
        values = [row[name] for row in self.rows]
        return sum(not new <= old * (1.0 + share) for old, new in pairwise(values))


def gap(p: np.ndarray, q: np.ndarray) -> float:
    """||p - q||², streamed over rows."""
    return sum(square(p[rows] - q[rows]) for rows in _blocks(p))


def relu_gap(V: np.ndarray, U: np.ndarray) -> float:
    """||V - relu(U)||², streamed over rows."""
    return sum(square(V[rows] - np.maximum(U[rows], 0.0)) for rows in _blocks(V))


def _blocks(a):
    return row_blocks(len(a), a.itemsize * a.shape[1], BLOCK_BYTES // 16)
