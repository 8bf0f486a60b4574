"""The ledger: budgets hold across restarts, midnights and clocks that jump."""

from __future__ import annotations

import calendar
import dataclasses
import json

import pytest

from edgesolve.device import generation, ledger
from edgesolve.device.errors import StateError
from edgesolve.device.ledger import Ledger, card_years, noted

HOUR, DAY = 3600.0, 86400.0


def utc(day, hour=12, month=11, year=2026):
    """Unix seconds, by a calendar that isn't the one under test."""
    return float(calendar.timegm((year, month, day, hour, 0, 0)))


def test_it_comes_back_as_it_was(tmp_path):
    path = tmp_path / "state" / "ledger"
    found, note = ledger.read(path)
    assert found == Ledger() and "no ledger yet" in note
    assert not path.parent.exists(), "reading creates nothing"
    kept = noted(Ledger(), utc(22), written=1234, update=True)
    ledger.write(path, kept)
    assert ledger.read(path) == (kept, "")


def test_entries_add_up():
    now = utc(22)
    found = noted(Ledger(), now, written=10)
    found = noted(found, now + 1, written=5, update=True)
    found = noted(found, now + 2, rollback=True)
    assert found == Ledger(
        day="2026-11-22",
        seen="2026-11-22",
        updates_today=1,
        written_today=15,
        written_total=15,
        updates_total=1,
        rollbacks_total=1,
        last_update=now + 1,
        last_rollback=now + 2,
    )


def test_midnight_in_utc_starts_the_day_anew_and_keeps_the_totals():
    eve = utc(23, 0) - 1
    found = noted(noted(Ledger(), eve, written=7, update=True), eve + 0.9, written=1)
    assert (found.day, found.written_today, found.updates_today) == ("2026-11-22", 8, 1)
    found = noted(found, eve + 1, written=2)
    assert (found.day, found.written_today, found.updates_today) == ("2026-11-23", 2, 0)
    assert (found.written_total, found.updates_total, found.last_update) == (10, 1, eve)


@pytest.mark.parametrize("back_to", [0.0, 86399.0, utc(1), utc(21, 23)])
def test_a_clock_that_starts_behind_and_is_then_set_gives_no_new_budget(back_to):
    """A board without a clock wakes in the past until the network tells it the time."""
    found = noted(Ledger(), utc(22), written=30, update=True)
    for hour in (13, 14, 15):
        found = noted(found, back_to)
        assert (found.written_today, found.updates_today) == (30, 1)
        found = noted(found, utc(22, hour))
        assert (found.day, found.written_today, found.updates_today) == ("2026-11-22", 30, 1)
    found = noted(found, utc(23))
    assert (found.written_today, found.updates_today) == (0, 0)


def test_a_clock_that_was_far_ahead_does_not_stop_the_days_for_ever():
    found = noted(Ledger(), utc(22), written=30)
    found = noted(found, utc(22, year=2099), written=1, update=True, rollback=True)
    found = noted(found, utc(22, 13), written=2)
    assert found.written_today == 3, "the jump back itself frees nothing"
    assert found.last_update == found.last_rollback == utc(22, 13)
    found = noted(found, utc(22, 14))
    assert found.last_update == utc(22, 13), "from there on it ages"
    found = noted(found, utc(23), written=4)
    assert (found.day, found.written_today, found.updates_today) == ("2026-11-23", 4, 0)
    assert (found.written_total, found.updates_total, found.rollbacks_total) == (37, 1, 1)


def test_a_day_that_passes_behind_the_true_time_counts_as_one():
    found = noted(Ledger(), utc(22), written=30)
    found = noted(found, utc(1))
    found = noted(found, utc(2), written=1)
    assert (found.day, found.written_today) == ("2026-11-02", 1)


@pytest.mark.parametrize("cut", [0, 1, 60, -1])
def test_a_damaged_ledger_is_a_fresh_one_and_a_note(tmp_path, cut):
    path = tmp_path / "ledger"
    ledger.write(path, noted(Ledger(), utc(22), written=9))
    path.write_bytes(path.read_bytes()[:cut])
    found, note = ledger.read(path)
    assert found == Ledger() and "ledger is not a complete record" in note


def test_any_flipped_bit_is_seen(tmp_path):
    path = tmp_path / "ledger"
    kept = noted(Ledger(), utc(22), written=9)
    ledger.write(path, kept)
    good = path.read_bytes()
    damaged = 0
    steps = range(0, 8 * len(good), 9)  # every byte, each time another bit
    for at in steps:
        bad = bytearray(good)
        bad[at // 8] ^= 1 << at % 8
        path.write_bytes(bad)
        found, note = ledger.read(path)
        assert (found, note) == (kept, "") or (found == Ledger() and note)
        damaged += bool(note)
    assert damaged > 0.8 * len(steps)
    path.unlink()
    path.mkdir()
    assert ledger.read(path)[0] == Ledger()
    with pytest.raises(StateError, match="ledger: cannot be written"):
        ledger.write(path, kept)


def test_other_releases(tmp_path, monkeypatch):
    path = tmp_path / "ledger"
    kept = noted(Ledger(), utc(22), written=9)
    record = dataclasses.asdict(kept)
    del record["last_rollback"]
    path.write_bytes(generation.sealed({**record, "later": 1}))
    assert ledger.read(path) == (kept, "")
    monkeypatch.setattr(generation, "SCHEMA", 2)
    ledger.write(path, kept)
    monkeypatch.undo()
    with pytest.raises(StateError, match="schema is 2"):
        ledger.read(path)
    assert json.loads(path.read_bytes())["written_total"] == 9


def test_card_years():
    # 10 TB at 32 MiB a day: 10e12 / 33554432 = 298,023 days.
    assert card_years(32 * 2**20, 10) == pytest.approx(298_023.22 / 365.25, rel=1e-6)
    assert card_years(2e9, 0.73050) == pytest.approx(1.0)
    assert card_years(0, 10) is None and card_years(5, None) is None
    for wrong in ((-1, 10), (1, 0), (1, -2)):
        with pytest.raises(ValueError, match="must"):
            card_years(*wrong)
