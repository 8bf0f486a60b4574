"""Answer frames one at a time with the head in force, and keep account of how well that goes."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from edgesolve.device.errors import BackendError
from edgesolve.device.gate import softmax
from edgesolve.device.latency import Latency
from edgesolve.device.probation import Health
from edgesolve.device.runtime import Runtime


class Inference:
    """The opened bundle and its counters; `swap` puts another runtime in its place between two frames."""

    def __init__(self, runtime: Runtime, metrics, deadline_ms: float | None = None):
        self.runtime, self.metrics = runtime, metrics
        self.latency = Latency(deadline_ms=deadline_ms)
        self.total = self.errors = 0
        self.last_answer = -math.inf
        self._mark()

    def swap(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.latency.clear()
        self._mark()

    def health(self, drift: float | None) -> Health:
        """Of the head in force, since it came into force; `drift`: the last window's score."""
        answered = self._tried - self._failed
        mean = self._sum / answered if answered else None
        spread = 0.0 if mean is None else math.sqrt(max(self._squares / answered - mean**2, 0.0))
        return Health(self._tried, self._failed, self.latency.median(), mean, spread, drift)

    def answer(self, frame: np.ndarray) -> dict[str, Any]:
        """top1, class, score, generation of a frame (h, w, c) in the contract. Raises BackendError."""
        runtime = self.runtime
        self._tried += 1
        began = time.perf_counter()
        try:
            rows = runtime.rows(frame[None])
            middle = time.perf_counter()
            scores = softmax(runtime.head(rows))[0]
            top = int(scores.argmax())
            score = float(scores[top])
            if not math.isfinite(score):
                raise ValueError("the network answered NaN")
        except Exception as error:  # one bad frame never stops a service
            self.errors += 1
            self._failed += 1
            self.metrics.error("inference")
            raise BackendError(f"a frame could not be answered: {error}") from error
        self._account(began, middle, time.perf_counter(), score)
        return {
            "top1": top,
            "class": runtime.bundle.classes[top],
            "score": round(score, 6),
            "generation": runtime.generation,
        }

    def _mark(self) -> None:
        self._tried = self._failed = 0
        self._sum = self._squares = 0.0

    def _account(self, began: float, middle: float, ended: float, score: float) -> None:
        self.total += 1
        self._sum += score
        self._squares += score * score
        self.last_answer = time.monotonic()
        m = self.metrics
        m.inference()
        m.observe("backbone", middle - began)
        m.observe("head", ended - middle)
        m.observe("total", ended - began)
        if self.latency.record(1e3 * (ended - began)):
            m.deadline_miss()
