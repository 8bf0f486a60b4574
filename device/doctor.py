"""`edgesolve doctor`: can this machine run, recalibrate and be measured, and if not, what to do.

Runtimes are imported in subprocesses: one that was built for another CPU dies there, not here.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgesolve.device import board
from edgesolve.device.errors import BackendError
from edgesolve.device.warmup import cache_folder, writable

OK, WARN, FAULT, UNKNOWN = "ok", "warn", "fault", "not measured"
# Module to import, and the name that pip knows it by; the first that works serves.
RUNTIMES = {
    "onnxruntime": "onnxruntime",
    "ai_edge_litert.interpreter": "ai-edge-litert",
    "tflite_runtime.interpreter": "tflite-runtime",
}
# (package, version, core): what it does there, and a version that works.
KNOWN_BAD = {
    ("onnxruntime", "1.21.0", "Cortex-A72"): (
        "dies of SIGILL on this core (onnxruntime issue 23957): pip install 'onnxruntime>=1.22'"
    ),
}
_COMPILE = (
    "import time, numba; began = time.perf_counter()\n"
    "assert numba.njit(lambda x: x + 1)(1) == 2\n"
    "print(f'{numba.__version__}, {time.perf_counter() - began:.1f} s to compile a function')"
)
_TIMEOUT_S = 120
_FREE_MIB = 64
_RELEASED = 1_767_225_600  # 2026-01-01: no right clock is before this release


@dataclass(frozen=True, slots=True)
class Check:
    """One question: `status` is ok, warn, fault or "not measured"; `advice` is empty when ok."""

    name: str
    status: str
    found: str
    advice: str = ""


def checks(state: str | Path = ".", root: Path = board.ROOT) -> list[Check]:
    """Everything looked at, in the order of a report; seconds, as runtimes are imported.

    `state`: the folder whose disk must have room. `root`: the tree that the board is read from.
    """
    return [
        *_runtimes(root),
        _numba(),
        _cache(),
        _sixty_four_bits(),
        _glibc(),
        _page_size(),
        _governor(root),
        _throttling(root),
        _swap(root),
        _disk(Path(state)),
        _clock(time.time()),
    ]


def _runtimes(root: Path) -> Iterator[Check]:
    found = [_runtime(module, package, root) for module, package in RUNTIMES.items()]
    yield from found
    if all(check.status != OK for check in found):
        advice = "pip install 'edgesolve[onnx]', or 'edgesolve[litert]'."
        yield Check("runtime", FAULT, "none works", advice)


def _runtime(module: str, package: str, root: Path) -> Check:
    version, numpy = board.version(package), board.version("numpy") or "0"
    if version is None:
        return Check(package, UNKNOWN, "not installed", "Fine, if another runtime is.")
    bad = KNOWN_BAD.get((package, version, board.core(root)))
    if bad is not None:
        return Check(package, FAULT, version, f"{package} {version} {bad}.")
    if package == "tflite-runtime" and int(numpy.split(".")[0]) >= 2:
        advice = (
            f"tflite-runtime {version} was built for NumPy 1; found NumPy {numpy}: "
            "pip install ai-edge-litert, or 'numpy<2'."
        )
        return Check(package, FAULT, version, advice)
    failure, _ = in_subprocess(f"import {module}")
    if failure:
        advice = f"Install another version of {package}, or remove it and use another runtime."
        return Check(package, FAULT, f"{version}: {failure}", advice)
    return Check(package, OK, version)


def _numba() -> Check:
    if board.version("numba") is None:
        return Check(
            "numba", WARN, "not installed", "NumPy solves instead, slower: pip install numba."
        )
    failure, said = in_subprocess(_COMPILE)
    if failure:
        advice = "Set EDGESOLVE_NUMBA=0: NumPy gives the same answers, slower."
        return Check("numba", WARN, failure, advice)
    return Check("numba", OK, said)


def _cache() -> Check:
    folder = cache_folder()
    try:
        writable(folder)
    except BackendError as error:
        return Check("numba cache", WARN, str(folder), str(error))
    return Check("numba cache", OK, str(folder))


def _sixty_four_bits() -> Check:
    if sys.maxsize > 2**32:
        return Check("64-bit", OK, "yes")
    advice = "onnxruntime, LiteRT and numba have no 32-bit packages: install the 64-bit system."
    return Check("64-bit", FAULT, "32-bit Python", advice)


def _glibc() -> Check:
    found = board.glibc()
    if found is None:
        advice = "The runtimes' packages need glibc: use Debian, Raspberry Pi OS or JetPack."
        return Check("glibc", FAULT, "another C library", advice)
    if tuple(int(part) for part in found.split(".")[:2]) < (2, 28):
        advice = "onnxruntime's packages need glibc 2.28, LiteRT's 2.27: update the system."
        return Check("glibc", WARN, found, advice)
    return Check("glibc", OK, found)


def _page_size() -> Check:
    size = os.sysconf("SC_PAGE_SIZE")
    if size in (4096, 16384):
        return Check("page size", OK, f"{size} bytes")
    return Check("page size", WARN, f"{size} bytes", "Packages are built for 4 or 16 KiB pages.")


def _governor(root: Path) -> Check:
    governor = board.clocks(root)["governor"]
    if governor is None:
        return Check("governor", UNKNOWN, "no cpufreq", "Clock changes can't be seen here.")
    if governor == "performance":
        return Check("governor", OK, governor)
    advice = (
        "For steady latencies: echo performance | sudo tee "
        "/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
    )
    return Check("governor", WARN, governor, advice)


def _throttling(root: Path) -> Check:
    limits = board.throttled(root, since_boot=True)
    heat = board.temperature_c(root)
    degrees = "" if heat is None else f" at {heat:.0f} °C"
    if limits is None:
        return Check(
            "throttling", UNKNOWN, f"no sensor{degrees}", "Watch the temperature yourself."
        )
    if not limits:
        return Check("throttling", OK, f"none since boot{degrees}")
    weak = "under_voltage" in limits
    advice = "Use the board's own power supply." if weak else "Add a heat sink or a fan."
    return Check("throttling", WARN, ", ".join(limits) + degrees, advice)


def _swap(root: Path) -> Check:
    areas = board.swap(root)
    if areas is None:
        return Check("swap", UNKNOWN, "unknown", "/proc/swaps can't be read.")
    on_disk = [area["name"] for area in areas if "zram" not in area["name"]]
    if on_disk:
        advice = "Swapping wears a card and stalls inference: prefer zram."
        return Check("swap", WARN, ", ".join(on_disk), advice)
    return Check("swap", OK, "zram" if areas else "none")


def _disk(state: Path) -> Check:
    # The state folder may not exist yet: its disk is that of the nearest folder that does.
    folder = next(p for p in (state.absolute(), *state.absolute().parents) if p.exists())
    free_mib = shutil.disk_usage(folder).free / 2**20
    if free_mib < _FREE_MIB:
        advice = f"A recalibration needs up to {_FREE_MIB} MiB: delete something."
        return Check("free disk", FAULT, f"{free_mib:.0f} MiB at {folder}", advice)
    return Check("free disk", OK, f"{free_mib:.0f} MiB at {folder}")


def _clock(now: float) -> Check:
    found = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if now < _RELEASED:
        advice = "The journal's times will be wrong: wait for NTP, or add a clock battery."
        return Check("clock", WARN, found, advice)
    return Check("clock", OK, found)


def in_subprocess(script: str) -> tuple[str, str]:
    """(what went wrong, "" if nothing; what it printed) of a Python script in its own process."""
    try:
        done = subprocess.run(
            [*board.python_command(), "-c", script],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_TIMEOUT_S} s", ""
    # A shell or an emulator reports a signal as 128 + its number.
    number = -done.returncode if done.returncode < 0 else done.returncode - 128
    if number > 0:
        try:
            return f"died of {signal.Signals(number).name}", done.stdout.strip()
        except ValueError:
            return f"ended with status {done.returncode}", done.stdout.strip()
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it said nothing"])[-1], done.stdout.strip()
    return "", done.stdout.strip()
