"""May the service look at its window, may it solve? Answers by the numbers; nothing is read or remembered here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MODES = ("off", "observe", "propose", "auto")
"""off: nothing · observe: collect, test, report · propose: solve and wait for approval · auto: put in force."""

DAY_S = 86400.0
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Policy:
    """How often and after what. `confirmations`: so many windows in a row must alarm before anything is solved.

    min_interval_s: from one solve to the next. daily_limit: updates in 24 hours. cooldown_s: after a rollback.
    look_every_s: from one look to the next. write_budget_mib: written to the card in 24 hours.
    """

    mode: str = "propose"
    min_samples: int = 64
    min_interval_s: float = 3600.0
    daily_limit: int = 4
    cooldown_s: float = 86400.0
    confirmations: int = 2
    look_every_s: float = 60.0
    write_budget_mib: float = 32.0

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        for name in ("min_samples", "confirmations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in (
            "min_interval_s",
            "daily_limit",
            "cooldown_s",
            "look_every_s",
            "write_budget_mib",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is so now. All seconds are elapsed ones, on a clock that never jumps; None means never.

    n: frames in the window. alarms: windows that alarmed in a row. since_update_s: since the last solve, whatever
    became of it (a refused one must not be repeated every minute). updates_today: in the last 24 hours.
    written_today, needs: bytes written in the last 24 hours, and that this update would write.
    busy: a worker runs or a head is on probation. operator: a person asked for it.
    """

    n: int = 0
    alarms: int = 0
    since_look_s: float | None = None
    since_update_s: float | None = None
    since_rollback_s: float | None = None
    updates_today: int = 0
    written_today: int = 0
    needs: int = 0
    frozen: bool = False
    busy: bool = False
    operator: bool = False


def may_look(policy: Policy, facts: Facts) -> str | None:
    """None, or why the drift test must not run now: a reason of operations.md, section 2.

    A look learns and writes nothing, so a frozen device still says that its input has drifted.
    """
    if not facts.operator:
        if policy.mode == "off":
            return "mode_off"
        if _sooner(facts.since_look_s, policy.look_every_s):
            return "min_interval"
    if facts.busy:
        return "busy"
    if facts.n < policy.min_samples:
        return "too_few_samples"
    return None


def may_solve(policy: Policy, facts: Facts) -> str | None:
    """None, or why nothing may be learnt now; what lasts longest is named first.

    An operator's order passes over the mode, the waiting times, the daily limit and the confirmations. It doesn't
    pass over a freeze, a running worker, too few frames, or the card's budget.
    """
    if facts.frozen:
        return "frozen"
    if not facts.operator and (reason := _waits(policy, facts)):
        return reason
    if facts.written_today + facts.needs > policy.write_budget_mib * _MIB:
        return "write_budget"
    if facts.busy:
        return "busy"
    if facts.n < policy.min_samples:
        return "too_few_samples"
    if not facts.operator and facts.alarms < policy.confirmations:
        return "no_drift" if facts.alarms == 0 else "unconfirmed"
    return None


def after_restart(written_s: float | None, wall_now_s: float) -> float | None:
    """Seconds since the unix time `written_s` in a ledger; None stays None ("never").

    A time in the future, or none at all, means that a clock jumped: 0 is answered, so that every waiting
    time starts anew rather than being skipped.
    """
    if written_s is None:
        return None
    elapsed = wall_now_s - written_s
    return elapsed if math.isfinite(elapsed) and elapsed > 0 else 0.0


def in_last_day(written_s: Iterable[float], wall_now_s: float) -> int:
    """How many of the unix times lie in the last 24 hours; one in the future counts (`after_restart`)."""
    return sum(after_restart(t, wall_now_s) < DAY_S for t in written_s)


def _waits(policy: Policy, facts: Facts) -> str | None:
    if policy.mode in ("off", "observe"):
        return f"mode_{policy.mode}"
    if _sooner(facts.since_rollback_s, policy.cooldown_s):
        return "cooldown"
    if facts.updates_today >= policy.daily_limit:
        return "daily_limit"
    if _sooner(facts.since_update_s, policy.min_interval_s):
        return "min_interval"
    return None


def _sooner(since_s: float | None, wait_s: float) -> bool:
    return since_s is not None and since_s < wait_s
