"""When the service may look and solve: every limit alone, who passes over it, and clocks that jump."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from edgesolve.device import policy
from edgesolve.device.policy import Facts, Policy, after_restart, in_last_day, may_look, may_solve

AUTO = Policy(mode="auto")
GOOD = Facts(n=64, alarms=2)
# What alone stops a solve, and its reason.
STOPS = {
    "frozen": {"frozen": True},
    "cooldown": {"since_rollback_s": 86399.0},
    "daily_limit": {"updates_today": 4},
    "min_interval": {"since_update_s": 3599.0},
    "write_budget": {"written_today": 32 << 20, "needs": 1},
    "busy": {"busy": True},
    "too_few_samples": {"n": 63},
    "unconfirmed": {"alarms": 1},
}
OPERATOR_MAY = {"cooldown", "daily_limit", "min_interval", "unconfirmed"}


def facts(*names, **more):
    return dataclasses.replace(GOOD, **{k: v for n in names for k, v in STOPS[n].items()}, **more)


def test_the_defaults_are_those_of_the_contract():
    p = Policy()
    assert (p.mode, p.min_samples, p.min_interval_s, p.daily_limit) == ("propose", 64, 3600, 4)
    assert (p.cooldown_s, p.confirmations, p.look_every_s, p.write_budget_mib) == (86400, 2, 60, 32)


def test_a_confirmed_drift_on_an_idle_device_may_be_solved():
    for mode in ("propose", "auto"):
        assert may_solve(Policy(mode=mode), GOOD) is None


@pytest.mark.parametrize("name", STOPS)
def test_each_limit_alone_stops_a_solve(name):
    assert may_solve(AUTO, facts(name)) == name


@pytest.mark.parametrize("mode", ["off", "observe"])
def test_modes_that_only_watch(mode):
    assert may_solve(Policy(mode=mode), GOOD) == f"mode_{mode}"
    assert may_solve(Policy(mode=mode), dataclasses.replace(GOOD, operator=True)) is None


@pytest.mark.parametrize("name", STOPS)
def test_what_an_operator_passes_over(name):
    found = may_solve(AUTO, facts(name, operator=True))
    assert found == (None if name in OPERATOR_MAY else name)


def test_every_combination_has_a_reason_that_holds():
    for size in range(len(STOPS) + 1):
        for names in itertools.combinations(STOPS, size):
            for operator in (False, True):
                left = [n for n in names if not (operator and n in OPERATOR_MAY)]
                found = may_solve(AUTO, facts(*names, operator=operator))
                assert found == (left[0] if left else None), names


def test_waiting_times_end_exactly_when_they_say():
    later = dataclasses.replace(GOOD, since_update_s=3600.0, since_rollback_s=86400.0)
    assert may_solve(AUTO, later) is None
    full = dataclasses.replace(GOOD, written_today=31 << 20, needs=1 << 20, updates_today=3)
    assert may_solve(AUTO, full) is None


def test_no_alarm_at_all_is_no_drift():
    assert may_solve(AUTO, facts(alarms=0)) == "no_drift"
    assert may_solve(Policy(mode="auto", confirmations=1), facts(alarms=1)) is None


def test_a_look():
    assert may_look(Policy(), GOOD) is None
    assert may_look(Policy(mode="observe"), GOOD) is None
    assert may_look(Policy(mode="off"), GOOD) == "mode_off"
    assert may_look(Policy(), facts(since_look_s=59.0)) == "min_interval"
    assert may_look(Policy(), facts(since_look_s=60.0)) is None
    assert may_look(Policy(), facts("busy")) == "busy"
    assert may_look(Policy(), facts("too_few_samples")) == "too_few_samples"


def test_looking_learns_nothing_and_goes_on_when_learning_is_stopped():
    assert may_look(Policy(), facts("frozen", "write_budget", "cooldown", "daily_limit")) is None


def test_an_operator_looks_in_any_mode_but_not_beside_a_worker():
    order = facts(operator=True, since_look_s=1.0)
    assert may_look(Policy(mode="off"), order) is None
    assert may_look(Policy(), facts("busy", operator=True)) == "busy"
    assert may_look(Policy(), facts("too_few_samples", operator=True)) == "too_few_samples"


def test_a_restart_with_a_sane_clock():
    assert after_restart(None, 1000.0) is None
    assert after_restart(400.0, 1000.0) == 600.0


@pytest.mark.parametrize("written", [1001.0, 1e12, math.nan, math.inf])
def test_a_clock_that_jumped_back_makes_the_device_wait(written):
    assert after_restart(written, 1000.0) == 0.0
    assert may_solve(AUTO, facts(since_update_s=after_restart(written, 1000.0))) == "min_interval"


def test_the_day_rolls_and_counts_the_future():
    now = 1_000_000.0
    assert in_last_day([], now) == 0
    assert in_last_day([now - 86400, now - 86399, now - 1, now + 5000], now) == 3


def test_a_month_of_drift_stays_within_the_limits():
    """A month in steps of ten minutes, drift all the time."""
    seconds, updates = 0.0, []
    for _ in range(30 * 24 * 6):
        seconds += 600.0
        since = seconds - updates[-1] if updates else None
        today = sum(seconds - t < policy.DAY_S for t in updates)
        if may_solve(AUTO, facts(since_update_s=since, updates_today=today)) is None:
            updates.append(seconds)
    gaps = [b - a for a, b in itertools.pairwise(updates)]
    assert min(gaps) >= 3600
    assert max(sum(t <= u < t + policy.DAY_S for u in updates) for t in updates) == 4
    assert len(updates) >= 4 * 29


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "on"},
        {"min_samples": 0},
        {"confirmations": 0},
        {"min_interval_s": -1.0},
        {"write_budget_mib": math.nan},
    ],
)
def test_nonsense_is_refused_in_one_sentence(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} must"):
        Policy(**wrong)
