"""How long inferences take, live: a ring of the last ones, and what they support."""

from __future__ import annotations

import numpy as np

from edgesolve.device.bench_stats import percentile_bound

CAPACITY = 4096


class Latency:
    """The last `capacity` inference times in ms; a time above `deadline_ms` is a miss (None: no deadline).

    One thread records, others may take a snapshot. Recording is O(1) and keeps nothing but a number.
    """

    def __init__(self, capacity: int = CAPACITY, deadline_ms: float | None = None):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}.")
        self._times = np.zeros(capacity)
        self._recorded = 0
        self._capacity = capacity
        self._deadline = np.inf if deadline_ms is None else deadline_ms
        self.misses = 0

    def record(self, ms: float) -> bool:
        """Remember one inference of `ms` milliseconds; True if it missed the deadline."""
        self._times[self._recorded % self._capacity] = ms
        self._recorded += 1
        missed = ms > self._deadline
        self.misses += missed
        return missed

    def clear(self) -> None:
        """Forget the times (a new head came into force). `misses` counts on: it is a counter."""
        self._recorded = 0

    def median(self) -> float | None:
        """Of the times in the ring, in ms; None before the first."""
        times = self._last()
        return float(np.median(times)) if len(times) else None

    def snapshot(self) -> dict[str, float | int | None]:
        """`n` times in the ring, their median `p50`, and 99 % upper bounds `p90`, `p99` on the percentiles, in ms.

        None where n runs don't support it (MLPerf's early-stopping rule, `bench_stats.bound_rank`: 64 for
        p90, 662 for p99).
        """
        times = self._last()
        return {
            "n": len(times),
            "p50": self.median(),
            "p90": percentile_bound(times, 90),
            "p99": percentile_bound(times, 99),
        }

    def miss_share(self) -> float | None:
        """Share of the times in the ring above the deadline; None without a deadline or a time."""
        times = self._last()
        if not len(times) or np.isinf(self._deadline):
            return None
        return float((times > self._deadline).mean())

    def _last(self) -> np.ndarray:
        return self._times[: min(self._recorded, self._capacity)].copy()
