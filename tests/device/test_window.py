"""A bounded window: evenly spread over all that was offered, whatever its length; bad frames stay out."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from edgesolve.device.window import Window, usable

SHAPE = (4, 5, 3)


def numbered(i, shape=SHAPE):
    """A frame that says which one it is."""
    frame = np.zeros(shape, np.int32)
    frame.flat[0], frame.flat[1] = i, -1
    return frame


def offered(count, capacity, every_s=0.5):
    window = Window(capacity, SHAPE, np.int32)
    for i in range(count):
        assert window.add(numbered(i), 100.0 + every_s * i)
    return window


def kept(window):
    return window.frames()[:, 0, 0, 0]


@pytest.mark.parametrize("capacity", [2, 3, 7, 8, 64])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 63, 64, 65, 1000, 1037])
def test_the_kept_frames_are_every_stride_th_one(capacity, count):
    window = offered(count, capacity)
    stride = 1
    while -(-count // stride) > capacity:  # the smallest power of two that fits
        stride *= 2
    assert window.stride == stride
    np.testing.assert_array_equal(kept(window), np.arange(0, count, stride))
    assert len(window) == len(range(0, count, stride)) <= capacity
    assert window.n_seen == count
    if count > capacity:
        assert len(window) >= capacity // 2


@pytest.mark.parametrize("count", [10, 1000, 12345])
def test_it_spans_its_whole_duration(count):
    window = offered(count, 16)
    assert 0.5 * (count - 1) - 0.5 * window.stride < window.seconds <= 0.5 * (count - 1)
    assert offered(1, 16).seconds == 0.0


def test_frames_are_a_copy_and_can_go_into_given_memory():
    window = offered(100, 8)
    copy = window.frames()
    out = np.zeros((12, *SHAPE), np.int32)
    given = window.frames(out)
    np.testing.assert_array_equal(given, copy)
    assert np.shares_memory(given, out)
    assert not out[len(window) :].any()
    for i in range(100, 300):
        window.add(numbered(i), float(i))
    np.testing.assert_array_equal(copy[:, 0, 0, 0], np.arange(0, 100, 16))


def test_the_caller_may_reuse_its_buffer():
    window, buffer = Window(4, SHAPE, np.int32), numbered(5)
    window.add(buffer, 0.0)
    buffer[:] = 9
    assert kept(window)[0] == 5


def test_clearing_starts_anew():
    window = offered(100, 8)
    window.add(np.zeros(SHAPE, np.int32), 0.0)
    window.clear()
    assert (len(window), window.n_seen, window.n_bad, window.stride, window.seconds) == (0,) * 3 + (
        1,
        0.0,
    )
    assert window.frames().shape == (0, *SHAPE)
    window.add(numbered(7), 0.0)
    assert list(kept(window)) == [7]


def test_covered_lens_and_nan_are_refused_and_counted():
    window = Window(4, SHAPE, np.float32)
    good = np.random.default_rng(0).random(SHAPE, np.float32)
    nan, inf = good.copy(), good.copy()
    nan[3, 4, 2], inf[0, 0, 0] = np.nan, np.inf
    for i, frame in enumerate([nan, good, np.full(SHAPE, 0.7, np.float32), inf]):
        assert window.add(frame, float(i)) is (i == 1)
    assert (len(window), window.n_seen, window.n_bad) == (1, 4, 3)


def test_bad_frames_do_not_disturb_the_spacing():
    window, generator = Window(8, SHAPE, np.int32), np.random.default_rng(3)
    good = 0
    for _ in range(500):
        if generator.random() < 0.4:
            window.add(np.full(SHAPE, 3, np.int32), 0.0)
        else:
            window.add(numbered(good), 0.0)
            good += 1
    np.testing.assert_array_equal(kept(window), np.arange(0, good, window.stride))
    assert window.n_seen - window.n_bad == good


@pytest.mark.parametrize("place", [0, 1, 777, 3071])
def test_one_other_value_anywhere_is_enough_to_be_usable(place):
    frame = np.full((32, 32, 3), 40, np.uint8)
    assert not usable(frame)
    frame.flat[place] = 41
    assert usable(frame)
    assert usable(np.ascontiguousarray(frame)[::-1])
    assert not usable(np.zeros((0, 4, 3), np.uint8))


def test_another_shape_or_dtype_is_refused_rather_than_broadcast():
    window = Window(4, SHAPE, np.uint8)
    with pytest.raises(ValueError, match="this window holds uint8"):
        window.add(np.zeros((4, 5, 1), np.uint8), 0.0)
    with pytest.raises(ValueError, match="float32"):
        window.add(np.zeros(SHAPE, np.float32), 0.0)
    with pytest.raises(ValueError, match="capacity"):
        Window(1, SHAPE, np.uint8)


def test_memory_is_bounded_from_the_start():
    shape = (64, 64, 3)
    window = Window(32, shape, np.uint8)
    frame = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    tracemalloc.start()
    for i in range(1000):
        window.add(frame, float(i))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * frame.nbytes  # thinning moves numbers, not frames
