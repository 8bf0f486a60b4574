"""How long a layer takes: each of its forms as a small ONNX file, run as the device does, one thread, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from edgesolve.device.graph import open_graph
from edgesolve.host.capture import Progress
from edgesolve.host.layer_file import blank, nothing, to_int8_onnx, to_onnx
from edgesolve.host.plan import Candidate, Survey
from edgesolve.host.sites import Site

ROUND_S = 0.001
"""Every form runs this long, or once, in each round; the least round counts, since other load only adds."""
ROUNDS = (5, 15)
FORM_S = 0.06
"""Rounds of a layer: as many as the slowest of its forms does in this time, within ROUNDS."""

LEAST = 0.1
"""Share of a measured time that is the layer's own, whatever the call is said to take."""

Form = tuple[str, tuple[int, ...]]


def form(candidate: Candidate) -> Form:
    return candidate.format, candidate.ranks


def alike(site: Site) -> tuple:
    """Everything that a layer's time depends on, but for its weights' values."""
    geometry = (site.stride, site.padding, site.dilation, site.groups)
    return (site.kind, site.weight.shape, *geometry, site.at)


def survey_seconds(
    surveys: list[Survey], int8: bool = False, progress: Progress = lambda done, total: None
) -> list[list[float]]:
    """Seconds of one frame through every candidate of every layer; what is alike is measured once."""
    groups: dict[tuple, list[Survey]] = {}
    for s in surveys:
        groups.setdefault(alike(s.site), []).append(s)
    took: dict[tuple, dict[Form, float]] = {}
    for i, (key, members) in enumerate(groups.items()):
        forms = {form(c): c for s in members for c in s.candidates}
        took[key] = dict(
            zip(forms, seconds(members[0].site, list(forms.values()), int8), strict=True)
        )
        progress(i + 1, len(groups))
    return [[took[alike(s.site)][form(c)] for c in s.candidates] for s in surveys]


def seconds(site: Site, options: list[Candidate], int8: bool = False) -> list[float]:
    """Seconds of one frame through each candidate on this machine, ONNX Runtime, one thread.

    What it takes to call a session at all, which a layer inside a network doesn't pay, is measured and taken off.
    """
    runs = [_empty(), *(_runner(site, candidate, int8) for candidate in options)]
    once = [max(_clock(run, 1), 1e-7) for run in runs]
    counts = [max(1, int(ROUND_S / s)) for s in once]
    rounds = int(np.clip(FORM_S / max(ROUND_S, max(once)), *ROUNDS))
    took = [[_clock(run, n) for run, n in zip(runs, counts, strict=True)] for _ in range(rounds)]
    call, *least = np.min(took, axis=0)
    return [float(max(t - call, LEAST * t)) for t in least]


def _clock(run: Callable[[], object], n: int) -> float:
    began = time.perf_counter()
    for _ in range(n):
        run()
    return (time.perf_counter() - began) / n


def _empty() -> Callable[[], object]:
    """A session with next to nothing to do."""
    graph = open_graph(nothing(), backend="onnx")
    x = np.zeros((1, 1, 1, 1), np.float32)
    return lambda: graph(x)


def _runner(site: Site, candidate: Candidate, int8: bool) -> Callable[[], object]:
    chain = blank(site, candidate)
    graph = open_graph((to_int8_onnx if int8 else to_onnx)(site, chain), backend="onnx")
    x = np.random.default_rng(1).normal(size=(1, *graph.inputs[0][1][1:]))
    x = np.clip(128 + 30 * x, 0, 255).astype(np.uint8) if int8 else x.astype(np.float32)
    return lambda: graph(x)
