"""The parts of a recalibration, each against arithmetic written out here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from edgesolve.device import adapt, budget, drift, gate, look
from edgesolve.device.bundle import open_bundle
from edgesolve.device.reasons import SENTENCES
from edgesolve.device.runtime import choose_backend, source_statistics
from edgesolve.device.teacher import Pass, Teacher, mixed, open_teacher
from edgesolve.kernels.drift import divergence

# -- drift ----------------------------------------------------------------------------------------

THRESHOLDS = {
    "sizes": [16, 64, 256],
    "null": [0.16, 0.04, 0.01],
    "content": [0.5, 0.4, 0.4],
    "windows_per_false_alarm": 1000,
}
REFERENCE = {"window_mean": np.zeros(3, np.float32), "window_var": np.ones(3, np.float32)}


def at(mean, n):
    return drift.test(np.full(3, mean), np.ones(3), n, REFERENCE, THRESHOLDS)


def test_the_score_is_in_units_of_the_threshold():
    mean = 0.3
    raw = float(divergence(np.full(3, mean), np.ones(3), np.zeros(3), np.ones(3)))
    assert raw > 0
    for n, null, content in [(16, 0.16, 0.5), (64, 0.04, 0.4), (256, 0.01, 0.4)]:
        found = at(mean, n)
        assert found.score == pytest.approx(raw / null)
        assert found.content == pytest.approx(content / null)
        assert found.alarm == (raw > null) and found.beyond_content == (raw > content)
        assert found.windows_per_false_alarm == 1000


def test_between_sizes_the_threshold_follows_a_power_law_and_is_flat_outside():
    score = {n: at(0.3, n).score for n in (4, 16, 32, 128, 256, 4096)}
    assert score[32] == pytest.approx(score[16] * 2), "0.16 -> 0.04 from 16 to 64: falls as 1/n"
    assert score[128] == pytest.approx(score[32] * 4)
    assert score[4] == score[16] and score[4096] == score[256]


def test_the_same_statistics_are_no_drift():
    assert at(0.0, 64).score == pytest.approx(0.0, abs=1e-12)
    assert not at(0.0, 64).alarm
    assert not drift.Drift(1.0, 1.0, 9).alarm and drift.Drift(1.001, 1.0, 9).beyond_content


# -- the teacher over a window ----------------------------------------------------------------------


@dataclass
class FakeGraph:
    """A network whose only normalisation sees the frames themselves; batches of `batch`."""

    batch: int
    calls: int = 0

    def __call__(self, frames, weight, mix, mean, var):
        assert len(frames) == len(weight) == self.batch and frames.flags.c_contiguous
        assert weight.sum() == pytest.approx(1.0, abs=1e-6) and mix.shape == (1,)
        assert mean.dtype == var.dtype == weight.dtype == np.float32
        self.calls += 1
        x = frames.astype(np.float64)
        m = np.einsum("n,nhwc->c", weight, x) / x[0, ..., 0].size
        square = np.einsum("n,nhwc->c", weight, (x - m) ** 2) / x[0, ..., 0].size
        logits = x.sum((1, 2)).astype(np.float32)
        return [logits, 2 * logits, m.astype(np.float32), square.astype(np.float32)]


@pytest.mark.parametrize("n, batch", [(1, 8), (5, 8), (8, 8), (9, 8), (23, 8), (24, 8), (7, 1)])
def test_padding_changes_nothing(n, batch, accepts_only):
    x = np.random.default_rng(n).normal(3.0, 2.0, size=(n, 2, 3, 4))
    ticks = []
    fake = FakeGraph(batch)
    found = Teacher(fake, batch).run(x, 0.0, np.zeros(4), np.ones(4), ticks.append)
    assert fake.calls == -(-n // batch) and ticks[-1] == n
    assert found.logits.shape == (n, 4) and found.mean.dtype == np.float64
    np.testing.assert_allclose(found.logits, x.sum((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found.rows, 2 * x.sum((1, 2)), rtol=1e-6)

    def pooled(answer):
        np.testing.assert_allclose(answer, [x.mean((0, 1, 2)), x.var((0, 1, 2))], rtol=1e-5)

    accepts_only(pooled, np.stack([found.mean, found.var]))


def test_any_split_pools_to_the_same_statistics(bundle_dir, frames, backend):
    """With mix 0 every frame is normalised alike, so the window's statistics don't know the batches."""
    bundle = open_bundle(bundle_dir)
    source, teacher = source_statistics(bundle), open_teacher(bundle, backend, 1)

    def run(x):
        return teacher.run(x, 0.0, source.mean, source.var)

    whole = run(frames.window[:40])
    assert teacher.batch < 40, "else this tests one batch"
    for cut in (1, 17, 39):
        parts = [
            (k, run(p)) for k, p in ((cut, frames.window[:cut]), (40 - cut, frames.window[cut:40]))
        ]
        mean = sum(k * p.mean for k, p in parts) / 40
        var = sum(k * (p.var + (p.mean - mean) ** 2) for k, p in parts) / 40
        np.testing.assert_allclose(whole.mean, mean, atol=1e-5)
        np.testing.assert_allclose(whole.var, var, rtol=1e-4, atol=1e-6)
        logits = np.concatenate([p.logits for _, p in parts])
        np.testing.assert_allclose(whole.logits, logits, atol=1e-3)


def test_the_first_statistics_are_those_of_the_first_layer(bundle_dir, frames, accepts_only):
    """Computed here from the frames: 3x3 convolution of the normalised frames with the shipped weights."""
    bundle = open_bundle(bundle_dir)
    source = source_statistics(bundle)
    backend = choose_backend(bundle)
    place = bundle.backends[backend]["patch"][0]
    raw = bundle.read(bundle.backends[backend]["backbone"])
    shape = place["weight"]["shape"]
    W = np.frombuffer(raw, "<f4", int(np.prod(shape)), place["weight"]["offset"]).reshape(shape)
    W = np.moveaxis(W, place["weight"]["axis"], 0)
    W = W if backend == "onnx" else np.moveaxis(W, -1, 1)
    W = W / source.scale()[:8, None, None, None]
    x = frames.window[:40].astype(np.float64) / 255
    x = np.pad((x - 0.5) / 0.25, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = sum(
        np.einsum("nhwc,oc->nhwo", x[:, i : i + 16, j : j + 16], W[:, :, i, j])
        for i in range(3)
        for j in range(3)
    )
    found = open_teacher(bundle, backend, 1).run(frames.window[:40], 0.0, source.mean, source.var)

    def equal(answer):
        expected = [y.mean((0, 1, 2)), y.var((0, 1, 2))]
        np.testing.assert_allclose(answer, expected, rtol=1e-3, atol=1e-4)

    accepts_only(equal, np.stack([found.mean[:8], found.var[:8]]))


def test_mixing_is_the_moments_of_the_mixture():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 2, (300_000, 2)), rng.normal([-1, 4], 0.5, (100_000, 2))
    window = Pass(np.zeros((1, 1)), np.zeros((1, 1)), b.mean(0), b.var(0))
    mean, var = mixed(a.mean(0), a.var(0), window, 0.25)
    both = np.concatenate([a, b])
    np.testing.assert_allclose(mean, both.mean(0))
    np.testing.assert_allclose(var, both.var(0))
    for share, expected in ((0.0, a), (1.0, b)):
        found = mixed(a.mean(0), a.var(0), window, share)
        np.testing.assert_allclose(found, (expected.mean(0), expected.var(0)))


# -- the gate -----------------------------------------------------------------------------------------

TARGET = np.eye(4)[np.arange(16) % 4] * 6
GOOD = gate.Evidence(
    new=TARGET + 0.1,
    old=np.roll(TARGET, 1, axis=1),
    target=TARGET,
    anchors_new=TARGET,
    anchors_old=TARGET,
    anchors=TARGET,
    relative_gap=1e-9,
)
NAN = np.where(np.arange(64).reshape(16, 4) == 5, np.nan, GOOD.new)
ONE_CLASS = np.tile([6.0, 4.0, 4.0, 4.0], (16, 1))
REFUSED = {
    "not_finite": {"new": NAN},
    "gap_too_large": {"relative_gap": 2e-6},
    "anchor_agreement": {"anchors_new": np.roll(TARGET, 1, axis=1)},
    "heldout_worse": {"new": GOOD.old},
    "marginal_shift": {"new": np.tile([6.0, 0, 0, 0], (16, 1)), "old": 100 * TARGET},
    "confidence_collapse": {"new": TARGET / 12},
}


def test_a_good_head_passes():
    reason, figures = gate.judge(GOOD)
    assert reason is None
    assert figures["heldout_agreement_new"] == 1.0 and figures["heldout_agreement_old"] == 0.0
    assert figures["heldout_error_new"] == pytest.approx(0.04)
    assert figures["heldout_error_old"] == pytest.approx(72.0)
    assert figures["classes_teacher"] == pytest.approx(4.0)


@pytest.mark.parametrize("reason", list(REFUSED))
def test_each_reason_can_be_given(reason):
    found, _ = gate.judge(replace(GOOD, **REFUSED[reason]))
    assert found == reason
    assert reason in SENTENCES


@pytest.mark.parametrize("gap", [np.nan, np.inf])
def test_a_certificate_that_is_no_number_is_refused(gap):
    assert gate.judge(replace(GOOD, relative_gap=gap))[0] == "gap_too_large"


def test_an_equal_head_is_not_worth_a_swap():
    assert gate.judge(replace(GOOD, new=GOOD.old.copy()))[0] == "heldout_worse"


def test_a_tenth_of_the_anchors_may_be_lost_and_no_more():
    for lost, reason in ((1, None), (2, "anchor_agreement")):
        anchors = TARGET.copy()
        anchors[:lost] = np.roll(anchors[:lost], 1, axis=1)
        assert gate.judge(replace(GOOD, anchors_new=anchors))[0] == reason


def test_effective_classes():
    sure = 50 * np.eye(5)
    assert gate.effective_classes(sure) == pytest.approx(5.0)
    assert gate.effective_classes(sure[:1]) == pytest.approx(1.0)
    assert gate.effective_classes(sure[[0, 0, 1, 1]]) == pytest.approx(2.0)
    assert gate.effective_classes(np.zeros((3, 5))) == pytest.approx(5.0)
    np.testing.assert_allclose(gate.softmax(np.array([[1e4, 0.0], [0, 0]])), [[1, 0], [0.5, 0.5]])


# -- budgets -------------------------------------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch):
    """planned(n, seconds per batch, **options) -> (n, reason, figures) for D = 100, c = 4, batches of 32."""
    monkeypatch.setattr(budget, "_source", lambda bundle: SimpleNamespace(mean=np.zeros(3)))

    def run(n, per_batch=0.32, batch=32, **options):
        now = [0.0]
        ran = []

        def forward(frames, mix, mean, var):
            ran.append(len(frames))
            now[0] += per_batch

        teacher = SimpleNamespace(batch=batch, run=forward)
        head = SimpleNamespace(weights=np.zeros((100, 4)))
        current = SimpleNamespace(head=head)
        found = budget.plan(
            None, current, teacher, np.zeros((n, 1)), adapt.Options(**options), lambda: now[0]
        )
        assert len(ran) == bool({"seconds", "memory_mib"} & set(options)), "one batch is timed"
        return found

    return run


def test_without_a_budget_the_window_is_the_largest_allowed(planned):
    assert planned(100)[:2] == (100, None)
    assert planned(1000)[:2] == (512, None)
    assert planned(1000, max_frames=700)[:2] == (700, None)


def test_seconds_choose_the_window(planned):
    n, reason, figures = planned(512, seconds=10.0)
    assert reason is None and figures["seconds_per_frame"] == pytest.approx(0.01)
    assert n % 32 == 0 and n * 0.01 * budget.PASSES <= 10.0 - 0.32
    assert (n + 32) * 0.01 * budget.PASSES > 10.0 - 0.32 - 0.01, "nor smaller than it must be"
    assert planned(512, seconds=1e4)[0] == 512
    sizes = [planned(512, seconds=s)[0] for s in (1.0, 2.0, 5.0, 12.0, 40.0)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_too_little_time_is_refused(planned):
    n, reason, _ = planned(512, seconds=0.5)
    assert reason == "out_of_time" and 0 <= n < adapt.MIN_FRAMES


def test_memory_chooses_the_window(planned):
    import resource

    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    fixed = budget.solve_bytes(0, 100, 4) / 2**20
    per_frame = (budget.solve_bytes(1, 100, 4) - budget.solve_bytes(0, 100, 4)) / 2**20
    n, reason, figures = planned(
        10_000, max_frames=10_000, memory_mib=now + fixed + 200 * per_frame
    )
    assert reason is None and 100 <= n <= 201
    assert figures["memory_mib"] <= now + fixed + 201 * per_frame
    assert planned(512, memory_mib=now + fixed + 8 * per_frame)[1] == "memory_bound"
    assert planned(512, memory_mib=1.0)[:2] == (0, "memory_bound")
    assert planned(512, memory_mib=now + 1000.0)[:2] == (512, None)


def test_the_memory_law_counts_what_is_held():
    d, c = 100, 4
    assert budget.solve_bytes(0, d, c) >= 3 * 8 * d * d, "three moments in float64"
    held = budget.solve_bytes(50, d, c) - budget.solve_bytes(0, d, c)
    assert held >= 50 * 4 * (d + 2 * c), "rows, logits and targets in float32"


# -- which frames, which labels -------------------------------------------------------------------------


def test_frames_are_spread_and_labelled_ones_kept():
    x = np.arange(100)
    found, labels = look.spread(x, None, 10)
    assert labels is None and len(found) == 10 and found[0] == 0 and found[-1] == 99
    assert np.ptp(np.diff(found)) <= 1
    labels = np.full(100, -1)
    labels[[3, 50, 98]] = [1, 0, 2]
    found, kept = look.spread(x, labels, 10)
    assert len(found) == 10 and {3, 50, 98} <= set(found) and (np.diff(found) > 0).all()
    np.testing.assert_array_equal(kept, labels[found])
    assert look.spread(x, labels, 100)[0] is x
    found, kept = look.spread(x, np.zeros(100, int), 10)
    assert len(found) == 10 and (kept == 0).all()


def test_constant_frames_are_not_usable():
    x = np.zeros((4, 2, 2, 1), np.uint8)
    x[1, 0, 0], x[3, 1, 1] = 1, 9
    labels = np.array([0, 1, 2, 3])
    found, kept, bad = look.usable(x, labels)
    assert bad == 2 and kept.tolist() == [1, 3]
    np.testing.assert_array_equal(found, x[[1, 3]])
    again, none, bad = look.usable(found, None)
    assert again is found and none is None and bad == 0


def test_a_label_replaces_the_teachers_answer_by_its_class_prototype():
    moved = Pass(np.arange(12.0).reshape(4, 3), None, None, None)
    prototypes = 10 * np.eye(3)
    targets, weights = adapt._targets(moved, np.array([-1, 2, -1, 0]), {"prototypes": prototypes})
    np.testing.assert_array_equal(targets[[0, 2]], moved.logits[[0, 2]])
    np.testing.assert_array_equal(targets[[1, 3]], prototypes[[2, 0]])
    assert weights.tolist() == [1, adapt.LABEL_WEIGHT, 1, adapt.LABEL_WEIGHT]
    assert moved.logits[1].tolist() == [3, 4, 5], "the teacher's own answers are left alone"


def test_few_classes():
    def window(*shares):
        labels = np.repeat(np.arange(len(shares)), shares)
        return 50 * np.eye(10)[labels]

    assert look.few_classes(window(64)) and look.few_classes(window(32, 32))
    assert not look.few_classes(window(16, 16, 16, 16))
    assert not look.few_classes(50 * np.eye(2)[[0, 0]]), "two classes: one at a time is normal"
