"""Faults at every system call that changes a state folder, and what may be found there afterwards.

An operation runs in a forked child whose k-th call dies or fails; then a fresh Store must show the view from
before or from after it, byte for byte, take another commit and go back again. Used by store_crash.py (tests) and
benchmarks/bench_faults.py.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import json
import os
import shutil
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from edgesolve.device import atomic, candidate, generation, ledger, pointer
from edgesolve.device import store as store_module
from edgesolve.device.errors import BusyError, EdgeError, StateError
from edgesolve.device.store import Store

BASE = "a" * 64
REAL = {
    name: getattr(os, name)
    for name in "open write pwrite ftruncate fsync rename replace mkdir unlink rmdir".split()
}
POWER_CUTS = ("power cut", "power cut, names too")
ANY = ("kill before", "kill after", *POWER_CUTS)
ANY += ("ENOSPC", "EIO", "EROFS", "EROFS from here on", "ENOSPC from here on")
WRITES = ("half, then kill", "half, then go on")
RAISED = 77


# -- a state and what is seen of it ----------------------------------------------------------------


@functools.cache
def head(k):
    return {"weights": np.random.default_rng(k).normal(size=(40, 10)).astype(np.float32)}


@functools.cache
def _arguments(k, parent=0):
    window = {"sxx": np.random.default_rng([k, 1]).normal(size=60), "n": np.array(float(k))}
    return head(k), {"n": np.array(k)}, {"bundle_sha256": BASE, "k": k, "parent": parent}, window


def commit(store, k, **options):
    new, statistics, provenance, window = _arguments(k)
    return store.commit(new, statistics, provenance, window=window, **options)


def propose(store, k, parent):
    store.propose(*_arguments(k, parent))


def whole(found):
    """The k of a generation whose every byte is right (0 = factory)."""
    if found is None:
        return 0
    k = found.provenance["k"]
    new, statistics, _, window = _arguments(k)
    assert found.arrays["weights"].tobytes() == new["weights"].tobytes(), f"wrong head for {k}"
    assert found.statistics["n"] == statistics["n"], f"wrong statistics for {k}"
    assert found.window["sxx"].tobytes() == window["sxx"].tobytes(), f"wrong window for {k}"
    return k


def loaded(path):
    return whole(Store(path).current(BASE))


@dataclass(frozen=True)
class View:
    """k in use, (tries left, committed) or None, k that waits for approval, journal, updates."""

    used: int
    tries: tuple | None
    waiting: int
    journal: list
    updates: int


def view(state):
    store = Store(state)
    used = whole(store.current(BASE))
    at = store.pointer(BASE)
    return View(
        used=used,
        tries=at and (at["tries_left"], at["committed"]),
        waiting=whole(store.candidate(BASE)),
        journal=[entry["k"] for entry in store.history()],
        updates=ledger.read(state / "ledger")[0].updates_total,
    )


def in_between(found, before, after):
    """None where the view is the one before or after, else what is wrong with it."""
    heads = [(v.used, v.waiting) for v in (before, after)]
    if found.used not in (before.used, after.used):
        return f"k = {found.used} is in use, not {before.used} or {after.used}"
    if (found.used, found.waiting) not in heads:
        return f"k = {found.used} is in use and {found.waiting} waits, not one of {heads}"
    unconfirmed = [v.tries for v in (before, after) if v.used == found.used]
    if found.used and found.tries is not None and found.tries not in unconfirmed:
        return f"tries are {found.tries}, not one of {unconfirmed}"
    if found.journal not in (before.journal, after.journal):
        return "the journal is neither the old nor the new one"
    if found.updates not in (before.updates, after.updates):
        return "the ledger is neither the old nor the new one"
    return None


def files_of(path):
    """Relative path -> bytes of every file."""
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def restore(path, files):
    shutil.rmtree(path, ignore_errors=True)
    for name, data in files.items():
        target = path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


# -- operations ------------------------------------------------------------------------------------


def usual(store, **options):
    """Three generations, the last under `options`; a candidate, a journal, a ledger."""
    for k in (1, 2):
        commit(store, k)
    commit(store, 3, **options)
    propose(store, 7, parent=3)
    store.journal({"k": 1})
    ledger.write(store.path / "ledger", ledger.noted(ledger.Ledger(), 1e9, update=True))


def probation(store, tries=2):
    usual(store, committed=False, tries=tries)


def no_pointers(store):
    probation(store)
    for name in ("CURRENT", "CURRENT.bak"):
        (store.path / name).unlink()


def start(store):
    """Counted, or not loaded at all."""
    found = whole(store.start(BASE))
    if any("can't be counted" in note for note in store.notes):
        assert found != 3, "a head on probation was loaded uncounted"
        raise StateError("not counted")


def book(store):
    path = store.path / "ledger"
    ledger.write(path, ledger.noted(ledger.read(path)[0], 1e9 + 5, written=9, update=True))


OPERATIONS: dict[str, tuple[Callable, Callable]] = {  # name: (what was before, what is done)
    "commit, the first": (lambda store: None, lambda store: commit(store, 1)),
    "commit": (usual, lambda store: commit(store, 6)),
    "commit, uncommitted": (usual, lambda store: commit(store, 6, committed=False)),
    "start, counted": (probation, start),
    "start, no tries left": (
        lambda store: (probation(store, 1), store.start(BASE)),
        start,
    ),
    "start, no pointers": (no_pointers, start),
    "confirm": (probation, lambda store: store.confirm(3)),
    "rollback": (usual, lambda store: store.rollback(BASE)),
    "rollback to the factory": (
        lambda store: commit(store, 1),
        lambda store: store.rollback(BASE),
    ),
    "propose, the first": (lambda store: None, lambda store: propose(store, 8, parent=0)),
    "propose, another": (usual, lambda store: propose(store, 8, parent=3)),
    "approve": (usual, lambda store: store.approve(BASE, committed=False)),
    "reject": (usual, lambda store: store.reject()),
    "journal": (usual, lambda store: store.journal({"k": 2})),
    "ledger": (usual, book),
    "factory reset": (usual, lambda store: store.factory_reset()),
}


# -- the fault -------------------------------------------------------------------------------------


class Fault:
    """What happens at the k-th counted call of this process; `names` lists the calls so far.

    A power cut loses the bytes of every file that was not synced, with "names too" also every
    creation, renaming and deletion in a folder that was not.
    """

    def __init__(self, k=0, what=""):
        self.left, self.what = k, what
        self.failing = False
        self.names: list[str] = []
        self.unsynced: set[str] = set()
        self.undo: list[dict] = []

    def install(self):
        for name in REAL:
            setattr(os, name, functools.partial(self.called, name))

    def called(self, name, *args, **options):
        if self.failing and self.refused(name, args):
            self.fail(self.what.split()[0])
        self.names.append(name)
        self.left -= 1
        if self.left != 0:
            return self.remembered(name, args, options)
        if self.what == "kill before":
            die()
        if self.what == "kill after" or self.what.startswith("power cut"):
            with contextlib.suppress(OSError):
                self.remembered(name, args, options)
            self.lose()
            die()
        half = len(args[1]) // 2 if "write" in name else 0
        if "write" in name and not self.what.startswith("EROFS"):
            done = REAL[name](args[0], args[1][:half], *args[2:])
            if self.what == "half, then go on":
                return done
        if self.what == "half, then kill":
            die()
        self.failing = self.what.endswith("from here on")
        self.fail(self.what.split()[0])

    def refused(self, name, args):
        if self.what.startswith("EROFS"):
            return name != "open" or bool(args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
        return name in ("write", "pwrite", "mkdir") or (name == "open" and args[1] & os.O_CREAT)

    def fail(self, name):
        code = getattr(errno, name)
        raise OSError(code, os.strerror(code))

    def remembered(self, name, args, options):
        """The call itself; noted beforehand is what a power cut would undo of it."""
        if not self.what.startswith("power cut"):
            return REAL[name](*args, **options)
        path = _path(args[0], options.get("dir_fd"))
        target = _path(args[1]) if name in ("rename", "replace") else path
        before = _content(target) if os.path.lexists(target) else None
        done = REAL[name](*args, **options)
        if name == "fsync":
            self.unsynced.discard(path)
            self.undo = [u for u in self.undo if os.path.dirname(u["path"]) != path]
        elif name in ("write", "pwrite", "ftruncate") or (name == "open" and args[1] & os.O_TRUNC):
            self.unsynced.add(path)
        if name == "mkdir" or (name == "open" and before is None):
            self.undo.append({"path": path, "how": "created"})
        elif name in ("unlink", "rmdir"):
            self.undo.append({"path": path, "how": "removed", "was": before})
        elif name in ("rename", "replace"):
            self.moved(path, target)
            self.undo.append({"path": target, "how": "renamed", "from": path, "was": before})
        return done

    def moved(self, source, target):
        def there(path):
            return target + path[len(source) :] if (path + "/").startswith(source + "/") else path

        self.unsynced = {there(path) for path in self.unsynced}
        for record in self.undo:
            record["path"] = there(record["path"])

    def lose(self):
        if not self.what.startswith("power cut"):
            return
        for name, call in REAL.items():
            setattr(os, name, call)
        for path in self.unsynced:
            with contextlib.suppress(OSError):
                os.truncate(path, 0)
        while self.undo and self.what.endswith("names too"):
            record = self.undo.pop()
            with contextlib.suppress(OSError):
                self.undone(**record)

    def undone(self, path, how, was=None, **more):
        if how == "created":
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        if how == "renamed":
            os.rename(path, more["from"])
            self.moved(path, more["from"])
        if was == "folder":
            os.mkdir(path)
        elif was is not None:
            Path(path).write_bytes(was)


def _path(of, folder=None):
    if isinstance(of, int):
        return os.readlink(f"/proc/self/fd/{of}")
    return os.path.join(_path(folder) if folder is not None else "", os.fspath(of))


def _content(path):
    return "folder" if stat.S_ISDIR(os.lstat(path).st_mode) else Path(path).read_bytes()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# -- one point -------------------------------------------------------------------------------------


def forked(work):
    """The exit status of `work()` in a child: 0, RAISED for an error of ours, -9 if killed."""
    gc.freeze()  # else the child's first collection copies every page
    child = os.fork()
    if child == 0:
        gc.disable()
        code = 3
        try:
            work()
            code = 0
        except EdgeError:
            code = RAISED
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Bench:
    """Points of one operation, on copies of one state."""

    def __init__(self, folder: Path, name: str):
        self.name, self.state = name, folder / "state"
        prepare, self.operation = OPERATIONS[name]
        shutil.rmtree(self.state, ignore_errors=True)
        prepare(Store(self.state))
        self.files = files_of(self.state) if self.state.exists() else {}
        self.before = view(self.state)
        self.calls = self.traced(folder / "calls")
        self.after = view(self.state)

    def traced(self, path):
        def work():
            fault = Fault()
            fault.install()
            self.operation(Store(self.state))
            for name, call in REAL.items():
                setattr(os, name, call)
            path.write_text(" ".join(fault.names))

        restore(self.state, self.files)
        assert forked(work) == 0, f"{self.name} fails without any fault"
        return path.read_text().split()

    def points(self):
        """(number of the call, its name, what happens there)."""
        for k, name in enumerate(self.calls, 1):
            for what in ANY + (WRITES if "write" in name else ()):
                yield k, name, what
        for what in POWER_CUTS:
            yield len(self.calls) + 1, "returned", what

    def attempt(self, k, what):
        """(how the child ended, what is wrong afterwards or None)."""

        def work():
            fault = Fault(k, what)
            fault.install()
            self.operation(Store(self.state))
            fault.lose()  # what has returned must last

        restore(self.state, self.files)
        code = forked(work)
        ended = {0: "done", RAISED: "raised", -9: "killed"}.get(code)
        if ended is None:
            return "crashed", f"the operation ended with {code}"
        try:
            found = view(self.state)
            wrong = in_between(found, self.before, self.after)
            if not wrong and ended == "done" and found != self.after:
                wrong = f"it returned without an error, but shows {found}"
            return ended, wrong or still_works(self.state, found.used)
        except Exception as error:
            return ended, f"it can't be loaded: {type(error).__name__}: {error}"


def still_works(state, used):
    """None where another head can be committed and taken back, else what is wrong."""
    commit(Store(state), 9)
    if loaded(state) != 9:
        return f"after another commit {loaded(state)} is in use"
    Store(state).rollback(BASE)
    if loaded(state) != used:
        return f"after taking it back {loaded(state)} is in use, not {used}"
    return None


def inject(folder: Path, step: int = 1, say=lambda text: None) -> dict[str, dict]:
    """Every `step`-th point of every operation, and all power cuts after it returned.

    Gives counts per operation, and the failures in words.
    """
    found, n = {}, 0
    for name in OPERATIONS:
        bench = Bench(folder, name)
        counts = {"calls": len(bench.calls), "points": 0, "done": 0, "raised": 0, "killed": 0}
        counts |= {"crashed": 0, "bad": []}
        for k, call, what in bench.points():
            n += 1
            if n % step and call != "returned":
                continue
            ended, wrong = bench.attempt(k, what)
            counts["points"] += 1
            counts[ended] += 1
            if wrong:
                counts["bad"].append(f"{name}, call {k} ({call}), {what}: {wrong}")
        found[name] = counts
        say(f"{name}: {counts['points']} points, {len(counts['bad'])} bad")
    return found


# -- damaged files ---------------------------------------------------------------------------------


def damages(data: bytes, rng, n: int):
    """(what, damaged bytes) for one file: flipped bits, cuts, zeros, lost."""
    for at in sorted({0, len(data) - 1, *rng.integers(len(data), size=n).tolist()}):
        bad = bytearray(data)
        bad[at] ^= 1 << int(rng.integers(8))
        yield f"bit flipped in byte {at}", bytes(bad)
    for cut in sorted({0, 1, len(data) - 1, *rng.integers(len(data), size=n // 2).tolist()}):
        yield f"cut to {cut} bytes", data[:cut]
    yield "all zeros", bytes(len(data))
    yield "grown", data + b"\0" * 512
    yield "lost", None


def damage(folder: Path, n: int = 24, say=lambda text: None) -> dict[str, dict]:
    """Each file of a state damaged in some 1.5 n ways: the head in use or the one before must load."""
    state = folder / "state"
    shutil.rmtree(state, ignore_errors=True)
    probation(Store(state))
    files, rng = files_of(state), np.random.default_rng(0)
    intact, found = view(state), {}
    for name, data in sorted(files.items()):
        counts = {"points": 0, "unchanged": 0, "fell back": 0, "bad": []}
        for what, bad in damages(data, rng, n) if data else ():
            restore(state, {**files, name: bad} if bad is not None else _without(files, name))
            counts["points"] += 1
            wrong = None
            try:
                seen = view(state)
                counts["unchanged" if seen.used == intact.used else "fell back"] += 1
                if seen.used not in (3, 2) or seen.waiting not in (7, 0):
                    wrong = f"{seen} is neither the head in use nor the one before"
                # A candidate of what is no longer in use must not be offered.
                elif seen.waiting and seen.used != intact.used:
                    wrong = "a stale candidate is offered"
                wrong = wrong or still_works(state, seen.used)
            except Exception as error:
                wrong = f"it can't be loaded: {type(error).__name__}: {error}"
            if wrong:
                counts["bad"].append(f"{name}, {what}: {wrong}")
        found[str(name)] = counts
    say(f"{sum(c['points'] for c in found.values())} damaged files")
    return found


def _without(files, name):
    return {n: data for n, data in files.items() if n != name}


# -- two processes ---------------------------------------------------------------------------------


def contend(folder: Path, rounds: int = 20, say=lambda text: None) -> dict:
    """Two processes change one state while a third reads it; one of them is killed."""
    state = folder / "state"
    shutil.rmtree(state, ignore_errors=True)
    rng = np.random.default_rng(1)
    counts = {"rounds": rounds, "reads": 0, "changes": 0, "busy": 0, "bad": []}
    for _ in range(rounds):
        reader, writer = os.pipe()
        children = [_changer(state, seed, writer) for seed in rng.integers(1 << 30, size=2)]
        os.close(writer)
        deadline = float(rng.uniform(0.02, 0.12))
        with open(reader, "rb") as pipe:
            began = time.monotonic()
            while time.monotonic() - began < 0.25:
                if time.monotonic() - began > deadline:
                    os.kill(children[0], signal.SIGKILL)
                    deadline = np.inf
                try:
                    view(state)
                    counts["reads"] += 1
                except Exception as error:
                    counts["bad"].append(f"a reader: {type(error).__name__}: {error}")
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            told = pipe.read()
        counts["changes"] += told.count(b"c")
        counts["busy"] += told.count(b"b")
        counts["bad"] += ["a writer failed"] * told.count(b"x")
        if wrong := still_works(state, loaded(state)):
            counts["bad"].append(wrong)
    say(f"{counts['reads']} reads between {counts['changes']} changes, {counts['busy']} busy")
    return counts


def _changer(state, seed, pipe):
    child = os.fork()
    if child:
        return child
    rng, told = np.random.default_rng(seed), b""
    while True:
        store, k = Store(state), int(rng.integers(20, 1 << 20))
        choice = rng.integers(8)
        try:
            if choice < 3:
                commit(store, k, committed=bool(rng.integers(2)))
            elif choice == 3:
                store.rollback(BASE)
            elif choice == 4:
                store.start(BASE)
            elif choice == 5:
                used = store.current(BASE)
                propose(store, k, used.number if used else 0)
            elif choice == 6 and store.candidate(BASE):
                store.approve(BASE)
            else:
                store.journal({"k": k})
            told = b"c"
        except BusyError:
            told = b"b"
        except StateError:  # the other process was faster: nothing to approve
            told = b"s"
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            told = b"x"
        os.write(pipe, told)


# -- stores that are wrong: the bench must notice --------------------------------------------------


def _plain_write(path, data, mode=0o666):
    """In place, and synced: what most programs do."""
    try:
        atomic.write_durable(Path(path), data, mode)
    except OSError as error:
        raise atomic.unwritable(Path(path), error) from error


def _write_unsynced(path, data, mode=0o666):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    os.write(descriptor, data)
    os.close(descriptor)


def _unsealed_unchecked(raw, path):
    try:
        record = json.loads(raw)
        del record["check"]
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise generation.Damaged("no record") from error


class _Same:
    """A hash that is always the same."""

    def hexdigest(self):
        return "0" * 64


MUTANTS = {  # name: (module, attribute, what it becomes)
    "in place": [(m, "write_atomic", _plain_write) for m in (pointer, store_module, ledger)],
    "unsynced files": [(m, "write_durable", _write_unsynced) for m in (atomic, generation)],
    "unsynced folders": [
        (m, "sync_folder", lambda folder: None)
        for m in (atomic, generation, candidate, store_module)
    ],
    "unchecked": [
        (generation, "unsealed", _unsealed_unchecked),
        (generation, "hashlib", SimpleNamespace(sha256=lambda data: _Same())),
    ],
}


@contextlib.contextmanager
def mutant(name):
    """A Store that is wrong in this way, in this process and its children; "" is the right one."""
    changes = MUTANTS[name] if name else []
    kept = [(module, attribute, getattr(module, attribute)) for module, attribute, _ in changes]
    try:
        for change in changes:
            setattr(*change)
        yield
    finally:
        for change in kept:
            setattr(*change)
