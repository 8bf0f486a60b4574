"""What was done and written today and ever, across restarts: the budgets are held against it."""

from __future__ import annotations

import dataclasses
import datetime
import os
from dataclasses import dataclass
from pathlib import Path

from edgesolve.device.atomic import make_folder, unwritable, write_atomic
from edgesolve.device.generation import Damaged, read_record, sealed

NAME = "ledger"
DAYS_A_YEAR = 365.25


@dataclass(frozen=True, slots=True)
class Ledger:
    """`written_*` in bytes, `last_*` in unix seconds (None: never), days as "2026-11-22" in UTC.

    `day` is the one that the daily counters belong to, `seen` the one of the last entry: they
    differ while the clock is behind.
    """

    day: str = ""
    seen: str = ""
    updates_today: int = 0
    written_today: int = 0
    written_total: int = 0
    updates_total: int = 0
    rollbacks_total: int = 0
    last_update: float | None = None
    last_rollback: float | None = None


def read(path: str | Path) -> tuple[Ledger, str]:
    """(the ledger in the file `path`, ""), or (a fresh one, why). Creates nothing.

    Raises StateError only where a newer release wrote it.
    """
    path = Path(path)
    if not os.path.exists(path):
        return Ledger(), "There is no ledger yet: counting starts now."
    try:
        record = read_record(path)
        known = {f.name: record[f.name] for f in dataclasses.fields(Ledger) if f.name in record}
        return Ledger(**known), ""
    except Damaged as damage:
        return Ledger(), f"The ledger is not used: {damage}. Counting starts anew."


def write(path: str | Path, ledger: Ledger) -> None:
    """Replace the file `path`, making its folder where there is none. Raises StateError."""
    path = Path(path)
    try:
        make_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    write_atomic(path, sealed(dataclasses.asdict(ledger)))


def noted(
    ledger: Ledger, now: float, written: int = 0, update: bool = False, rollback: bool = False
) -> Ledger:
    """The ledger after `written` more bytes, an update, a rollback at `now` (unix seconds).

    The daily counters start anew at midnight UTC. A clock that jumps back keeps them, also when it
    is set right again; `last_*` never lie after `now`.
    """
    today = datetime.datetime.fromtimestamp(now, datetime.timezone.utc).date().isoformat()
    # A day after the last one seen has begun; `day` again only means that the clock caught up.
    anew = today > ledger.seen and today != ledger.day
    return Ledger(
        day=today if anew else ledger.day,
        seen=today,
        updates_today=(0 if anew else ledger.updates_today) + update,
        written_today=(0 if anew else ledger.written_today) + written,
        written_total=ledger.written_total + written,
        updates_total=ledger.updates_total + update,
        rollbacks_total=ledger.rollbacks_total + rollback,
        last_update=now if update else _until(ledger.last_update, now),
        last_rollback=now if rollback else _until(ledger.last_rollback, now),
    )


def card_years(written_per_day_bytes: float, endurance_tb: float | None) -> float | None:
    """Years until the card's `endurance_tb` (10^12 bytes, its maker's figure) are written.

    None where that figure is unknown or nothing is written. The card's own write amplification
    and what other programs write come on top.
    """
    if written_per_day_bytes < 0 or (endurance_tb is not None and endurance_tb <= 0):
        raise ValueError(
            f"bytes a day must not be negative and endurance_tb must be positive, got "
            f"{written_per_day_bytes} and {endurance_tb}."
        )
    if endurance_tb is None or written_per_day_bytes == 0:
        return None
    return endurance_tb * 1e12 / (written_per_day_bytes * DAYS_A_YEAR)


def _until(moment: float | None, now: float) -> float | None:
    return None if moment is None else min(moment, now)
