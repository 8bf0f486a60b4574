"""Sweeps of block coordinate descent within a budget: a trace, progress, and a run that can go on later."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from edgesolve.host.bcd import sweep
from edgesolve.host.bcd_certificate import Recorder, gradient_norm
from edgesolve.host.bcd_objective import Trace, objective
from edgesolve.host.bcd_problem import Problem, Settings, State
from edgesolve.host.checkpoint import Checkpoint, digest
from edgesolve.host.tensor_train_cores import TTCores


@dataclass(frozen=True, slots=True)
class Budget:
    """At most `sweeps` in all, those before an interruption included, and `seconds` of this call.

    tol : stop once a sweep lowers L by less than this share; 0 never stops.
    """

    sweeps: int
    seconds: float = float("inf")
    tol: float = 0.0


@dataclass(frozen=True, slots=True)
class Certify:
    """What is measured beside L: every block's decrease; ||g|| every `gradient_every` sweeps (0: never)."""

    blocks: bool = False
    spectra: bool = False
    gradient_every: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Where a run ended; `reason`: "sweeps", "seconds" or "converged"."""

    state: State
    trace: Trace
    reason: str


def train(
    problem: Problem,
    settings: Settings,
    state: State,
    budget: Budget,
    *,
    certify: Certify | None = None,
    progress: Callable[[dict, State], None] | None = None,
    folder: Path | None = None,
    save_every: int = 10,
) -> Run:
    """Sweep from `state`, or from what `folder` holds of the same run, until the budget is spent.

    progress : called with each sweep's row of the trace and its state.
    folder : the state is saved there every `save_every` sweeps and at the end; a killed run goes on with
        the same bytes. Raises ValueError, and keeps what is there, where it holds a run of other settings,
        layers or data.
    """
    certify, cache, began = certify or Certify(), {}, time.perf_counter()
    trace, store = Trace(settings), None
    if folder is not None:
        store, state, trace = _resumed(Path(folder), problem, settings, state, trace)
    if not trace.rows:
        trace.add(state.sweeps, objective(problem, settings, state), seconds=0.0)
    recorder = Recorder(problem, settings, spectra=certify.spectra) if certify.blocks else None
    reason, before = "sweeps", trace.rows[-1]["seconds"]
    while state.sweeps < budget.sweeps:
        if time.perf_counter() - began >= budget.seconds:
            reason = "seconds"
            break
        if recorder:
            recorder.checks = []
        state = sweep(problem, settings, state, cache, recorder)
        every = certify.gradient_every
        wanted = every and state.sweeps % every == 0
        row = trace.add(
            state.sweeps,
            objective(problem, settings, state),
            seconds=before + time.perf_counter() - began,
            gradient=gradient_norm(problem, settings, state) if wanted else None,
            checks=recorder.checks if recorder else (),
        )
        if progress:
            progress(row, state)
        if store and state.sweeps % save_every == 0:
            _save(store, state, trace)
        old = trace.rows[-2]["objective"]
        if old - row["objective"] < budget.tol * abs(old):
            reason = "converged"
            break
    if store:
        _save(store, state, trace)
    return Run(state, trace, reason)


def identity(problem: Problem, settings: Settings) -> str:
    """SHA-256 of settings, layers and data."""
    formats = {i: [type(f).__name__, asdict(f)] for i, f in sorted(problem.formats.items())}
    parts = [asdict(settings), list(problem.widths), formats, problem.positions]
    return digest(*parts, np.asarray(problem.x), np.asarray(problem.y))


def _resumed(folder, problem, settings, state, trace):
    key, mark = identity(problem, settings), folder / "key"
    if mark.exists() and mark.read_text() != key:
        raise ValueError(
            f"{folder.name} holds a run of other settings, layers or data; it is kept. "
            "Resume with what it was begun with, or name another folder."
        )
    store = Checkpoint(folder, key)
    arrays = store.arrays("state")
    if arrays is None:
        return store, state, trace
    rows = json.loads(arrays["trace"].tobytes().decode())
    return store, _unpacked(arrays, state), replace(trace, rows=rows)


def _save(store, state, trace):
    arrays = {f"{n}{i}": v for n in "VUAWb" for i, v in enumerate(getattr(state, n))}
    for i, C in enumerate(state.C):
        if isinstance(C, TTCores):
            arrays |= {f"C{i}.{k}": core for k, core in enumerate(C.cores)}
        elif C is not None:
            arrays[f"C{i}"] = C
    arrays["sweeps"] = np.array([state.sweeps])
    arrays["trace"] = np.frombuffer(json.dumps(trace.rows).encode(), np.uint8)
    store.save_arrays("state", arrays)


def _unpacked(arrays, like):
    layers = {n: tuple(arrays[f"{n}{i}"] for i in range(len(like.W))) for n in "VUAWb"}
    C = []
    for i, old in enumerate(like.C):
        if isinstance(old, TTCores):
            cores = tuple(arrays[f"C{i}.{k}"] for k in range(len(old.cores)))
            C.append(TTCores(cores, old.shape))
        else:
            C.append(arrays.get(f"C{i}"))
    return State(**layers, C=tuple(C), sweeps=int(arrays["sweeps"][0]))
