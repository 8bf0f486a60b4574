"""What `edgesolve serve` promises: inference goes on while it adapts, and a week leaves no trace but its heads.

    make bench-service                                  half an hour
    python benchmarks/bench_service.py --only week --frames 20000
    python benchmarks/bench_service.py --bundle resnet20.bundle --data test.npz

The bundle is built from the test suite's tiny network unless one is given; its data must hold x (n, h, w, c). The week
runs on a clock of its own: a second a frame, that keeps real time while a child process adapts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
from environment import ROOT, say
from figures import Figure, at_most
from measure import measure, parsed, parser

from edgesolve.device import learner, service, snapshot
from edgesolve.device.adapt import Options
from edgesolve.device.audit import audit
from edgesolve.device.board import rss_mib
from edgesolve.device.bundle import Bundle, open_bundle
from edgesolve.device.policy import Policy
from edgesolve.device.resources import Limits
from edgesolve.device.sources import Item, SourceEnded
from edgesolve.device.store import Store

FREE = Limits(min_available_mib=0.0, min_disk_mib=0.0)
DAY_S, HALF_DAY_S = 86400, 43200
WEEK = 600_000


@dataclass(frozen=True)
class Bench:
    """`clean`, `shifted`: lists of frames."""

    bundle: Bundle
    clean: list[np.ndarray]
    shifted: list[np.ndarray]
    frames: int
    repeats: int


class Endless:
    """Frames from `at(number)` until it gives None."""

    def __init__(self, at):
        self.at, self.number = at, 0

    def next(self, timeout):
        frame = self.at(self.number)
        if frame is None:
            raise SourceEnded("enough")
        self.number += 1
        return Item(str(self.number), frame)

    def close(self):
        pass


def p99(bench: Bench) -> tuple[list[Figure], dict]:
    """Inference back to back, without a child process and while one adapts after the other, by turns."""
    times: dict[bool, list[float]] = {False: [], True: []}
    events: list[dict] = []
    with tempfile.TemporaryDirectory() as state:
        policy = Policy(mode="observe", look_every_s=1e9)
        made = _service(bench, state, policy, events)
        frames = bench.shifted
        for i in range(256):
            made.learner.see(frames[i % len(frames)])
        for _ in range(bench.repeats):
            _idle(made)
            times[False] += _answered(made, frames, 400)
            made.learner.child = None
            made.learner._start("show", made.learner.options.solve)
            times[True] += _answered(made, frames, 0, while_adapting=True)
            made.learner.child = None
        made.learner.close()
    quiet, busy = (1e3 * np.percentile(times[k], 99) for k in (False, True))
    middle = np.median(times[True]) / np.median(times[False])
    n = f"{len(times[False]):,} and {len(times[True]):,} answers"
    return [
        at_most("p99 of inference while adapting, over without", busy / quiet, 1.5, " times",
                baseline=f"{quiet:.2f} ms alone, {busy:.2f} ms; {n}"),
        at_most("median, likewise", middle, 1.5, " times"),
    ], {}  # fmt: skip


def week(bench: Bench) -> tuple[list[Figure], dict]:
    """A week at a frame a second: the sensor shifts every twelve hours, the service adapts by itself."""
    clock = SimpleNamespace(now=1e6, started=1.79e9)
    fake = SimpleNamespace(
        monotonic=lambda: clock.now,
        time=lambda: clock.started + clock.now,
        perf_counter=time.perf_counter,
        sleep=time.sleep,
    )
    events: list[dict] = []
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as state, _clocks(fake):
        policy = Policy(mode="auto", look_every_s=3600.0, min_interval_s=3600.0)
        made = _service(bench, state, policy, events)

        def at(number: int):
            if number >= bench.frames:
                return None
            if made.learner.child is None:
                clock.now += WEEK / bench.frames * 1.0
            else:
                clock.now += 0.25
                time.sleep(0.25)  # a child takes seconds: few frames pass meanwhile
            if number % (bench.frames // 50 or 1) == 0:
                memory.append(rss_mib())
                say(
                    f"  {number:,} frames, {memory[-1]:.0f} MiB, generation {made.status()['generation']}"
                )
            late = int(clock.now % DAY_S) >= HALF_DAY_S
            pool = bench.shifted if late else bench.clean
            return pool[number % len(pool)]

        with mock.patch.object(service, "open_source", lambda *_, **__: Endless(at)):
            began = time.perf_counter()
            made.run()
            seconds = time.perf_counter() - began
        status, store = made.status(), Store(state)
        found = audit(bench.bundle, store)
        kept = store.current(bench.bundle.sha256)
        on_disk = sum(p.stat().st_size for p in Path(state).rglob("*") if p.is_file()) / 2**20
    count = {k: sum(e["event"] == k for e in events) for k in ("accepted", "rollback", "committed")}
    written = status["written_total_mib"] / (WEEK / DAY_S)
    half = len(memory) // 5
    growth = max(memory[half:]) - memory[half]
    return [
        at_most(f"memory after the first fifth of {bench.frames:,} frames", growth, 8.0, " MiB more",
                baseline=f"{memory[half]:.0f} MiB then, {max(memory):.0f} MiB at most; {seconds:.0f} s in all"),
        at_most("written a day", written, status["write_budget_mib"], " MiB",
                baseline=f"{count['accepted']} updates, {count['rollback']} rollbacks, {on_disk:.1f} MiB on the card"),
        Figure("generations lost", "none" if kept and found["verdict"] != "differs" else "some", "none",
               bool(kept) and found["verdict"] != "differs",
               baseline=f"audit: {found['verdict']}, generation {kept.number if kept else '-'} in force"),
    ], {"events": count, "memory_mib": memory}  # fmt: skip


def _service(bench: Bench, state: str, policy: Policy, events: list[dict]) -> service.Service:
    options = service.ServeOptions(
        source="bench",
        state=Path(state),
        device="bench",
        policy=policy,
        adapt=Options(max_frames=256, again=False),
        limits=FREE,
        probation_s=900.0,
    )
    return service.Service(bench.bundle, options, events.append)


@contextlib.contextmanager
def _clocks(fake):
    """`fake` in place of the service's own clocks, and of none of the child processes'."""
    with contextlib.ExitStack() as stack:
        for module in (learner, service, snapshot):
            stack.enter_context(mock.patch.object(module, "time", fake))
        yield


def _idle(made: service.Service) -> None:
    if made.learner.child is not None:
        made.learner.child.close()


def _answered(made, frames, n: int, while_adapting: bool = False) -> list[float]:
    """Seconds of each of `n` answers, or of all until the child has ended."""
    took: list[float] = []
    child = made.learner.child
    while len(took) < n or while_adapting:
        began = time.perf_counter()
        made.inference.answer(frames[len(took) % len(frames)])
        took.append(time.perf_counter() - began)
        if while_adapting and child.poll() is not None:
            return took
    return took


def _arguments() -> argparse.Namespace:
    p = parser(__doc__, SECTIONS)
    p.add_argument("--bundle", type=Path, help="instead of the tiny one")
    p.add_argument("--data", type=Path, help=".npz with x, frames of --bundle")
    p.add_argument("--frames", type=int, default=0, help=f"of the week (default {WEEK:,})")
    args = parsed(p, SECTIONS)
    if (args.bundle is None) != (args.data is None):
        p.error("--bundle and --data belong together")
    return args


def _tiny(folder: Path) -> tuple[Path, Path]:
    if not (folder / "bundle").exists():
        say("building the tiny bundle")
        command = [sys.executable, str(ROOT / "tests" / "tiny_bundle.py"), str(folder)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "bundle", folder / "test.npz"


SECTIONS = {"p99": p99, "week": week}


def main() -> None:
    args = _arguments()
    path, data = (args.bundle, args.data) if args.bundle else _tiny(args.out / "tiny")
    with np.load(data) as archive:
        x = archive["x"][:2000]
    shifted = np.clip(x * 0.4 + 100, 0, 255).astype(np.uint8)
    frames = args.frames or (20_000 if args.quick else WEEK)
    bench = Bench(open_bundle(path), list(x), list(shifted), frames, 2 if args.quick else 10)
    record = args.out / "service.json"
    measure(
        SECTIONS, args.only, bench, record, "The service, measured", threads=1, quick=args.quick
    )


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    main()
