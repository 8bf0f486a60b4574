"""Break a Store at chosen or random moments; run by test_store.py in its own process.

    store_crash.py kill    FOLDER N               a child commits in a loop, SIGKILL at N random moments
    store_crash.py fault   FOLDER STEP [MUTANT]   every STEP-th point of store_faults.py
    store_crash.py damage  FOLDER N [MUTANT]      every file damaged in some 1.5 N ways
    store_crash.py contend FOLDER ROUNDS          two processes change what a third reads

Prints one JSON line of counts; with MUTANT the store itself is wrong.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import store_faults
from store_faults import Store, commit, loaded


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


def main():
    how, folder, n, *mutant = sys.argv[1:]
    runs = {
        "kill": lambda: kill(Path(folder), int(n)),
        "fault": lambda: store_faults.inject(Path(folder), int(n)),
        "damage": lambda: store_faults.damage(Path(folder), int(n)),
        "contend": lambda: store_faults.contend(Path(folder), int(n)),
    }
    with store_faults.mutant("".join(mutant)):
        print(json.dumps(runs[how]()))


if __name__ == "__main__":
    main()
