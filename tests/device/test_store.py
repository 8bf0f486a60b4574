"""The state folder: what was committed is what is loaded, whatever happens in between."""

from __future__ import annotations

import hmac
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from edgesolve.device import atomic, generation
from edgesolve.device import store as store_module
from edgesolve.device.errors import BusyError, StateError
from edgesolve.device.store import Store

CRASH = Path(__file__).with_name("store_crash.py")
BASE, OTHER = "a" * 64, "b" * 64


def head(k):
    return {"weights": np.full((3, 2), k, np.float32), "order": np.arange(6).reshape(2, 3).T}


def commit(store, k, base=BASE):
    return store.commit(head(k), {"mean": np.float64([k])}, {"bundle_sha256": base, "k": k})


def in_use(store, base=BASE):
    found = store.current(base)
    return 0 if found is None else found.provenance["k"]


@pytest.fixture
def memory_path(tmp_path):
    """A folder in memory where there is one: a crash of a process doesn't need a slow disk."""
    shared = Path("/dev/shm")
    usable = os.access(shared, os.W_OK)
    with tempfile.TemporaryDirectory(dir=shared if usable else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def store(memory_path):
    return Store(memory_path / "state")


def test_a_generation_comes_back_bit_for_bit(store):
    number = store.commit(head(1), None, {"bundle_sha256": BASE, "gap": np.float32(0.5)})
    found = Store(store.path).current()
    assert (number, found.number, found.parent) == (1, 1, 0)
    assert found.statistics is None
    assert found.provenance == {"bundle_sha256": BASE, "gap": 0.5}
    for name, array in head(1).items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)


def test_reading_creates_nothing(store):
    assert store.current() is None
    assert store.history() == []
    assert store.notes == []
    assert not store.path.exists()
    commit(store, 1)
    before = {p: p.stat().st_mtime_ns for p in store.path.rglob("*")}
    Store(store.path).current(BASE)
    assert {p: p.stat().st_mtime_ns for p in store.path.rglob("*")} == before


def test_rollback_goes_further_back_until_the_factory_head(store):
    for k in (1, 2, 3):
        commit(store, k)
    assert [store.rollback() for _ in range(4)] == [2, 1, 0, 0]
    assert store.current() is None


def test_after_a_rollback_the_next_commit_descends_from_what_was_used(store):
    for k in (1, 2, 3):
        commit(store, k)
    store.rollback()
    assert commit(store, 4) == 4
    assert store.current().parent == 2
    assert store.rollback() == 2


@pytest.mark.parametrize("damaged", ["CURRENT", "CURRENT.bak", "both", "generation"])
def test_what_was_rolled_back_never_returns(store, damaged):
    for k in (1, 2, 3):
        commit(store, k)
    store.rollback()
    names = {"both": ["CURRENT", "CURRENT.bak"], "generation": ["generations/0002/seal.json"]}
    for name in names.get(damaged, [damaged]):
        (store.path / name).write_bytes(b"\0" * 40)
    assert in_use(store) == (1 if damaged == "generation" else 2)
    assert len(store.notes) == len(set(store.notes))


@pytest.mark.parametrize("lost", ["CURRENT", "CURRENT.bak"])
def test_after_a_rollback_either_pointer_tells(store, lost):
    commit(store, 1, OTHER)
    commit(store, 2, BASE)
    commit(store, 3, BASE)
    assert [store.rollback(BASE), store.rollback(BASE)] == [2, 0]
    (store.path / lost).write_bytes(b"")
    assert store.current() is None


def test_the_newest_three_are_kept_and_the_parent(store):
    for k in range(1, 8):
        commit(store, k)
    folder = store.path / "generations"
    assert sorted(p.name for p in folder.iterdir()) == ["0005", "0006", "0007"]
    for _ in range(2):
        store.rollback()
    commit(store, 8)
    assert sorted(p.name for p in folder.iterdir() if p.suffix == "") == ["0005", "0008"]
    assert store.current().parent == 5


def test_what_a_kill_left_over_is_removed(store):
    commit(store, 1)
    left = [".CURRENT.77.tmp", ".CURRENT.bak.77.tmp", ".journal.78.tmp", ".key.7.tmp"]
    for name in (*left, ".ledger.9.tmp"):
        (store.path / name).write_bytes(b"half")
    (store.path / "generations" / "0002.tmp").mkdir()
    assert commit(store, 2) == 2
    kept = {p.name for p in store.path.rglob("*.tmp")}
    assert kept == {".ledger.9.tmp"}, "that one is written without the lock"


def test_factory_reset_works_on_a_damaged_state(store):
    commit(store, 1)
    (store.path / "CURRENT").unlink()
    (store.path / "CURRENT").mkdir()
    (store.path / "generations" / "0001" / "seal.json").write_text("{")
    store.factory_reset()
    assert store.current() is None and store.notes == []
    assert not (store.path / "generations").exists()
    assert commit(store, 2) == 1 and in_use(store) == 2


def test_another_bundle_starts_from_its_factory_head(store):
    commit(store, 1)
    assert store.current(OTHER) is None
    assert any(note.startswith("vendor_update") for note in store.notes)
    commit(store, 2, OTHER)
    assert store.current(OTHER).parent == 0
    assert in_use(store, OTHER) == 2
    assert in_use(store, BASE) == 1, "going back to the old bundle finds what it had learned"
    assert store.rollback(OTHER) == 0
    assert (in_use(store, OTHER), in_use(store, BASE)) == (0, 1)
    assert store.rollback(BASE) == 0
    assert (in_use(store, OTHER), in_use(store, BASE)) == (0, 0)


def files_of(path):
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name != "lock")


def test_any_flipped_bit_falls_back_or_changes_nothing(store):
    for k in (1, 2, 3):
        commit(store, k)
    rng, seen = np.random.default_rng(0), set()
    for path in files_of(store.path):
        good = path.read_bytes()
        for at in {0, len(good) - 1, *rng.integers(len(good), size=40).tolist()}:
            bad = bytearray(good)
            bad[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            found = store.current(BASE)
            k = found.provenance["k"]
            np.testing.assert_array_equal(found.arrays["weights"], head(k)["weights"])
            assert found.statistics["mean"] == [k]
            if k != 3:
                assert store.notes
            seen.add((path.relative_to(store.path).parts[0], k))
        path.write_bytes(good)
    assert {("generations", 3), ("generations", 2), ("CURRENT", 2)} <= seen


@pytest.mark.parametrize("cut", [0, 1, 0.5, -1])
def test_a_truncated_file_falls_back(store, cut):
    for k in (1, 2):
        commit(store, k)
    for path in files_of(store.path):
        good = path.read_bytes()
        path.write_bytes(good[: int(cut * len(good)) if cut == 0.5 else cut])
        assert in_use(store) in (1, 2)
        path.write_bytes(good)


def test_everything_lost_means_the_factory_head(store):
    for k in (1, 2):
        commit(store, k)
    for path in files_of(store.path):
        path.write_bytes(b"")
    assert store.current() is None
    assert store.notes[-1] == "In use instead: the factory head."


def test_both_pointers_lost_means_the_newest_intact_generation(store):
    for k in (1, 2):
        commit(store, k)
    for name in ("CURRENT", "CURRENT.bak"):
        (store.path / name).unlink()
    assert in_use(store) == 2
    assert "CURRENT" in store.notes[0]


def test_a_newer_schema_is_refused_by_name(store, monkeypatch):
    monkeypatch.setattr(generation, "SCHEMA", 2)
    commit(store, 1)
    monkeypatch.undo()
    with pytest.raises(StateError, match=r"CURRENT: schema is 2, this runtime reads 1\. Update"):
        store.current()
    with pytest.raises(StateError, match="schema is 2"):
        commit(store, 2)
    store.factory_reset()
    assert store.current() is None


def test_the_journal_keeps_the_last_256(store):
    for k in range(3):
        store.journal({"decision": "kept", "k": k})
    (store.path / "journal").write_text(
        "".join(json.dumps({"k": k}) + "\n" for k in range(300)) + "{damaged\n"
    )
    store.journal({"k": np.int64(300)})
    found = [entry["k"] for entry in store.history()]
    assert len(found) == 256 and found[-1] == 300 and found[0] == 45


def test_the_lock_names_its_holder(store):
    script = (
        "import sys; from edgesolve.device.store import Store\n"
        "with Store(sys.argv[1]).lock(): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(store.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match=rf"process {holder.pid} is changing this state"):
            commit(store, 1)
        assert store.current() is None, "reading needs no lock"
        holder.kill()
        holder.communicate()
    commit(store, 1)  # the lock died with its process


def test_the_lock_nests(store):
    with store.lock():
        commit(store, 1)
        with pytest.raises(BusyError, match=str(os.getpid())):
            commit(Store(store.path), 2)
    commit(Store(store.path), 2)


def test_a_full_or_read_only_disk_is_one_sentence_and_loses_nothing(store, monkeypatch):
    commit(store, 1)

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StateError, match=r"Read-only file system\); nothing stored before is lost"):
        commit(store, 2)
    with pytest.raises(StateError, match="journal"):
        store.journal({})
    monkeypatch.undo()
    assert in_use(store) == 1
    assert not list(store.path.rglob("*.tmp"))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StateError):
        commit(Store(store.path.parent / "new"), 1)


def test_everything_is_durable_before_it_is_named(store, monkeypatch):
    """A power cut keeps what was synced: no rename may come before the fsync of what it names."""
    synced, events = set(), []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def spy_fsync(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def spy(move):
        def moved(source, target):
            source, target = str(source), str(target)
            if not target.endswith(".tmp"):
                inside = files_of(Path(source)) if os.path.isdir(source) else []
                assert {source, *map(str, inside)} <= synced, f"{source} was named before synced"
                for earlier in events:
                    assert os.path.dirname(earlier) in synced, f"{earlier}: folder not synced"
                events.append(target)
                synced.discard(os.path.dirname(target))
            move(source, target)

        return moved

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy(replace))
    monkeypatch.setattr(os, "rename", spy(rename))
    commit(store, 1)
    assert [Path(e).name for e in events] == ["key", "0001", "CURRENT.bak", "CURRENT"]
    assert str(store.path) in synced


def test_the_window_is_kept_beside_the_head(store):
    window = {"n": np.array(12.0), "s": np.arange(6.0)}
    store.commit(head(1), None, {"bundle_sha256": BASE}, window=window)
    found = store.current()
    assert found.statistics is None and sorted(found.window) == ["n", "s"]
    np.testing.assert_array_equal(found.window["s"], window["s"])
    commit(store, 2)
    assert store.current().window is None


# -- probation -------------------------------------------------------------------------------------


def on_probation(store, k, tries=3, base=BASE):
    provenance = {"bundle_sha256": base, "k": k}
    statistics = {"mean": np.float64([k])}
    return store.commit(head(k), statistics, provenance, committed=False, tries=tries)


def started(store, base=BASE):
    found = store.start(base)
    return 0 if found is None else found.provenance["k"]


def tries_left(store):
    found = Store(store.path).pointer(BASE)
    return found["tries_left"], found["committed"]


def test_a_crash_loop_falls_back_by_itself(store):
    commit(store, 1)
    on_probation(store, 2)
    for left in (2, 1, 0):
        fresh = Store(store.path)
        assert started(fresh) == 2 and fresh.notes == []
        assert tries_left(store) == (left, False)
    assert in_use(store) == 2, "looking at it uses up no try"
    assert started(store) == 1
    assert store.notes[0].startswith("crash_loop: generation 2 ")
    assert (store.path / "generations" / "0002.rejected").is_dir()
    assert tries_left(store) == (0, True)
    assert started(store) == 1 and store.notes == []


def test_a_crash_loop_from_the_first_generation_ends_at_the_factory_head(store):
    on_probation(store, 1, tries=1)
    assert [started(store) for _ in range(3)] == [1, 0, 0]
    assert Store(store.path).pointer()["generation"] == 0


def test_a_parent_that_was_never_confirmed_stays_on_probation(store):
    commit(store, 1)
    on_probation(store, 2, tries=2)
    started(store)
    on_probation(store, 3, tries=1)
    assert [started(store) for _ in range(4)] == [3, 2, 1, 1]


def test_confirmed_it_is_never_counted_again(store):
    commit(store, 1)
    assert on_probation(store, 2) == 2
    assert started(store) == 2
    store.confirm(2)
    store.confirm(2)
    assert tries_left(store) == (0, True)
    before = {p: p.stat().st_mtime_ns for p in store.path.rglob("*")}
    assert [started(store) for _ in range(5)] == [2] * 5
    store.confirm(2)
    assert {p: p.stat().st_mtime_ns for p in store.path.rglob("*")} == before
    assert in_use(store) == 2
    for other in (0, 1, 3):
        with pytest.raises(
            StateError, match=rf"generation {other} can't be confirmed, generation 2"
        ):
            store.confirm(other)
    assert store.rollback() == 1
    with pytest.raises(StateError, match="generation 1 is in use"):
        store.confirm(2)


def test_the_factory_head_needs_no_probation(store):
    assert store.start(BASE) is None and store.pointer() is None
    store.confirm(0)
    assert not store.path.exists()
    with pytest.raises(StateError, match=r"generation 1 can't be confirmed, the factory head"):
        store.confirm(1)


def test_a_new_state_folder_is_durable_with_all_above_it(memory_path, monkeypatch):
    synced, fsync = [], os.fsync

    def spy(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    store = Store(memory_path / "a" / "b")
    store.journal({"k": 1})
    assert synced[:2] == [str(memory_path), str(memory_path / "a")]


@pytest.mark.parametrize("lost", [["CURRENT"], ["CURRENT", "CURRENT.bak"]])
def test_without_pointers_a_crash_loop_still_ends(store, lost):
    commit(store, 1)
    on_probation(store, 2)
    for name in lost:
        (store.path / name).write_bytes(b"\0" * 30)
    seen = [started(Store(store.path)) for _ in range(9)]
    assert seen == ([1] * 9 if len(lost) == 1 else [2, 2, 2, *[1] * 6])


def test_another_bundles_pointer_is_not_lost_by_a_start(store):
    commit(store, 1, BASE)
    commit(store, 2, OTHER)
    assert started(store, BASE) == 1 and in_use(store, OTHER) == 2
    store.confirm(1)
    assert started(store, BASE) == 1 and in_use(store, OTHER) == 2


@pytest.mark.parametrize("code", [28, 30, 5])
def test_a_head_whose_tries_cannot_be_counted_is_not_loaded(store, monkeypatch, code):
    commit(store, 1)
    on_probation(store, 2)

    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    assert started(store) == 1
    assert "its tries can't be counted" in store.notes[0] and "generation 1" in store.notes[-1]
    monkeypatch.undo()
    assert tries_left(store) == (3, False) and started(store) == 2


def test_start_says_who_holds_the_lock(store):
    on_probation(store, 1)
    with Store(store.path).lock(), pytest.raises(BusyError):
        store.start(BASE)
    assert tries_left(store) == (3, False)


def test_no_tries_at_all_is_a_mistake(store):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        on_probation(store, 1, tries=0)


def test_a_pointer_of_an_older_release_means_committed(store):
    commit(store, 1)
    for name in ("CURRENT", "CURRENT.bak"):
        record = json.loads((store.path / name).read_bytes())
        for key in ("tries_left", "committed", "check"):
            del record[key]
        (store.path / name).write_bytes(generation.sealed(record))
    assert tries_left(store) == (0, True)
    assert started(store) == 1


def test_keys_that_a_later_release_adds_are_ignored(store):
    on_probation(store, 1)
    record = json.loads((store.path / "CURRENT").read_bytes())
    del record["check"]
    (store.path / "CURRENT").write_bytes(generation.sealed({**record, "later": [1]}))
    assert tries_left(store) == (3, False) and in_use(store) == 1


# -- the device's key ------------------------------------------------------------------------------


def test_the_key_is_made_once_and_only_its_owner_reads_it(store):
    store.journal({"k": 1})
    store.current()
    key = store.path / "key"
    assert not key.exists(), "only a seal needs it"
    commit(store, 1)
    made = key.read_bytes()
    assert len(made) == 64 and key.stat().st_mode & 0o777 == 0o600
    commit(store, 2)
    assert key.read_bytes() == made
    assert store.current().sealed
    other = Store(store.path.parent / "other")
    commit(other, 1)
    assert (other.path / "key").read_bytes() != made


def test_the_mark_is_an_hmac_of_the_seal(store):
    commit(store, 1)
    seal = json.loads((store.path / "generations" / "0001" / "seal.json").read_bytes())
    del seal["check"]
    found = seal.pop("hmac")
    key = (store.path / "key").read_bytes()[:32]
    text = json.dumps(seal, sort_keys=True).encode()
    assert found == hmac.new(key, text, "sha256").hexdigest()


def test_a_generation_of_another_device_is_refused(store):
    commit(store, 1)
    commit(store, 2)
    other = Store(store.path.parent / "other")
    commit(other, 7)
    commit(other, 7)
    shutil.rmtree(store.path / "generations" / "0002")
    shutil.copytree(other.path / "generations" / "0002", store.path / "generations" / "0002")
    shutil.copy(other.path / "CURRENT", store.path / "CURRENT")
    assert in_use(store) == 1
    assert "was not written on this device" in store.notes[0]


@pytest.mark.parametrize("key", [None, b"", b"short", b"\0" * 64])
def test_a_lost_key_disowns_nothing(store, key):
    commit(store, 1)
    path = store.path / "key"
    path.unlink()
    if key is not None:
        path.write_bytes(key)
    found = store.current(BASE)
    assert found.provenance["k"] == 1 and not found.sealed and store.notes == []
    commit(store, 2)
    assert in_use(store) == 2 and store.rollback() == 1, "a new key would have disowned it"
    store.factory_reset()
    commit(store, 3)
    assert store.current().sealed, "nothing is left that another key sealed"


def test_a_seal_without_a_mark_is_accepted(store, monkeypatch):
    monkeypatch.setattr(Store, "_key", lambda self: None)
    commit(store, 1)
    monkeypatch.undo()
    assert not store.current().sealed and in_use(store) == 1
    commit(store, 2)
    assert store.current().sealed and store.rollback() == 1


# -- bytes and faults ------------------------------------------------------------------------------


def test_every_durable_byte_is_counted(store, monkeypatch):
    def on_disk():
        files = (p for p in store.path.rglob("*") if p.is_file() and p.name != "lock")
        return sum(p.stat().st_size for p in files)

    before = atomic.written()
    commit(store, 1)
    assert atomic.written() - before == on_disk(), "once each"
    kept, before = on_disk(), atomic.written()
    store.journal({"k": 1})
    assert atomic.written() - before == on_disk() - kept
    write = os.write
    monkeypatch.setattr(os, "write", lambda to, data: write(to, data[:7]))
    before = atomic.written()
    atomic.write_atomic(store.path / "x", b"a" * 100)
    assert (store.path / "x").read_bytes() == b"a" * 100
    assert atomic.written() - before == 100


def run_crash(*args):
    done = subprocess.run(
        [sys.executable, str(CRASH), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_kill_9_at_random_moments(memory_path):
    counts = run_crash("kill", memory_path / "state", 120)
    # How many were caught in the middle of a write depends on the machine: it is not asserted.
    assert counts["kills"] == 120 and counts["commits"] > 5


def failures(counts):
    return [sentence for of in counts.values() for sentence in of["bad"]]


def test_faults_at_system_calls(memory_path):
    """A 25th of what benchmarks/bench_faults.py tries: kills, power cuts, full and broken disks."""
    counts = run_crash("fault", memory_path, 25)
    assert failures(counts) == []
    assert all(of["crashed"] == 0 for of in counts.values())
    assert sum(of["points"] for of in counts.values()) > 150
    assert sum(of["killed"] for of in counts.values()) > 50
    assert sum(of["raised"] for of in counts.values()) > 50


def test_damaged_files(memory_path):
    counts = run_crash("damage", memory_path, 2)
    assert failures(counts) == []
    for name in ("CURRENT", "generations/0003/seal.json", "generations/0003/window.safetensors"):
        assert counts[name]["fell back"] == counts[name]["points"] > 6


def test_two_processes_on_one_state(memory_path):
    counts = run_crash("contend", memory_path, 6)
    assert counts["bad"] == []
    assert counts["reads"] > 5 and counts["changes"] > 5


@pytest.mark.parametrize(
    ("how", "n", "mutant"),
    [
        ("fault", 37, "in place"),
        ("fault", 37, "unsynced files"),
        ("fault", 37, "unsynced folders"),
        ("damage", 1, "unchecked"),
    ],
)
def test_faults_find_what_is_wrong_with_a_store(memory_path, how, n, mutant):
    assert failures(run_crash(how, memory_path, n, mutant))


def test_atomic_hash(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert atomic.sha256_file(tmp_path / "x").startswith("ba7816bf8f01cfea")


def test_the_store_imports_nothing_heavy():
    script = "import sys, edgesolve.device.store; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    for name in ("numba", "torch", "onnxruntime", "ai_edge_litert", "scipy"):
        assert f"'{name}'" not in done.stdout
    assert store_module.JOURNAL_LENGTH == 256
