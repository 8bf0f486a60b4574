"""A watched folder: each file once, in order, when it's whole; nothing else read, nothing touched."""

import hashlib
import io
import os
import shutil
import threading
import time

import numpy as np
import pytest

from edgesolve.device import source_folder
from edgesolve.device.bundle import Contract
from edgesolve.device.errors import InputError
from edgesolve.device.source_folder import FolderSource
from edgesolve.device.sources import SourceEnded, open_source

CONTRACT = Contract((4, 6, 3), np.dtype(np.uint8))
SOUND = Contract((16, 4, 1), np.dtype(np.float32))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(source_folder, "POLL_S", 0.02)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def watch(folder):
    sources = []

    def make(contract=CONTRACT, **options):
        sources.append(FolderSource(str(folder), contract, **options))
        return sources[-1]

    yield make
    for source in sources:
        source.close()
        with pytest.raises(SourceEnded):
            source.next(0.0)


def frame(value, contract=CONTRACT):
    return np.full(contract.shape, value, contract.dtype)


def put(path, array, age_s=60.0):
    np.save(path, array)
    aged(path, age_s)


def aged(path, age_s):
    then = time.time_ns() - int(age_s * 1e9)
    os.utime(path, ns=(then, then))


def drain(source, patience=0.3):
    items = []
    while (item := source.next(patience)) is not None:
        items.append(item)
    return items


def names(items):
    return [item.name for item in items]


def test_by_time_then_name_each_once(folder, watch):
    ages = {"c": 50, "b": 40, "a": 30}
    for i, (name, age) in enumerate(ages.items()):
        put(folder / f"{name}.npy", frame(i), age)
    then = (folder / "b.npy").stat().st_mtime_ns
    put(folder / "0.npy", frame(7))
    os.utime(folder / "0.npy", ns=(then, then))
    source = watch()
    items = drain(source)
    assert names(items) == ["c.npy", "0.npy", "b.npy", "a.npy"]
    assert [int(i.frame[0, 0, 0]) for i in items] == [0, 7, 1, 2]
    assert all(i.problem == "" for i in items)
    assert drain(source) == []


def test_a_changed_file_again_and_a_new_one(folder, watch):
    put(folder / "a.npy", frame(1))
    source = watch()
    assert len(drain(source)) == 1
    put(folder / "a.npy", frame(2), 30)
    put(folder / "b.npy", frame(3), 20)
    assert [int(i.frame[0, 0, 0]) for i in drain(source)] == [2, 3]


def test_existing_files_may_be_left_out(folder, watch):
    put(folder / "old.npy", frame(1))
    np.save(folder / "young.npy", frame(1))
    source = watch(existing=False)
    put(folder / "new.npy", frame(2))
    assert names(drain(source)) == ["new.npy"]


def test_a_folder_that_cannot_be_listed(folder, watch, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match="Permission denied"):
        watch(existing=False)
    assert "Permission denied" in watch().next(1.0).problem


def test_a_young_file_waits_until_two_sweeps_agree(folder, watch, monkeypatch):
    source = watch()
    path = folder / "a.npy"
    path.write_bytes(b"")
    ahead = time.time_ns() + 3600 * 10**9  # a clock that was set back: never over a second old

    def grow(size):
        with open(path, "ab") as file:
            file.write(b"x" * size)
        os.utime(path, ns=(ahead, ahead))

    swept = []
    sweep = FolderSource._sweep_slices

    def counted(self):
        grow(1)  # it changes before every sweep
        swept.append(1)
        yield from sweep(self)

    monkeypatch.setattr(FolderSource, "_sweep_slices", counted)
    assert source.next(0.3) is None and len(swept) > 2
    monkeypatch.setattr(FolderSource, "_sweep_slices", sweep)
    np.save(path, frame(5))
    os.utime(path, ns=(ahead, ahead))
    assert int(source.next(2.0).frame[0, 0, 0]) == 5


def test_a_slow_writer_is_never_read_half(folder, watch):
    source = watch()
    whole = io.BytesIO()
    np.save(whole, frame(9))
    data = whole.getvalue()

    def write():
        with open(folder / "slow.npy", "wb", buffering=0) as file:
            for i in range(0, len(data), 4):
                file.write(data[i : i + 4])
                time.sleep(0.002)

    writer = threading.Thread(target=write)
    writer.start()
    items = []
    while not items:
        items = drain(source, 0.05)
    writer.join()
    assert [i.problem for i in items] == [""] and int(items[0].frame[0, 0, 0]) == 9


def test_arrays_of_several_frames(folder, watch):
    x = np.arange(5 * 72, dtype=np.uint8).reshape(5, 4, 6, 3)
    put(folder / "one.npy", x, 50)
    np.savez(folder / "two.npz", y=np.arange(5), x=x)
    np.savez_compressed(folder / "three.npz", x=x)
    aged(folder / "two.npz", 40), aged(folder / "three.npz", 30)
    items = drain(watch())
    np.testing.assert_array_equal([i.frame for i in items], np.concatenate([x, x, x]))
    assert names(items)[:2] == ["one.npy[0]", "one.npy[1]"]


def test_a_large_array_is_read_frame_by_frame(folder, watch):
    """500 frames of 120 kB: no more than a few are in memory."""
    import tracemalloc

    big = Contract((200, 200, 3), np.dtype(np.uint8))
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.uint8, (500, 200, 200, 3))
    del x
    aged(folder / "x.npy", 60)
    source = watch(big)
    tracemalloc.start()
    for _ in range(500):
        assert source.next(2.0).frame.shape == (200, 200, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


def test_images_are_resized_and_damaged_ones_named_once(folder, watch):
    Image = pytest.importorskip("PIL.Image", reason="images need Pillow")
    Image.fromarray(np.full((40, 60, 3), 77, np.uint8)).save(folder / "good.PNG")
    shutil.copy(folder / "good.PNG", folder / "cut.png")
    with open(folder / "cut.png", "r+b") as file:
        file.truncate(100)
    aged(folder / "cut.png", 50), aged(folder / "good.PNG", 40)
    source = watch()
    items = drain(source)
    assert names(items) == ["cut.png", "good.PNG"]
    assert items[0].frame is None and items[0].problem.startswith("cut.png: not readable")
    assert (items[1].frame == 77).all() and items[1].frame.shape == CONTRACT.shape
    shutil.copy(folder / "good.PNG", folder / "cut.png")
    aged(folder / "cut.png", 30)
    assert (source.next(2.0).frame == 77).all()  # mended


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("x.npy", b"", "empty"),
        ("x.npy", b"garbage that is long enough", "np.save"),
        ("x.npz", b"PK\x03\x04 damaged", "not readable"),
        ("x.npz", b"", "not readable"),
        ("x.jpg", b"\xff\xd8\xff", "is a picture, this bundle expects float32"),
    ],
)
def test_damage_is_one_problem(folder, watch, name, data, sentence):
    (folder / name).write_bytes(data)
    aged(folder / name, 60)
    source = watch(SOUND)
    (item,) = drain(source)
    assert item.frame is None and item.name == name and sentence in item.problem


def test_npz_without_x_and_misfits_and_nan(folder, watch):
    np.savez(folder / "a.npz", frames=np.zeros((2, 16, 4, 1)))
    aged(folder / "a.npz", 50)
    put(folder / "b.npy", np.zeros((2, 16, 5, 1), np.float32), 40)
    x = np.zeros((3, 16, 4, 1), np.float32)
    x[1] = np.inf
    put(folder / "c.npy", x, 30)
    problems = [i.problem for i in drain(watch(SOUND))]
    assert (
        "no x" in problems[0] and "shape (16, 5, 1)" in problems[1] and "NaN or inf" in problems[3]
    )
    assert problems[2] == problems[4] == ""


def test_links_pipes_folders_and_others_are_ignored(folder, watch, tmp_path):
    put(tmp_path / "secret.npy", frame(1))
    os.symlink(tmp_path / "secret.npy", folder / "link.npy")
    os.symlink(tmp_path / "nothing", folder / "dangling.npy")
    os.mkfifo(folder / "pipe.npy")
    (folder / "sub.npy").mkdir()
    (folder / "class").mkdir()
    put(folder / "class" / "a.npy", frame(1))
    put(folder / ".part.npy", frame(1))
    (folder / "notes.txt").write_text("x")
    put(folder / "real.npy", frame(2))
    assert names(drain(watch())) == ["real.npy"]


def test_a_link_swapped_in_after_the_sweep_is_not_followed(folder, watch, tmp_path):
    put(folder / "a.npy", frame(1), 60), put(folder / "b.npy", frame(2), 50)
    put(folder / "c.npy", frame(3), 40), put(folder / "d.npy", frame(4), 30)
    source = watch()
    assert source.next(2.0).name == "a.npy"
    (folder / "b.npy").rename(tmp_path / "b.npy")
    os.symlink(tmp_path / "b.npy", folder / "b.npy")
    (folder / "c.npy").unlink()
    os.mkfifo(folder / "c.npy")
    assert names(drain(source)) == ["d.npy"]


def test_vanished_files_are_dropped_and_forgotten(folder, watch):
    for i in range(20):
        put(folder / f"{i:02}.npy", frame(i), 60 - i)
    source = watch()
    assert source.next(2.0).name == "00.npy"
    for path in folder.glob("1*.npy"):
        path.unlink()
    assert len(drain(source)) == 9
    shutil.rmtree(folder), folder.mkdir()
    assert drain(source) == []
    assert not source._done and not source._before and not source._ready


def test_a_folder_that_disappears_is_one_problem_and_found_again(folder, watch):
    put(folder / "a.npy", frame(1))
    source = watch()
    assert len(drain(source)) == 1
    folder.rename(folder.with_name("pulled"))
    items = drain(source)
    assert len(items) == 1 and "waiting for it" in items[0].problem
    folder.with_name("pulled").rename(folder)
    put(folder / "b.npy", frame(2))
    assert names(drain(source)) == ["b.npy"]  # and a.npy not twice
    shutil.rmtree(folder)
    assert len(drain(source)) == 1  # the next outage is told again
    folder.mkdir()


def test_nothing_is_changed(folder, watch):
    put(folder / "a.npy", frame(1))
    (folder / "bad.npy").write_bytes(b"bad")

    def digest():
        return {
            p.name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
            for p in folder.iterdir()
        }

    before = digest()
    drain(watch())
    assert digest() == before


def test_odd_names_are_printable(folder, watch):
    for i, name in enumerate([b"line\nbreak.npy", b"bytes\xff.npy"]):
        path = os.fsdecode(os.fsencode(folder) + b"/" + name)
        with open(path, "wb") as file:
            file.write(b"bad")
        aged(path, 60 - i)
    items = drain(watch())
    assert names(items) == ["line?break.npy", "bytes?.npy"]
    assert all(i.problem.encode() and "\n" not in i.problem for i in items)


def test_many_files_are_listed_in_slices(folder, watch, monkeypatch):
    """With no time at all for a slice, a sweep still gets on, and nothing is delivered out of order."""
    for i in range(300):
        put(folder / f"{i:03}.npy", frame(i % 200), 1000 - i)
    monkeypatch.setattr(source_folder, "SLICE_S", 0.0)
    source = watch()
    calls = 0
    while (item := source.next(0.0)) is None:
        calls += 1
    assert calls >= 4
    assert names([item, *drain(source)]) == [f"{i:03}.npy" for i in range(300)]


def test_close_wakes_who_waits(folder):
    source = open_source(str(folder), CONTRACT)
    timer = threading.Timer(0.1, source.close)
    timer.start()
    with pytest.raises(SourceEnded, match="closed"):
        source.next(30.0)
    timer.join()


def test_close_in_the_middle_of_a_file(folder):
    put(folder / "a.npy", np.zeros((5, 4, 6, 3), np.uint8))
    source = open_source(str(folder), CONTRACT)
    assert source.next(2.0) is not None
    source.close()
    source.close()
    with pytest.raises(SourceEnded):
        source.next(0.0)
