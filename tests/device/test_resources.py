"""Refusing and pausing by what the board says, and by nothing that it doesn't say."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from edgesolve.device.resources import Limits, Readings, pause, readings, refusal

LIMITS = Limits(max_watts=10.0, min_battery=20.0)
FINE = Readings(
    temperature_c=60.0,
    throttled=(),
    available_mib=512.0,
    disk_mib=900.0,
    watts=6.0,
    battery=80.0,
    miss_share=0.0,
)
# In the order in which they are named when several hold.
STOPS = {
    "too_hot": {"temperature_c": 75.0},
    "under_voltage": {"throttled": ("under_voltage", "frequency_capped")},
    "throttled": {"throttled": ("soft_temp_limit",)},
    "low_battery": {"battery": 19.9},
    "power_limit": {"watts": 10.5},
    "low_memory": {"available_mib": 100.0},
    "low_disk": {"disk_mib": 10.0},
    "deadline_missed": {"miss_share": 0.02},
}


def with_(*names):
    # Reversed: of two that set the same reading, the one named first holds.
    return dataclasses.replace(FINE, **{k: v for n in reversed(names) for k, v in STOPS[n].items()})


def test_a_board_with_room():
    assert refusal(LIMITS, FINE) is None


def test_what_the_board_does_not_tell_never_refuses_or_pauses():
    assert refusal(LIMITS, Readings()) is None
    assert not pause(LIMITS, Readings(), paused=False)
    assert not pause(LIMITS, Readings(), paused=True)


@pytest.mark.parametrize("name", STOPS)
def test_each_reason_alone(name):
    assert refusal(LIMITS, with_(name)) == name


def test_of_two_reasons_the_first_is_named():
    for first, second in itertools.combinations(STOPS, 2):
        assert refusal(LIMITS, with_(first, second)) == first


def test_power_and_battery_have_no_limit_unless_one_is_set():
    assert refusal(Limits(), with_("low_battery", "power_limit")) is None


def test_the_pause_has_hysteresis():
    up_and_down = [79, 80, 80.5, 79, 73, 72, 71.9, 75, 80, 81]
    paused, seen = False, []
    for celsius in up_and_down:
        paused = pause(LIMITS, dataclasses.replace(FINE, temperature_c=celsius), paused)
        seen.append(paused)
    assert seen == [False, False, True, True, True, True, False, False, False, True]


@pytest.mark.parametrize("flag", ["under_voltage", "throttled", "soft_temp_limit"])
def test_a_strained_board_pauses_at_any_temperature(flag):
    strained = dataclasses.replace(FINE, throttled=("frequency_capped", flag))
    assert pause(LIMITS, strained, paused=False)
    assert pause(LIMITS, dataclasses.replace(strained, temperature_c=None), paused=True)


def test_a_frequency_cap_alone_does_not_pause():
    assert not pause(LIMITS, dataclasses.replace(FINE, throttled=("frequency_capped",)), False)


def test_readings_of_a_recorded_board(tmp_path):
    files = {
        "sys/class/thermal/thermal_zone0/temp": "81000\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "4\n",
        "proc/meminfo": "MemTotal: 948304 kB\nMemAvailable: 524288 kB\n",
        "sys/class/power_supply/BAT0/type": "Battery\n",
        "sys/class/power_supply/BAT0/capacity": "15\n",
        "sys/class/power_supply/BAT0/status": "Discharging\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = readings(tmp_path, tmp_path / "state", miss_share=0.5)
    assert found == Readings(81.0, ("throttled",), 512.0, found.disk_mib, None, 15, 0.5)
    assert found.disk_mib > 0
    assert refusal(LIMITS, found) == "too_hot"
    assert pause(LIMITS, found, paused=False)
    (tmp_path / "sys/class/power_supply/BAT0/status").write_text("Charging\n")
    assert readings(tmp_path).battery is None


def test_the_voltage_sensor_of_a_board_without_the_firmware_file(tmp_path):
    folder = tmp_path / "sys/class/hwmon/hwmon2"
    folder.mkdir(parents=True)
    (folder / "name").write_text("rpi_volt\n")
    (folder / "in0_lcrit_alarm").write_text("0\n")
    assert readings(tmp_path).throttled == ()
    (folder / "in0_lcrit_alarm").write_text("1\n")
    assert refusal(LIMITS, readings(tmp_path)) == "under_voltage"


def test_an_unknown_machine_reads_as_nothing(tmp_path):
    assert readings(tmp_path) == Readings()


def test_limits_that_would_never_resume_are_refused():
    with pytest.raises(ValueError, match="resume_below_c"):
        Limits(resume_below_c=85.0)
