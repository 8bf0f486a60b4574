"""The adaptable teacher over a window: padded batches in, logits, rows and pooled statistics out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgesolve.device.bundle import Bundle
from edgesolve.device.graph import Graph, open_graph


@dataclass(frozen=True, slots=True)
class Pass:
    """logits (n, c), rows (n, D) float32; mean, var (S,) float64 of what the window sent into each normalisation."""

    logits: np.ndarray
    rows: np.ndarray
    mean: np.ndarray
    var: np.ndarray


@dataclass(frozen=True)
class Teacher:
    """The original network with open statistics, in batches of `batch` frames."""

    graph: Graph
    batch: int

    def run(
        self,
        frames: np.ndarray,
        mix: float,
        mean: np.ndarray,
        var: np.ndarray,
        tick: Callable[[int], None] = lambda done: None,
    ) -> Pass:
        """One pass over frames (n, h, w, c): normalise with (1 - mix) (mean, var) + mix x each batch's own.

        The statistics that come back are pooled over batches, between-batch variance included.
        """
        logits, rows, sums = [], [], []
        fixed = [np.full(1, mix, np.float32), mean.astype(np.float32), var.astype(np.float32)]
        for start in range(0, len(frames), self.batch):
            part = frames[start : start + self.batch]
            n = len(part)
            weight = np.zeros(self.batch, np.float32)
            weight[:n] = 1.0 / n
            if n < self.batch:
                part = np.concatenate([part, np.repeat(part[:1], self.batch - n, axis=0)])
            out = self.graph(np.ascontiguousarray(part), weight, *fixed)
            logits.append(np.array(out[0][:n]))
            rows.append(np.array(out[1][:n]))
            sums.append((n, out[2].astype(np.float64), out[3].astype(np.float64)))
            tick(start + n)
        pooled = _pool(sums)
        return Pass(np.concatenate(logits), np.concatenate(rows), *pooled)


def open_teacher(bundle: Bundle, backend: str, threads: int) -> Teacher:
    entry = bundle.backends[backend]
    model, runtime = bundle.read(entry["teacher"]), bundle.runtime(backend)
    graph = open_graph(model, backend=runtime, threads=threads)
    return Teacher(graph, entry["teacher_batch"])


def mixed(
    mean: np.ndarray, var: np.ndarray, window: Pass, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Source statistics moved a `share` of the way to the window's, moment-matched (adaptation.md)."""
    gap = window.mean - mean
    return mean + share * gap, (1 - share) * var + share * window.var + share * (1 - share) * gap**2


def _pool(sums: list[tuple[int, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    total = sum(n for n, _, _ in sums)
    mean = sum(n * m for n, m, _ in sums) / total
    var = sum(n * (v + (m - mean) ** 2) for n, m, v in sums) / total
    return mean, var
