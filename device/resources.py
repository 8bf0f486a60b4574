"""Has the board room for a solve? Limits, what the board says, and the reason to refuse or to pause."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgesolve.device import board

_STRAIN = frozenset({"under_voltage", "throttled", "soft_temp_limit"})


@dataclass(frozen=True, slots=True)
class Limits:
    """A solve starts below `solve_below_c`, pauses above `pause_above_c` and goes on below `resume_below_c`.

    min_available_mib, min_disk_mib: what must be free. max_watts, min_battery (percent, while discharging): None
    for no limit. max_miss_share: of the last inferences, how many may miss their deadline.
    """

    solve_below_c: float = 75.0
    pause_above_c: float = 80.0
    resume_below_c: float = 72.0
    min_available_mib: float = 128.0
    min_disk_mib: float = 64.0
    max_watts: float | None = None
    min_battery: float | None = None
    max_miss_share: float = 0.01

    def __post_init__(self):
        if not self.resume_below_c <= self.pause_above_c:
            raise ValueError(
                f"resume_below_c must not exceed pause_above_c, got {self.resume_below_c} "
                f"and {self.pause_above_c}."
            )


@dataclass(frozen=True, slots=True)
class Readings:
    """What the board and the service say now; None: it doesn't tell. `miss_share` comes from `latency`."""

    temperature_c: float | None = None
    throttled: tuple[str, ...] | None = None
    available_mib: float | None = None
    disk_mib: float | None = None
    watts: float | None = None
    battery: float | None = None  # percent, only while it discharges
    miss_share: float | None = None


def readings(
    root: Path = board.ROOT, state: Path | None = None, miss_share: float | None = None
) -> Readings:
    """Read the board below `root`, and the room on the file system of the folder `state`."""
    flags = board.throttled(root, since_boot=False)
    if flags is None and board.under_voltage(root) is not None:
        flags = ["under_voltage"] if board.under_voltage(root) else []
    charge = board.battery(root)
    return Readings(
        temperature_c=board.temperature_c(root),
        throttled=None if flags is None else tuple(flags),
        available_mib=board.available_mib(root),
        disk_mib=None if state is None else board.disk_free_mib(state),
        watts=board.watts(root),
        battery=charge["percent"] if charge and charge["discharging"] else None,
        miss_share=miss_share,
    )


def refusal(limits: Limits, now: Readings) -> str | None:
    """None, or why no solve may start: a reason of operations.md, section 2. What isn't told never refuses."""
    flags = now.throttled or ()
    checks = (
        ("too_hot", not _below(now.temperature_c, limits.solve_below_c)),
        ("under_voltage", "under_voltage" in flags),
        ("throttled", bool(flags)),
        ("low_battery", _lacks(now.battery, limits.min_battery)),
        ("power_limit", _lacks(limits.max_watts, now.watts)),
        ("low_memory", _lacks(now.available_mib, limits.min_available_mib)),
        ("low_disk", _lacks(now.disk_mib, limits.min_disk_mib)),
        ("deadline_missed", _lacks(limits.max_miss_share, now.miss_share)),
    )
    return next((reason for reason, refused in checks if refused), None)


def pause(limits: Limits, now: Readings, paused: bool) -> bool:
    """Whether a running solve must stand still now, given whether it does. Pausing loses nothing.

    Once paused it stays so until the temperature is below `resume_below_c`; the firmware's own throttling and
    under-voltage pause too, for boards whose limits lie lower (the 3B+ at 60 °C).
    """
    if _STRAIN.intersection(now.throttled or ()):
        return True
    if now.temperature_c is None:
        return False
    if paused:
        return now.temperature_c >= limits.resume_below_c
    return now.temperature_c > limits.pause_above_c


def _below(found: float | None, limit: float) -> bool:
    return found is None or found < limit


def _lacks(found: float | None, least: float | None) -> bool:
    return found is not None and least is not None and found < least
