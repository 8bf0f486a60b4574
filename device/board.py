"""The machine a figure belongs to: what the kernel says about board, clocks, heat and memory.

Everything is read from files below `root`, so that a recorded tree stands in for a board. What a
machine doesn't tell is None, never a guess.
"""

from __future__ import annotations

import os
import platform
import resource
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path("/")
PACKAGES = ("numpy", "numba", "onnxruntime", "ai-edge-litert", "tflite-runtime")
# Bits of the Raspberry Pi firmware's get_throttled; the same plus 16 means "since boot".
THROTTLE_BITS = {0: "under_voltage", 1: "frequency_capped", 2: "throttled", 3: "soft_temp_limit"}
# The rail that carries everything, as the Jetson's device trees name it.
_INPUT_RAILS = ("VDD_IN", "POM_5V_IN")
# ARM's part numbers (MIDR_EL1) of the cores of the supported boards.
_ARM_CORES = {
    "0xd03": "Cortex-A53",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd42": "Cortex-A78AE",
}


def environment(root: Path = ROOT, threads: int | None = None) -> dict[str, Any]:
    """What a benchmark row must carry: board, system, clocks, heat, memory, versions.

    Units are in the names; `throttled` lists what the firmware says now, `throttled_since_boot`
    what it remembers. Reads files only; imports no runtime.
    """
    return {
        "board": model(root),
        "soc": soc(root),
        "core": core(root),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "kernel": _text(root / "proc/sys/kernel/osrelease"),
        "os": _os_name(root),
        "glibc": glibc(),
        "page_size": os.sysconf("SC_PAGE_SIZE"),
        **clocks(root),
        "temperature_c": temperature_c(root),
        "throttled": throttled(root, since_boot=False),
        "throttled_since_boot": throttled(root, since_boot=True),
        "nvpmodel": _text(root / "var/lib/nvpmodel/status"),
        "emc_hz": _number(root / "sys/kernel/debug/bpmp/debug/clk/emc/rate"),
        "memory_mib": _meminfo_mib(root, "MemTotal"),
        "available_mib": _meminfo_mib(root, "MemAvailable"),
        "swap": swap(root),
        "load": load(root),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "threads": threads,
        "emulated": os.environ.get("EDGESOLVE_EMULATED") == "1",
    }


def model(root: Path = ROOT) -> str | None:
    """The board's name as its device tree has it ("Raspberry Pi 4 Model B Rev 1.5")."""
    return _text(root / "proc/device-tree/model")


def soc(root: Path = ROOT) -> str | None:
    """The chip: the last device-tree name ("brcm,bcm2711"), or the CPU's name on a PC."""
    compatible = _text(root / "proc/device-tree/compatible")
    if compatible:
        return compatible.split("\0")[-1]
    return _cpuinfo(root, "model name")


def core(root: Path = ROOT) -> str | None:
    """The ARM core ("Cortex-A72"), or its part number where we don't know the name."""
    part = _cpuinfo(root, "CPU part")
    return _ARM_CORES.get(part, part)


def clocks(root: Path = ROOT) -> dict[str, Any]:
    """Governor, and lowest, highest and present frequency of the first CPU, in MHz."""
    folder = root / "sys/devices/system/cpu/cpu0/cpufreq"
    found: dict[str, Any] = {"governor": _text(folder / "scaling_governor")}
    for name in ("scaling_min", "scaling_max", "scaling_cur", "cpuinfo_max"):
        kilohertz = _number(folder / f"{name}_freq")
        found[f"{name}_mhz"] = None if kilohertz is None else kilohertz / 1000
    return found


def temperature_c(root: Path = ROOT) -> float | None:
    """The hottest thermal zone, in °C."""
    zones = (root / "sys/class/thermal").glob("thermal_zone*/temp")
    found = [value for zone in zones if (value := _number(zone)) is not None]
    return max(found) / 1000 if found else None


def throttled(root: Path = ROOT, *, since_boot: bool) -> list[str] | None:
    """What limits a Raspberry Pi's clocks now, or did since boot; None where nothing tells.

    From the firmware's file, else from the `rpi_volt` sensor, which knows under-voltage alone.
    """
    text = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    if text is not None:
        bits = int(text, 16) >> (16 if since_boot else 0)
        return [name for bit, name in THROTTLE_BITS.items() if bits >> bit & 1]
    for folder in (root / "sys/class/hwmon").glob("hwmon*"):
        if _text(folder / "name") == "rpi_volt" and since_boot:
            return ["under_voltage"] if _number(folder / "in0_lcrit_alarm") else []
    return None


def under_voltage(root: Path = ROOT) -> bool | None:
    """Whether a Raspberry Pi's supply sags now: the firmware's file, else the `rpi_volt` sensor; None: not told."""
    flags = throttled(root, since_boot=False)
    if flags is not None:
        return "under_voltage" in flags
    for folder in _sensors(root, "rpi_volt"):
        return bool(_number(folder / "in0_lcrit_alarm"))
    return None


def watts(root: Path = ROOT) -> float | None:
    """What the whole board draws, by a Jetson's INA3221 on its input rail; None without such a sensor."""
    for folder in _sensors(root, "ina3221"):
        for label in sorted(folder.glob("in*_label")):
            channel = label.name[2:-6]
            millivolt = _number(folder / f"in{channel}_input")
            milliampere = _number(folder / f"curr{channel}_input")
            if _text(label) in _INPUT_RAILS and None not in (millivolt, milliampere):
                return millivolt * milliampere / 1e6
    return None


def battery(root: Path = ROOT) -> dict[str, Any] | None:
    """`percent` and `discharging` of the emptiest battery that feeds the board, None where there is none."""
    found = []
    for folder in (root / "sys/class/power_supply").glob("*"):
        if _text(folder / "type") != "Battery" or _text(folder / "scope") == "Device":
            continue  # a mouse's battery feeds a mouse
        percent = _number(folder / "capacity")
        if percent is not None:
            found.append((percent, _text(folder / "status") == "Discharging"))
    return dict(zip(("percent", "discharging"), min(found), strict=True)) if found else None


def available_mib(root: Path = ROOT) -> float | None:
    """Memory that a new process can have without swapping, in MiB."""
    return _meminfo_mib(root, "MemAvailable")


def disk_free_mib(path: Path) -> float | None:
    """Room for an ordinary user on the file system that `path` lies on or would lie on, in MiB."""
    for folder in (path, *path.absolute().parents):
        try:
            found = os.statvfs(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return found.f_bavail * found.f_frsize / (1 << 20)
    return None


def swap(root: Path = ROOT) -> list[dict[str, Any]] | None:
    """The swap areas in use: `name`, `size_mib`, `used_mib`."""
    text = _text(root / "proc/swaps")
    if text is None:
        return None
    rows = [line.split() for line in text.splitlines()[1:]]
    return [
        {"name": row[0], "size_mib": int(row[2]) / 1024, "used_mib": int(row[3]) / 1024}
        for row in rows
        if len(row) >= 4
    ]


def load(root: Path = ROOT) -> float | None:
    """Runnable processes, averaged over the last minute."""
    text = _text(root / "proc/loadavg")
    return float(text.split()[0]) if text else None


def glibc() -> str | None:
    """The C library's version ("2.36"), None if it isn't glibc."""
    name, found = platform.libc_ver()
    return found if name == "glibc" else None


def version(package: str) -> str | None:
    """The installed version, from its metadata: nothing is imported."""
    from importlib import metadata  # slow to import, and needed by a benchmark alone

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def rss_mib(root: Path = ROOT) -> float | None:
    """Memory this process has resident now, in MiB."""
    return _status_mib(root, "VmRSS")


def swapped_mib(root: Path = ROOT) -> float | None:
    """Memory of this process that lies in swap, in MiB."""
    return _status_mib(root, "VmSwap")


def shared_memory_mib(root: Path = ROOT) -> dict[str, float | None]:
    """`pss` (shared pages divided among their users) and `private_dirty` of this process, MiB."""
    text = _text(root / "proc/self/smaps_rollup")
    names = {"pss": "Pss", "private_dirty": "Private_Dirty"}
    return {name: _kib_as_mib(_field(text, key)) for name, key in names.items()}


def peak_rss_mib() -> float:
    """The most memory this process ever had resident, in MiB."""
    # VmHWM first: ru_maxrss starts at the size of the process that forked this one.
    peak = _status_mib(ROOT, "VmHWM")
    return peak if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def python_command() -> list[str]:
    """How to start another Python: this one, or EDGESOLVE_PYTHON (an emulator with its options)."""
    return shlex.split(os.environ.get("EDGESOLVE_PYTHON", "")) or [sys.executable]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _sensors(root: Path, name: str) -> list[Path]:
    folders = sorted((root / "sys/class/hwmon").glob("hwmon*"))
    return [folder for folder in folders if _text(folder / "name") == name]


def _number(path: Path) -> int | None:
    try:
        return int(_text(path) or "")
    except ValueError:
        return None


def _field(text: str | None, name: str) -> str | None:
    for line in (text or "").splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return None


def _cpuinfo(root: Path, name: str) -> str | None:
    return _field(_text(root / "proc/cpuinfo"), name)


def _meminfo_mib(root: Path, name: str) -> float | None:
    return _kib_as_mib(_field(_text(root / "proc/meminfo"), name))


def _status_mib(root: Path, name: str) -> float | None:
    return _kib_as_mib(_field(_text(root / "proc/self/status"), name))


def _kib_as_mib(found: str | None) -> float | None:
    return int(found.split()[0]) / 1024 if found else None


def _os_name(root: Path) -> str | None:
    for line in (_text(root / "etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return None
