"""Live latency: what n runs support, against the rule computed with exact integers."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from edgesolve.device.latency import CAPACITY, Latency


def filled(times, **options):
    latency = Latency(**options)
    for t in times:
        latency.record(t)
    return latency


def exact_rank(n, percent):
    """MLPerf's rank in rational arithmetic."""
    p, total, t = Fraction(percent, 100), Fraction(0), -1
    for k in range(n + 1):
        total += math.comb(n, k) * (1 - p) ** k * p ** (n - k)
        if total > Fraction(1, 100):
            break
        t = k
    return n - t + 1 if t >= 1 else None


@pytest.mark.parametrize("n", [1, 43, 63, 64, 65, 661, 662, 700])
def test_percentiles_are_those_of_the_rule_or_none(n):
    times = np.random.default_rng(n).gamma(9.0, 2.0, n)
    found = filled(times).snapshot()
    ordered = np.sort(times)
    for name, percent in (("p90", 90), ("p99", 99)):
        rank = exact_rank(n, percent)
        assert found[name] == (None if rank is None else ordered[rank - 1]), name
    assert found["n"] == n
    assert found["p50"] == np.median(times)


def test_how_many_runs_each_percentile_needs():
    need = {name: None for name in ("p90", "p99")}
    latency = Latency()
    for n in range(1, 800):
        latency.record(1.0)
        for name, value in latency.snapshot().items():
            if name in need and need[name] is None and value is not None:
                need[name] = n
    assert need == {"p90": 64, "p99": 662}


def test_nothing_recorded():
    assert Latency().snapshot() == {"n": 0, "p50": None, "p90": None, "p99": None}
    assert Latency(deadline_ms=5.0).miss_share() is None


def test_only_the_last_ones_count():
    latency = filled([1000.0] * 5 + [1.0] * 8, capacity=8)
    assert latency.snapshot() == {"n": 8, "p50": 1.0, "p90": None, "p99": None}
    assert filled(range(20), capacity=8).snapshot()["p50"] == 15.5


def test_deadlines():
    latency = filled([9.0, 10.0, 10.1, 30.0], capacity=2, deadline_ms=10.0)
    assert latency.misses == 2
    assert latency.miss_share() == 1.0
    assert latency.record(1.0) is False
    assert latency.record(11.0) is True
    assert (latency.misses, latency.miss_share()) == (3, 0.5)
    assert filled([10.0, 10.0], deadline_ms=10.0).miss_share() == 0.0
    assert filled([1e9]).miss_share() is None


def test_clearing_forgets_times_but_not_the_counter():
    latency = filled([20.0] * 50, deadline_ms=10.0)
    latency.clear()
    assert (latency.snapshot()["n"], latency.misses) == (0, 50)
    latency.record(3.0)
    assert latency.snapshot()["p50"] == 3.0


def test_recording_allocates_nothing_that_stays():
    latency = filled([1.0] * 10, deadline_ms=10.0)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(2 * CAPACITY):
        latency.record(2.5)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 512


def test_a_ring_needs_room():
    with pytest.raises(ValueError, match="capacity"):
        Latency(capacity=0)
