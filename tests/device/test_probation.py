"""A new head against the one before: what sends it back, what doesn't, and when it is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgesolve.device.probation import Health, Probation, judge

BEFORE = Health(n=2000, errors=1, p50_ms=15.0, confidence=0.8, confidence_sd=0.2, drift=3.0)
GOOD = Health(n=600, errors=0, p50_ms=15.5, confidence=0.85, confidence_sd=0.2, drift=3.1)
TRIAL = Probation(began_s=1000.0, before=BEFORE)
END = 1900.0


def test_a_head_as_good_as_the_old_one_is_kept():
    assert judge(TRIAL, GOOD, END) == "commit"


def test_both_the_time_and_the_inferences_are_waited_for():
    assert judge(TRIAL, GOOD, END - 0.1) is None
    few = replace(GOOD, n=499)
    assert judge(TRIAL, few, END) is None
    assert judge(TRIAL, few, END + 1e6) is None
    assert judge(TRIAL, replace(GOOD, n=500), END + 1e6) == "commit"


BAD = {
    "probation_errors": {"errors": 3},
    "probation_latency": {"p50_ms": 30.1},
    "probation_confidence": {"confidence": 0.39, "n": 30},
    "probation_drift": {"drift": 6.1},
}


@pytest.mark.parametrize("reason", BAD)
def test_each_reason_alone_sends_it_back_at_once(reason):
    assert judge(TRIAL, replace(GOOD, **BAD[reason]), 1060.0) == reason
    assert judge(TRIAL, replace(GOOD, **BAD[reason]), END) == reason


def test_what_lies_at_the_edge_is_kept():
    edge = replace(GOOD, errors=2, p50_ms=30.0, confidence=0.651, drift=6.0)
    assert judge(TRIAL, edge, END) == "commit"


def test_errors_that_were_there_before_are_no_reason():
    flaky = Probation(1000.0, replace(BEFORE, errors=200))
    assert judge(flaky, replace(GOOD, errors=100), END) == "commit"  # 10 % before, 17 % now
    assert judge(flaky, replace(GOOD, errors=121), END) == "probation_errors"
    assert judge(Probation(1000.0, Health()), replace(GOOD, errors=3), END) == "probation_errors"


def test_nothing_is_compared_that_one_side_does_not_know():
    assert judge(TRIAL, Health(n=600), END) == "commit"
    assert judge(Probation(1000.0, Health()), GOOD, END) == "commit"


def test_a_little_less_confidence_is_no_reason_a_certain_fall_is():
    fall = replace(GOOD, confidence=0.6)
    assert judge(TRIAL, fall, END) == "probation_confidence"
    # Thirty answers that scatter don't prove it: 5 standard errors are 0.26.
    assert judge(TRIAL, replace(fall, n=30, confidence_sd=0.28), END) is None
    # However many frames: 0.1 less is not worth a rollback.
    assert judge(TRIAL, replace(GOOD, confidence=0.7, n=10**7), END) == "commit"


def test_a_collapse_is_not_judged_on_a_handful_of_answers():
    assert judge(TRIAL, replace(GOOD, confidence=0.1, n=29), 1060.0) is None


def test_a_return_to_the_factory_condition_is_no_drift_away():
    assert judge(TRIAL, replace(GOOD, drift=0.4), END) == "commit"
    mild = Probation(1000.0, replace(BEFORE, drift=0.3))
    assert judge(mild, replace(GOOD, drift=0.9), END) == "commit"
    assert judge(mild, replace(GOOD, drift=1.1), END) == "probation_drift"


def test_the_clock_stops_during_a_solve():
    paused = TRIAL.paused(300.0).paused(-5.0)
    assert judge(paused, GOOD, END) is None
    assert paused.seconds_left(END) == 300.0
    assert judge(paused, GOOD, END + 300.0) == "commit"
    assert paused.inferences_left(replace(GOOD, n=120)) == 380
    assert paused.inferences_left(GOOD) == 0


def test_an_equal_head_is_hardly_ever_sent_back():
    """Confidence of the same head twice, 500 answers each: the five standard errors and the 0.15 must hold."""
    generator = np.random.default_rng(0)
    for _ in range(300):
        a, b = generator.beta(4, 1, 500), generator.beta(4, 1, 500)
        trial = Probation(0.0, Health(500, 0, 1.0, a.mean(), a.std()))
        assert judge(trial, Health(500, 0, 1.0, b.mean(), b.std()), 900.0) == "commit"
