"""Break a Store at chosen or random moments; run by test_store.py in its own process.

    store_crash.py kill  FOLDER N     a child commits in a loop, SIGKILL at N random moments
    store_crash.py fault FOLDER       every k-th system call of an operation dies, or raises ENOSPC

Prints one JSON line of counts; any wrong state is an AssertionError.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np

from edgesolve.device import atomic
from edgesolve.device.errors import EdgeError
from edgesolve.device.store import Store

BASE = "a" * 64
CALLS = ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink", "open")


def head(k):
    return {"weights": np.random.default_rng(k).normal(size=(40, 10)).astype(np.float32)}


def commit(store, k):
    return store.commit(head(k), {"n": np.array(k)}, {"bundle_sha256": BASE, "k": k})


def loaded(path):
    """The k of the generation in use (0 = factory), whose bytes are checked."""
    found = Store(path).current(BASE)
    if found is None:
        return 0
    k = found.provenance["k"]
    assert found.arrays["weights"].tobytes() == head(k)["weights"].tobytes(), f"wrong bytes for {k}"
    assert found.statistics["n"] == k
    return k


def kill(path, n):
    rng, interrupted = random.Random(5), 0
    began = time.perf_counter()
    for k in range(1, 6):
        commit(Store(path), k)
    usual = (time.perf_counter() - began) / 5
    for _ in range(n):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            store = Store(path)
            os.write(writer, b"!")
            for step in range(k + 1, k + 10_000):
                commit(store, step)
                os.write(writer, struct.pack("q", step))
            os._exit(0)
        os.close(writer)
        os.read(reader, 1)  # its first sign of life: under emulation a fork takes long
        time.sleep(rng.uniform(0, 3 * usual))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reader, "rb") as pipe:
            acknowledged = pipe.read()
        last = struct.unpack("q", acknowledged[-8:])[0] if acknowledged else k
        k = loaded(path)
        assert k in (last, last + 1), f"commit {last} returned, generation {k} is in use"
        interrupted += any((path / "generations").glob("*.tmp"))
    return {"kills": n, "commits": k, "interrupted_writes": interrupted}


class Fault:
    """Dies, or raises ENOSPC, at the k-th counted system call; a torn write counts as one."""

    def __init__(self, k, dies):
        self.left, self.dies = k, dies

    def hit(self):
        self.left -= 1
        if self.left == 0:
            if self.dies:
                os._exit(77)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def install(self):
        for name in CALLS:
            setattr(os, name, self.wrapped(getattr(os, name)))
        atomic.open = self.opened

    def wrapped(self, call):
        def counted(*args, **options):
            self.hit()
            return call(*args, **options)

        return counted

    def opened(self, path, mode):
        file = open(path, mode, buffering=0)
        if "w" not in mode:
            return file
        fault = self

        class Torn:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                file.write(data[: len(data) // 2])
                fault.hit()
                file.write(data[len(data) // 2 :])

            def flush(self):
                fault.hit()

            def fileno(self):
                return file.fileno()

        return Torn()


OPERATIONS = {  # name: (what it does, the k in use before, those allowed after)
    "first commit": (lambda store: commit(store, 1), 0, 1),
    "commit": (lambda store: commit(store, 6), 5, 6),
    "rollback": (lambda store: store.rollback(BASE), 5, 4),
    "factory_reset": (lambda store: store.factory_reset(), 5, 0),
    "journal": (lambda store: store.journal({"decision": "kept"}), 5, 5),
}


def attempt(path, name, fault):
    """Run the operation under `fault` on a copy of the state; True if the fault ended it."""
    operation, before, after = OPERATIONS[name]
    state = path / "state"
    shutil.rmtree(state, ignore_errors=True)
    if (path / "origin").exists():
        shutil.copytree(path / "origin", state)
    child = os.fork()
    if child == 0:
        fault.install()
        try:
            operation(Store(state))
        except EdgeError:
            os._exit(77)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = loaded(state)
    # Success after a fault: only a courtesy failed, such as deleting old generations.
    assert found in ((before, after) if code == 77 else (after,)), f"{name}: exit {code}, {found}"
    # Whatever happened, the next update must work.
    assert commit(Store(state), 9) and loaded(state) == 9
    return code == 77


def fault(path):
    counts = {}
    for name, (_, before, _) in OPERATIONS.items():
        origin = path / "origin"
        shutil.rmtree(origin, ignore_errors=True)
        for k in range(1, before + 1):
            commit(Store(origin), k)
        calls = next(k for k in itertools.count(1) if not attempt(path, name, Fault(k, True))) - 1
        raised = sum(attempt(path, name, Fault(k, False)) for k in range(1, calls + 1))
        counts[name] = {"calls": calls, "raised": raised}
    return counts


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    print(json.dumps(kill(folder, int(sys.argv[3])) if sys.argv[1] == "kill" else fault(folder)))
