"""What the convex head's accuracy comes from: the solver, the certificate, or the gates. Rows for solver_accuracy.py.

One number of samples a class, every row mean ± deviation over the draws; times are CPU seconds of one thread.
Objective of the first two tables: 1/(2n)||A U - Y||^2 + lam sum_g ||U_g|| + (ridge/2)||U||^2, lam 0.03 lam_max,
ridge a tenth of leave-one-out's.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import solver_adam
import torch
from environment import say
from figures import Figure, plain
from solver_fewshot import (
    CLASSES,
    GATES,
    PER_CLASS,
    Draw,
    bank,
    gated_rows,
    grouped,
    patterns,
    ridge_by_loo,
)

from edgesolve.kernels.losses import SquaredRows
from edgesolve.kernels.penalties import GroupL2, lam_max
from edgesolve.kernels.solve import solve

RATIO, TOLS = 0.03, (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8)
RATES, STEPS = (1e-3, 3e-3, 1e-2), 600


def run(draws: list[Draw], k: int, quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    rows: dict[str, dict[str, list[float]]] = {}
    curves: dict[str, list] = {}

    def keep(row: str, **values: float) -> None:
        for name, value in values.items():
            rows.setdefault(row, {}).setdefault(name, []).append(float(value))

    for draw in draws:
        say(f"ablations, seed {draw.seed}, {k} a class")
        found = _solvers(draw, k, keep, STEPS // 6 if quick else STEPS)
        curves = curves or found
        _gates(draw, k, keep, quick)
        _learned(draw, k, keep, 2 if quick else 20)
    _small(draws, k, keep, quick)
    figures = [_figure(k, row, values) for row, values in rows.items()]
    return figures, {"k": k, "rows": rows, "curves": curves}


def _figure(k, row, values) -> Figure:
    parts = []
    for name, found in values.items():
        if name in ("error", "seconds"):
            shown = f"{np.median(found):.1e}"
        else:
            shown = f"{np.mean(found):.2f} ± {np.std(found, ddof=1):.2f}"
        parts.append(
            {"accuracy": f"{shown} %", "seconds": f"{shown} CPU s"}.get(name, f"{name} {shown}")
        )
    return plain(
        f"{k} a class, {row}", float(np.mean(values["accuracy"])), measured=", ".join(parts)
    )


def _small(draws, k, keep, quick):
    """Both heads at a quarter of the size."""
    pilot, m = draws[0].features.draw(solver_adam.PILOT), GATES // 4
    d = pilot.z.shape[2]
    hidden = solver_adam.hidden_of(CLASSES * ((m + 1) * d + 1), d)
    found = solver_adam.choose(pilot, pilot.z, k, hidden, quick)
    for draw in draws:
        rows = np.hstack([draw.gated[:, : m * d], draw.gated[:, -d:]])
        U, b, _ = ridge_by_loo(rows[: CLASSES * k], draw.labels(k))
        keep(f"{m} gates, ridge", accuracy=draw.accuracy(rows, U, b))
        for name in ("chosen", "best"):
            accuracy, seconds = solver_adam.final(draw, draw.z, k, hidden, found[name])
            row = f"Adam, {hidden} ReLU, the size of {m} gates, {name}"
            keep(row, accuracy=accuracy, seconds=seconds)


def _solvers(draw, k, keep, steps):
    """Same gates, same objective: our solver over a ladder of gaps, Adam on U over its steps."""
    n, Y = CLASSES * k, draw.labels(k)
    design = grouped(draw.gated[:n])
    loss = SquaredRows.of(design, Y, 0.1 * ridge_by_loo(draw.gated[:n], Y)[2])
    penalty = GroupL2(1.0, design.starts)
    penalty = GroupL2(RATIO * lam_max(loss, penalty), design.starts)
    best, ours = solve(loss, penalty, tol=1e-10).objective, []
    for tol in TOLS:
        began = time.process_time()
        found = solve(loss, penalty, tol=tol)
        seconds = time.process_time() - began
        error = max(found.objective / best - 1.0, 0.0)
        ours.append((seconds, error))
        accuracy = draw.accuracy(draw.gated, found.weights, found.intercept)
        active = int((penalty.norms(found.weights) > 0).sum())
        keep(
            f"convex, gap <= {tol:.0e}",
            accuracy=accuracy,
            seconds=seconds,
            error=error,
            active=active,
        )
    curves, budget = {"convex solver, gap 1e-1 … 1e-8": ours}, ours[TOLS.index(1e-6)][0]
    runs = {lr: _adam_on_weights(loss, penalty, lr, steps) for lr in RATES}
    for lr, trail in runs.items():
        curves[f"Adam on U, rate {lr:g}"] = [(s, o / best - 1.0) for s, o, _ in trail]
    for name, seconds in (("the solver's time to 1e-6", budget), ("all of its steps", np.inf)):
        ends = [[p for p in trail if p[0] <= seconds] or trail[:1] for trail in runs.values()]
        spent, objective, U = min((trail[-1] for trail in ends), key=lambda p: p[1])
        accuracy = draw.accuracy(draw.gated, U, loss.intercept(U))
        error = objective / best - 1.0
        keep(f"Adam on U, best rate, {name}", accuracy=accuracy, seconds=spent, error=error)
    return curves


def _adam_on_weights(loss, penalty, lr, steps):
    """[(CPU seconds, objective, U)] of full-batch Adam with a cosine rate; judging is not timed."""
    A = loss.design.A
    A = torch.from_numpy(A - A.mean(axis=0))
    Y, groups = torch.from_numpy(loss.Y.astype(np.float32)), len(penalty.starts) - 1
    U = torch.zeros(loss.shape, requires_grad=True)
    optimizer = torch.optim.Adam([U], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    trail, spent = [], 0.0
    for step in range(1, steps + 1):
        began = time.process_time()
        optimizer.zero_grad()
        fit = 0.5 * (A @ U - Y).square().sum() / len(A) + 0.5 * loss.ridge * U.square().sum()
        norms = (U.view(groups, -1).square().sum(dim=1) + 1e-20).sqrt()
        (fit + penalty.lam * norms.sum()).backward()
        optimizer.step()
        schedule.step()
        spent += time.process_time() - began
        if step in (1, 2, 4, 8, 15, 30) or step % 50 == 0:
            W = U.detach().numpy().astype(np.float64)
            trail.append((spent, loss.value(W) + penalty.value(W), W))
    return trail


def _gates(draw, k, keep, quick):
    """Where the gates come from; all solved by ridge with the leave-one-out choice."""
    z, n, d = draw.z, CLASSES * k, draw.z.shape[2]
    samples, rng = z[: CLASSES * PER_CLASS], np.random.default_rng(draw.seed)
    Y = draw.labels(k)

    def judge(row, D):
        rows = gated_rows(z, D)
        U, b, _ = ridge_by_loo(rows[:n], Y)
        keep(row, accuracy=draw.accuracy(rows, U, b))

    U, b, _ = ridge_by_loo(draw.gated[:n], Y)
    keep(f"gates: {GATES} seeded ramps (ours)", accuracy=draw.accuracy(draw.gated, U, b))
    closed = np.zeros((*z.shape[:2], 0), bool)
    judge("gates: none (linear)", closed)
    wide = patterns(z, *bank(d, GATES if quick else 4 * GATES, draw.seed))
    for m in (8, 16, 32, 64, 256):
        if m <= wide.shape[2]:
            judge(f"gates: {m} seeded, hard", wide[:, :, :m])
    pairs = samples.reshape(-1, d)[rng.integers(0, n * z.shape[1], (2, GATES))]
    G = pairs[0] - pairs[1]
    G *= d**0.5 / np.linalg.norm(G, axis=1, keepdims=True)
    judge(f"gates: {GATES} differences of two positions", patterns(z, G, bank(d, GATES, 0)[1]))
    for m in (16, GATES):
        judge(
            f"gates: {m} greedy of {wide.shape[2]} seeded",
            wide[:, :, _greedy(wide[:n], z[:n], Y, m)],
        )
        judge(f"gates: {m} filters of the removed block", draw.filters[:, :, :m])


def _greedy(D, z, Y, m):
    """Eight at a time by the normalised adjoint ||A_i'R|| / ||A_i||, as `host/gates.py` does."""
    A = gated_rows(z, D).reshape(len(z), -1, z.shape[2])
    A = A - A.mean(axis=0)
    norms, chosen = np.linalg.norm(A, axis=(0, 2))[:-1], []
    while len(chosen) < m:
        now = A[:, [*chosen, -1]].reshape(len(z), -1)
        U, b, _ = ridge_by_loo(now, Y)
        score = np.linalg.norm(np.einsum("nmr,nc->mrc", A[:, :-1], Y - now @ U - b), axis=(1, 2))
        score /= norms + 1e-12
        score[chosen] = -1.0
        chosen += list(np.argsort(-score)[: min(8, m - len(chosen))])
    return sorted(chosen)


def _learned(draw, k, keep, epochs):
    """Gates that move: Adam on gates and weights from the frozen optimum, straight through a ramp; then re-solved."""
    z, n, Y = draw.z, CLASSES * k, draw.labels(k)
    U, b, ridge = ridge_by_loo(draw.hard[:n], Y)
    start = SquaredRows.of(grouped(draw.hard[:n]), Y, ridge).value(U)
    keep("frozen gates, convex optimum", accuracy=draw.accuracy(draw.hard, U, b))
    for lr in (1e-3, 1e-2):
        began = time.process_time()
        G, offset, W, c = _straight_through(z[:n], Y, draw.gates, U, b, ridge, lr, epochs)
        seconds = time.process_time() - began
        D = patterns(z, G, offset)
        rows = gated_rows(z, D)
        after = SquaredRows.of(grouped(rows[:n]), Y, ridge).value(W)
        moved = 100.0 * float((D[:n] != patterns(z[:n], *draw.gates)).mean())
        name = f"learned gates, Adam at {lr:g}"
        keep(
            name,
            accuracy=draw.accuracy(rows, W, c),
            seconds=seconds,
            **{"objective against frozen": after / start, "% of bits flipped": moved},
        )
        W, c, _ = ridge_by_loo(rows[:n], Y)
        keep(f"{name}, then re-solved", accuracy=draw.accuracy(rows, W, c))


def _straight_through(z, Y, gates, U, b, ridge, lr, epochs):
    torch.manual_seed(0)
    x, t = torch.from_numpy(z), torch.from_numpy(Y.astype(np.float32))
    G, offset = (torch.from_numpy(g.copy()).requires_grad_() for g in gates)
    W, c = (torch.from_numpy(a.astype(np.float32)).requires_grad_() for a in (U, b))
    # Weights are far smaller than gates, and Adam's step knows no units.
    unit = float(np.sqrt(np.square(U).mean()))
    optimizer = torch.optim.Adam(
        [{"params": [G, offset, c]}, {"params": [W], "lr": lr * unit}], lr=lr
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    width = z.shape[2] ** 0.5
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(32):
            s = x[i] @ G.T + offset
            soft = (s / width + 0.5).clamp(0.0, 1.0)
            D = (s >= 0).float() + soft - soft.detach()
            D = torch.cat([D, torch.ones_like(D[:, :, :1])], dim=2)
            A = torch.matmul(D.transpose(1, 2), x[i]) / z.shape[1]
            fit = 0.5 * (A.flatten(1) @ W + c - t[i]).square().sum() / len(i)
            optimizer.zero_grad()
            (fit + 0.5 * ridge * W.square().sum()).backward()
            optimizer.step()
        schedule.step()
    return tuple(a.detach().numpy() for a in (G, offset, W, c))
