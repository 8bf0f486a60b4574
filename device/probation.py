"""A new head on probation: what it must not do worse than the one before, and for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

FEWEST_ERRORS = 3
FEWEST_ANSWERS = 30
LEAST_MS = 2.0
"""A head changes what is computed, not how much: a smaller rise is the board's other work."""


@dataclass(frozen=True, slots=True)
class Health:
    """How a head did. n: inferences tried; errors: of those, failed.

    p50_ms: the median, None before there is one; not a tail, which any other process on the board makes longer.
    confidence, confidence_sd: mean and standard deviation of the greatest softmax share. drift: score as a multiple
    of the alarm threshold, None if no window was tested.
    """

    n: int = 0
    errors: int = 0
    p50_ms: float | None = None
    confidence: float | None = None
    confidence_sd: float = 0.0
    drift: float | None = None


@dataclass(frozen=True, slots=True)
class Probation:
    """Since `began_s` (monotonic), against `before`. It ends after `seconds` and `inferences`, both.

    `pauses_s` doesn't count: a solve that ran meanwhile makes everything slower.
    """

    began_s: float
    before: Health
    seconds: float = 900.0
    inferences: int = 500
    check_every_s: float = 60.0
    pauses_s: float = 0.0

    def paused(self, seconds: float) -> Probation:
        """The same, its clock stopped for `seconds` more."""
        return replace(self, pauses_s=self.pauses_s + max(0.0, seconds))

    def seconds_left(self, now_s: float) -> float:
        return max(0.0, self.seconds - (now_s - self.began_s - self.pauses_s))

    def inferences_left(self, health: Health) -> int:
        return max(0, self.inferences - health.n)


def judge(probation: Probation, health: Health, now_s: float) -> str | None:
    """ "commit", a reason to roll back (operations.md, section 2), or None: go on waiting.

    health : of the head on probation alone, since `began_s`. What one side doesn't know isn't compared.
    """
    before = probation.before
    if _fails(before, health):
        return "probation_errors"
    if _slower(before, health):
        return "probation_latency"
    if _less_certain(before, health):
        return "probation_confidence"
    if _drifts_away(before, health):
        return "probation_drift"
    done = probation.seconds_left(now_s) == 0 and probation.inferences_left(health) == 0
    return "commit" if done else None


def _fails(before: Health, health: Health) -> bool:
    """Three errors at least, and more than twice as often as before."""
    enough = health.errors >= FEWEST_ERRORS
    return enough and health.errors * max(before.n, 1) > 2 * before.errors * health.n


def _slower(before: Health, health: Health) -> bool:
    known = before.p50_ms is not None and health.p50_ms is not None
    return known and health.p50_ms > max(2.0 * before.p50_ms, before.p50_ms + LEAST_MS)


def _less_certain(before: Health, health: Health) -> bool:
    """Half as confident; or 0.15 less, when that is five standard errors: neighbouring frames are alike."""
    if before.confidence is None or health.confidence is None or health.n < FEWEST_ANSWERS:
        return False
    if health.confidence < 0.5 * before.confidence:
        return True
    fall = before.confidence - health.confidence
    error = math.hypot(
        before.confidence_sd / math.sqrt(max(before.n, 1)),
        health.confidence_sd / math.sqrt(health.n),
    )
    return fall > 0.15 and fall > 5 * error


def _drifts_away(before: Health, health: Health) -> bool:
    """The input is twice as far from the factory's as when this head was solved: it was solved for another one."""
    known = before.drift is not None and health.drift is not None
    return known and health.drift > max(1.0, 2.0 * before.drift)
