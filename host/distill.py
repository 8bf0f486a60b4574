"""Replace everything behind a cut by a convex head: design the rows, stream moments, solve, judge held-out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgesolve.host.adaptable import Preprocess
from edgesolve.host.capture import Capture, Progress, activations, capture
from edgesolve.host.gates import LADDER, affordable, design_rows
from edgesolve.host.network import Cut, Network
from edgesolve.host.rows import Rows
from edgesolve.kernels.losses import SquaredMoments
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.newton import newton
from edgesolve.kernels.penalties import GroupL2, lam_max
from edgesolve.kernels.ridge import ridge, ridge_absolute, ridge_path
from edgesolve.kernels.solution import Solution

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SAMPLE = 1536


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """How the head is made. Without n_gates or rank: the largest of gates.LADDER that saves.

    `gates`: a kind of `gates.design_rows`: auto, teacher, seeded or seeded3.
    `lam` is relative to lam_max and only read for the group penalty.
    """

    gates: str = "auto"
    n_gates: int | None = None
    rank: int | None = None
    ramps: int = 2
    penalty: str = "ridge"
    lam: float = 0.003
    flip: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Distilled:
    """`solution` is solved on all rows; `agreement`, `error` were measured on rows that its twin hadn't seen.

    `held_out_logits` (n, c): that twin's answers on the held-out frames.
    """

    cut: Cut
    rows: Rows
    gate_source: str
    ridge: float
    path: list[tuple[float, float]]
    solution: Solution
    capture: Capture
    held_out_logits: np.ndarray
    agreement: float
    error: float

    @property
    def moments(self) -> Moments:
        return self.capture.fit + self.capture.held_out


def distill(
    network: Network,
    cut: Cut,
    preprocess: Preprocess,
    x: np.ndarray,
    held_out: np.ndarray,
    options: HeadOptions,
    progress: Progress = lambda done, total: None,
    teacher: Network | None = None,
) -> Distilled:
    """A convex head for `cut` from frames x (n, h, w, c); held_out (n,) bool picks the ridge and judges.

    `teacher`: the network whose logits are learnt, if `network` is a compressed form of it.
    """
    sample = np.flatnonzero(~held_out)
    sample = sample[:: max(1, len(sample) // SAMPLE)][:SAMPLE]
    z, logits = activations(network, cut.node, preprocess, x[sample], teacher)
    size = affordable(network, cut, logits.shape[1], options.gates, options.ramps) or LADDER[-1]
    rows, source = design_rows(
        network,
        cut.node,
        z,
        logits,
        kind=options.gates,
        n_gates=options.n_gates or size[0],
        rank=options.rank or size[1],
        ramps=options.ramps,
        seed=options.seed,
    )
    found = capture(
        network,
        cut.node,
        rows,
        preprocess,
        x,
        held_out,
        flip=options.flip,
        teacher=teacher,
        progress=progress,
    )
    return conclude(cut, rows, source, found, options)


def conclude(cut: Cut, rows: Rows, source: str, found: Capture, options: HeadOptions) -> Distilled:
    """The head for captured rows: its ridge chosen, and a twin judged, on the fold kept apart."""
    path = ridge_path(found.fit, found.held_out, GRID)
    best = min(path, key=lambda pair: pair[1])[0]
    twin = solve(found.fit, rows.starts, best, options)
    answers = found.rows @ twin.weights + twin.intercept
    variance = float(((found.logits - found.logits.mean(0)) ** 2).sum(1).mean())
    mse = found.held_out.mean_squared_error(twin.weights, twin.intercept)
    return Distilled(
        cut=cut,
        rows=rows,
        gate_source=source,
        ridge=best,
        path=path,
        solution=solve(found.fit + found.held_out, rows.starts, best, options),
        capture=found,
        held_out_logits=answers,
        agreement=float((answers.argmax(1) == found.logits.argmax(1)).mean()),
        error=float(np.sqrt(mse / max(variance, 1e-300))),
    )


def solve(moments: Moments, starts: list[int], relative: float, options: HeadOptions) -> Solution:
    """The head's program: ridge in closed form, or the group penalty on top of it by Newton's method."""
    if options.penalty == "ridge":
        return ridge(moments, relative)
    loss = SquaredMoments.of(moments, ridge_absolute(moments, relative))
    groups = np.asarray(starts, np.int64)
    penalty = GroupL2(options.lam * lam_max(loss, GroupL2(1.0, groups)), groups)
    return newton(loss, penalty, tol=1e-7)
