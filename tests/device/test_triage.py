"""Naming a shift: on logits made by hand, and on windows of the tiny bundle whose story is known."""

from __future__ import annotations

import numpy as np
import pytest

from edgesolve.device import drift, triage
from edgesolve.device.bundle import open_bundle
from edgesolve.device.drift import Drift
from edgesolve.device.runtime import source_statistics
from edgesolve.device.teacher import mixed, open_teacher

CLASSES = 10
NO_ALARM, SMALL, LARGE = (Drift(score, 12.0, 1000) for score in (0.9, 5.0, 30.0))


def logits(tall, classes=CLASSES, n=200, seed=0):
    """Each frame votes for one of the first `classes` classes, `tall` above a little noise."""
    generator = np.random.default_rng(seed)
    found = generator.normal(0, 0.3, (n, CLASSES))
    found[np.arange(n), np.arange(n) % classes] += tall
    return found


SOURCE = logits(15.0)
# found, plain, moved -> kind
CASES = {
    "nothing": (NO_ALARM, logits(3.0), logits(3.0), "none"),
    "one class": (SMALL, logits(15.0, classes=1), logits(5.0), "prior"),
    "five classes": (SMALL, logits(15.0, classes=5), logits(12.0), "prior"),
    "a colour cast": (SMALL, logits(13.0), logits(12.0), "mean_scale"),
    "other objects": (SMALL, logits(7.0), logits(7.0), "unknown_content"),
    "few and other objects": (
        SMALL,
        logits(7.0, classes=2),
        logits(7.0, classes=2),
        "unknown_content",
    ),
    "a sensor that took classes away": (SMALL, logits(7.0, classes=5), logits(8.0), "prior"),
    "white noise": (LARGE, logits(9.0, classes=2), logits(4.0), "unknown_content"),
    "low contrast": (LARGE, logits(5.0, classes=4), logits(12.0), "mean_scale"),
    "noise": (LARGE, logits(9.0), logits(7.0), "mean_scale"),
    "something else": (LARGE, logits(6.0), logits(6.0), "unknown_content"),
}


@pytest.mark.parametrize("case", CASES)
def test_kinds_by_hand(case):
    found, plain, moved, kind = CASES[case]
    assert triage.triage(found, plain, SOURCE, moved).kind == kind
    assert kind in triage.SENTENCES


def test_without_the_moved_logits_only_the_plain_ones_count():
    found, plain, moved, _ = CASES["low contrast"]
    got = triage.triage(found, plain, SOURCE)
    assert (got.kind, got.height_moved) == ("unknown_content", None)
    assert triage.triage(found, plain, SOURCE, moved).height_moved > 0.7


def test_the_figures_are_shares_of_the_source():
    same = triage.triage(SMALL, SOURCE, SOURCE, SOURCE)
    assert (same.classes, same.height, same.height_moved) == pytest.approx((1.0, 1.0, 1.0))
    few = triage.triage(SMALL, logits(40.0, classes=2), logits(40.0), None)
    assert few.classes == pytest.approx(0.2, rel=1e-6)
    assert triage.height(np.array([[3.0, 0.0, 0.0], [0.0, 9.0, 0.0]])) == pytest.approx(4.0)


def test_a_constant_that_a_network_adds_changes_nothing():
    added = np.random.default_rng(1).normal(0, 50, (200, 1))
    for found, plain, moved, kind in CASES.values():
        got = triage.triage(found, plain + added, SOURCE - added, moved + added)
        assert got.kind == kind


def test_the_scale_of_the_logits_matters_only_against_the_source():
    for name in ("one class", "a colour cast", "other objects", "low contrast", "noise"):
        found, plain, moved, kind = CASES[name]
        assert triage.triage(found, 3 * plain, 3 * SOURCE, 3 * moved).kind == kind


@pytest.fixture(scope="module")
def kind_of(bundle_dir, both_backends):
    bundle = open_bundle(bundle_dir)
    teacher, source = open_teacher(bundle, "onnx", 1), source_statistics(bundle)
    reference = bundle.reference("onnx")

    def get(frames):
        n = len(frames)
        plain = teacher.run(frames, 0.0, source.mean, source.var)
        found = drift.test(plain.mean, plain.var, n, reference, bundle.manifest["drift"])
        share = 0.6 * n / (n + 12)
        window = teacher.run(frames, share, source.mean, source.var)
        moved = teacher.run(frames, 0.0, *mixed(source.mean, source.var, window, share))
        return triage.triage(found, plain.logits, reference["anchor_logits"], moved.logits).kind

    return get


def test_windows_of_the_tiny_bundle(kind_of, frames):
    assert kind_of(frames.x[:64]) == "none"
    assert kind_of(frames.x[64:128]) == "none"
    assert kind_of(frames.shifted[:64]) == "mean_scale"
    assert kind_of(frames.x[:64] // 2) == "mean_scale"
    for k in range(4):
        assert kind_of(frames.x[frames.y == k][:64]) == "prior"


def test_snow_is_unknown_content(kind_of, frames):
    snow = np.random.default_rng(0).integers(0, 256, frames.x[:64].shape).astype(np.uint8)
    assert kind_of(snow) == "unknown_content"
