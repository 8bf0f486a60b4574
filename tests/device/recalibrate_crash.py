"""Kill `recalibrate` at chosen or random moments; run by test_kill.py in its own process.

    recalibrate_crash.py fault BUNDLE FRAMES.npy FOLDER STEP    die at every STEP-th durable system call
    recalibrate_crash.py kill  BUNDLE FRAMES.npy FOLDER N       SIGKILL at N random moments

Each is done from a generation that is in force and, where that isn't too slow, from the factory head. Prints
one JSON line of counts; any answer that is neither the old nor the new head's is an AssertionError.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np

from edgesolve.device import recalibrate
from edgesolve.device.bundle import open_bundle
from edgesolve.device.runtime import choose_backend, open_runtime
from edgesolve.device.store import Store

CALLS = ("fsync", "replace", "rename")
DIED = 77


def forked(work) -> int:
    """The exit code of `work()` in a child, which owns whatever a runtime starts; -9 if killed."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(work() or 0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Crash:
    def __init__(self, bundle: Path, frames: np.ndarray, folder: Path):
        self.bundle, self.frames, self.folder = bundle, frames, folder
        self.state = folder / "state"
        self.other = np.clip(frames.astype(np.float32) * 0.5 + 60, 0, 255).astype(np.uint8)

    def recalibrate(self, frames=None) -> None:
        x = self.frames if frames is None else frames
        report = recalibrate.run(self.bundle, x, None, state=self.state)
        assert report["decision"] == "accepted", report["reason"]

    def logits(self) -> bytes:
        return open_runtime(self.bundle, state=self.state).logits(self.frames[:2]).tobytes()

    def remember(self, name: str) -> None:
        assert forked(lambda: (self.folder / name).write_bytes(self.logits()) and 0) == 0

    def prepare(self, generations: int) -> None:
        """An origin with 0 or 1 generations, and the answers before and after one more."""
        shutil.rmtree(self.state, ignore_errors=True)
        if generations:
            assert forked(lambda: self.recalibrate(self.other)) == 0
        self.remember("old")
        shutil.rmtree(self.folder / "origin", ignore_errors=True)
        if generations:
            shutil.copytree(self.state, self.folder / "origin")
        assert forked(self.recalibrate) == 0
        self.remember("new")
        assert (self.folder / "old").read_bytes() != (self.folder / "new").read_bytes()

    def restart(self) -> None:
        shutil.rmtree(self.state, ignore_errors=True)
        if (self.folder / "origin").exists():
            shutil.copytree(self.folder / "origin", self.state)

    def which(self) -> str:
        """ "old" or "new": whose answers the state gives now, bit for bit; and it can still learn."""

        def look() -> int:
            found = self.logits()
            names = [n for n in ("old", "new") if (self.folder / n).read_bytes() == found]
            assert len(names) == 1, "the answers are neither the old head's nor the new one's"
            with Store(self.state).lock():  # no lock was left behind
                return 10 + ["old", "new"].index(names[0])

        code = forked(look)
        assert code in (10, 11), f"after the kill the state can't be used: exit {code}"
        return ("old", "new")[code - 10]

    def die_at(self, k: int) -> int:
        """Recalibrate in a child that ends without a word at the k-th counted call."""

        def work() -> None:
            left = k

            def counted(call):
                def wrapped(*args, **options):
                    nonlocal left
                    left -= 1
                    if left == 0:
                        os._exit(DIED)
                    return call(*args, **options)

                return wrapped

            for name in CALLS:
                setattr(os, name, counted(getattr(os, name)))
            self.recalibrate()

        self.restart()
        return forked(work)

    def fault(self, step: int) -> dict:
        seen, k = [], 1
        while (code := self.die_at(k)) != 0:
            assert code == DIED, f"call {k}: exit {code}"
            seen.append(self.which())
            k += step
        assert self.which() == "new"
        # Before the first pointer exists, a finished generation alone already counts.
        if (self.folder / "origin").exists():
            assert seen == sorted(seen, reverse=True), f"the new head came and went: {seen}"
        return {"died": len(seen), "old": seen.count("old"), "new": seen.count("new")}

    def kill(self, n: int) -> dict:
        rng, seen, killed = random.Random(5), [], 0
        self.restart()
        began = time.perf_counter()
        assert forked(self.recalibrate) == 0
        usual = time.perf_counter() - began
        for _ in range(n):
            self.restart()
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                os.write(writer, b"!")
                self.recalibrate()
                os._exit(0)
            os.read(reader, 1)  # its first sign of life
            time.sleep(rng.uniform(0, 1.1 * usual))
            os.kill(child, signal.SIGKILL)
            killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            os.close(reader)
            os.close(writer)
            seen.append(self.which())
        return {"kills": n, "killed": killed, "old": seen.count("old"), "new": seen.count("new")}


def main() -> None:
    how, bundle, frames, folder, n = sys.argv[1:]
    # Imported before the forks, so that no child pays for it; no session exists in this process.
    if choose_backend(open_bundle(bundle)) == "onnx":
        import onnxruntime  # noqa: F401
    else:
        import ai_edge_litert.interpreter  # noqa: F401
    found = {}
    for generations in (1,) if os.environ.get("EDGESOLVE_EMULATED") == "1" else (1, 0):
        crash = Crash(Path(bundle), np.load(frames), Path(folder))
        crash.prepare(generations)
        found[generations] = getattr(crash, how)(int(n))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
