"""Arrays through a real pipe: frames in order, a full pipe that waits, garbage that ends it, an end within a second."""

import contextlib
import io
import os
import threading
import time

import numpy as np
import pytest

from edgesolve.device.bundle import Contract
from edgesolve.device.errors import InputError
from edgesolve.device.source_stdin import StdinSource
from edgesolve.device.sources import SourceEnded

CONTRACT = Contract((4, 6, 3), np.dtype(np.uint8))
SOUND = Contract((16, 4, 1), np.dtype(np.float32))


@pytest.fixture
def pipe():
    """pipe(contract) -> (source, file to write into); all is closed, and every thread gone, afterwards."""
    opened, before = [], threading.active_count()

    def make(contract=CONTRACT):
        reading, writing = os.pipe()
        source = StdinSource(contract, reading)
        opened.append((source, reading))
        return source, files.enter_context(open(writing, "wb", buffering=0))

    with contextlib.ExitStack() as files:
        yield make
        for source, reading in opened:
            started = time.monotonic()
            source.close()
            assert time.monotonic() - started < 1.0
            assert not source._thread.is_alive()
            os.close(reading)
    ended = time.monotonic() + 1.0  # a test's own writer may still be leaving
    while threading.active_count() > before and time.monotonic() < ended:
        time.sleep(0.01)
    assert threading.active_count() <= before


def saved(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def numbered(n, contract=CONTRACT):
    size = int(np.prod(contract.shape))
    return (np.arange(n * size) % 251).astype(contract.dtype).reshape(n, *contract.shape)


def drain(source):
    items = []
    with pytest.raises(SourceEnded) as ended:
        while True:
            if (item := source.next(5.0)) is not None:
                items.append(item)
    return items, str(ended.value)


@pytest.mark.parametrize("contract", [CONTRACT, SOUND], ids=["pictures", "sound"])
def test_frames_and_batches_in_order(pipe, contract):
    source, out = pipe(contract)
    x = numbered(9, contract)
    out.write(saved(x[0]) + saved(x[1:5]) + saved(np.asfortranarray(x[5:7])) + saved(x[7:]))
    out.close()
    items, end = drain(source)
    np.testing.assert_array_equal([i.frame for i in items], x)
    assert [i.name for i in items] == [f"stdin {n}" for n in range(9)]
    assert end == "stdin: ended after 9 frames."


def test_a_byte_at_a_time(pipe):
    source, out = pipe()
    x = numbered(1)
    for byte in saved(x):
        out.write(bytes([byte]))
    np.testing.assert_array_equal(source.next(5.0).frame, x[0])
    assert source.next(0.0) is None


def test_a_full_pipe_waits(pipe):
    """Nothing is lost, and only the queue's bound and the pipe's own buffer are taken early."""
    source, out = pipe()
    x = numbered(50)
    written = []

    def write():
        for frame in x:
            for _ in range(40):  # 2000 frames: more than pipe and queue hold
                out.write(saved(frame))
            written.append(1)
        out.close()

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.2)
    assert len(written) < 20
    assert len(source._queue) == 16
    first = [source.next(5.0).frame for _ in range(40 * 10)]
    np.testing.assert_array_equal(first, np.repeat(x[:10], 40, axis=0))
    items, end = drain(source)
    writer.join()
    assert len(items) == 40 * 40 and end == "stdin: ended after 2000 frames."


def test_large_frames_are_not_hoarded(pipe):
    source, _ = pipe(Contract((2000, 3000, 3), np.dtype(np.uint8)))
    assert source._capacity == 1


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"hello, this is a log line\n", "np.save"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f", "header is"),
        (saved(numbered(1))[:-5], "ends early, 5 bytes"),
        (saved(numbered(1))[:20], "ends early"),
        (saved(numbered(1)[:, :3])[:-5], "ends early"),
    ],
    ids=["text", "header", "cut", "cut header", "cut misfit"],
)
def test_garbage_is_one_problem_and_the_end(pipe, data, sentence):
    source, out = pipe()
    out.write(saved(numbered(2)) + data)
    out.close()
    items, end = drain(source)
    assert [i.frame is None for i in items] == [False, False, True]
    assert sentence in items[2].problem and items[2].problem in end


def test_pickled_objects_end_it(pipe):
    source, out = pipe()
    held = io.BytesIO()
    np.save(held, np.array([{}], object), allow_pickle=True)
    out.write(held.getvalue())
    items, _ = drain(source)
    assert len(items) == 1 and "plain numbers" in items[0].problem


def test_a_misfit_is_skipped(pipe):
    source, out = pipe(SOUND)
    x = numbered(3, SOUND)
    x[1, 0] = np.nan
    wrong = np.zeros((700, 1000, 3), np.uint8)
    out.write(saved(wrong[:5]))
    threading.Thread(
        target=lambda: (out.write(saved(wrong)), out.write(saved(x)), out.close())
    ).start()
    items, _ = drain(source)
    problems = [i.problem for i in items]
    assert "expects (16, 4, 1)" in problems[0] and "expects (16, 4, 1)" in problems[1]
    assert problems[2] == problems[4] == "" and "NaN" in problems[3]
    np.testing.assert_array_equal(items[4].frame, x[2])


@pytest.mark.parametrize("state", ["waiting", "mid-frame", "full"])
def test_close_ends_the_thread_whatever_it_does(pipe, state):
    source, out = pipe()  # the fixture closes and checks
    if state == "mid-frame":
        out.write(saved(numbered(1))[:150])
    if state == "full":
        out.write(saved(numbered(100)))
    time.sleep(0.05)
    source.close()
    with pytest.raises(SourceEnded):
        source.next(1.0)


def test_close_wakes_who_waits(pipe):
    source, _ = pipe()
    timer = threading.Timer(0.1, source.close)
    timer.start()
    with pytest.raises(SourceEnded, match="closed"):
        source.next(30.0)
    timer.join()


def test_what_is_no_pipe(tmp_path):
    with pytest.raises(InputError, match="closed"):
        StdinSource(CONTRACT, 10_000)
    leader, follower = os.openpty()
    with pytest.raises(InputError, match="terminal"):
        StdinSource(CONTRACT, follower)
    os.close(leader), os.close(follower)


def test_a_redirected_file_and_a_full_process(tmp_path, python_command):
    """`edgesolve serve … --source - < file`: as a process, over its real standard input."""
    import subprocess

    x = numbered(3)
    (tmp_path / "x.npy").write_bytes(saved(x) + saved(x[0]))
    code = (
        "import numpy as np; from edgesolve.device.bundle import Contract\n"
        "from edgesolve.device.sources import open_source, SourceEnded\n"
        "s = open_source('-', Contract((4, 6, 3), np.dtype('u1'))); total = 0\n"
        "try:\n  while True: total += int(s.next(5.0).frame.sum())\n"
        "except SourceEnded as e: print(total, e)"
    )
    with open(tmp_path / "x.npy", "rb") as file:
        done = subprocess.run(
            [*python_command, "-c", code], stdin=file, capture_output=True, text=True
        )
    expected = int(x.sum()) + int(x[0].sum())
    assert done.stdout == f"{expected} stdin: ended after 4 frames.\n", done.stderr
