"""What a board says about itself, from recorded trees."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from edgesolve.device import board

PI4 = {
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.5\0",
    "proc/device-tree/compatible": "raspberrypi,4-model-b\0brcm,bcm2711\0",
    "proc/cpuinfo": "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\n",
    "proc/sys/kernel/osrelease": "6.12.47+rpt-rpi-v8\n",
    "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\n',
    "proc/meminfo": "MemTotal:        3884352 kB\nMemAvailable:    2097152 kB\n",
    "proc/swaps": "Filename Type Size Used Priority\n/var/swap file 524288 1024 -2\n",
    "proc/loadavg": "1.70 0.50 0.20 1/200 1234\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "600000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "1800000\n",
    "sys/class/thermal/thermal_zone0/temp": "61500\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
}
ORIN = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0",
    "proc/cpuinfo": "CPU part\t: 0xd42\n",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "sys/kernel/debug/bpmp/debug/clk/emc/rate": "2133000000\n",
    "sys/class/thermal/thermal_zone0/temp": "48000\n",
    "sys/class/thermal/thermal_zone1/temp": "51250\n",
}


@pytest.fixture
def tree(tmp_path):
    def record(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return record


def test_a_raspberry_pi_4(tree):
    found = board.environment(tree(PI4), threads=2)
    expected = {
        "board": "Raspberry Pi 4 Model B Rev 1.5",
        "soc": "brcm,bcm2711",
        "core": "Cortex-A72",
        "kernel": "6.12.47+rpt-rpi-v8",
        "os": "Debian GNU/Linux 12 (bookworm)",
        "governor": "ondemand",
        "scaling_cur_mhz": 600.0,
        "scaling_max_mhz": 1800.0,
        "scaling_min_mhz": None,
        "temperature_c": 61.5,
        "throttled": ["under_voltage", "throttled"],
        "throttled_since_boot": ["under_voltage", "throttled"],
        "swap": [{"name": "/var/swap", "size_mib": 512.0, "used_mib": 1.0}],
        "load": 1.7,
        "available_mib": 2048.0,
        "threads": 2,
        "nvpmodel": None,
    }
    assert {key: found[key] for key in expected} == expected


def test_a_jetson_orin(tree):
    found = board.environment(tree(ORIN))
    assert found["soc"] == "nvidia,tegra234"
    assert found["core"] == "Cortex-A78AE"
    assert found["nvpmodel"] == "pmode:0002"
    assert found["emc_hz"] == 2_133_000_000
    assert found["temperature_c"] == 51.25
    assert found["throttled"] is None


def test_bits_of_now_and_of_the_past_are_apart(tree):
    root = tree({"sys/devices/platform/soc/soc:firmware/get_throttled": "20008"})
    assert board.throttled(root, since_boot=False) == ["soft_temp_limit"]
    assert board.throttled(root, since_boot=True) == ["frequency_capped"]


def test_the_voltage_sensor_stands_in(tree):
    root = tree({"sys/class/hwmon/hwmon1/name": "rpi_volt\n"})
    assert board.throttled(root, since_boot=True) == []
    tree({"sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n"})
    assert board.throttled(root, since_boot=True) == ["under_voltage"]
    assert board.throttled(root, since_boot=False) is None


def test_an_empty_tree_gives_none_and_no_error(tmp_path):
    found = board.environment(tmp_path)
    for key in ("board", "soc", "kernel", "os", "governor", "temperature_c", "swap", "load"):
        assert found[key] is None
    assert board.rss_mib(tmp_path) is None


def test_this_machine_answers_without_importing_a_runtime():
    loaded = set(sys.modules)
    found = board.environment()
    assert found["python"] == sys.version.split()[0]
    assert found["packages"]["numpy"]
    assert not {"numba", "onnxruntime", "ai_edge_litert"} & (set(sys.modules) - loaded)
    assert 0 < board.rss_mib() <= board.peak_rss_mib() + 8


def test_the_peak_stays_when_memory_is_given_back():
    block = b"x" * (64 << 20)
    peak = board.peak_rss_mib()
    del block
    # The kernel counts per thread and folds late: a few MiB of slack.
    assert board.peak_rss_mib() >= peak - 8 > 64


def test_another_python_can_be_named(monkeypatch):
    monkeypatch.delenv("EDGESOLVE_PYTHON", raising=False)
    assert board.python_command() == [sys.executable]
    monkeypatch.setenv("EDGESOLVE_PYTHON", "qemu-aarch64 -L '/a b' python3.11")
    assert board.python_command() == ["qemu-aarch64", "-L", "/a b", "python3.11"]


def test_the_emulator_is_named(monkeypatch):
    monkeypatch.setenv("EDGESOLVE_EMULATED", "1")
    assert board.environment()["emulated"] is True
    assert board.version("no-such-package") is None
    assert Path(os.sep) == board.ROOT


ORIN_POWER = {
    "sys/class/hwmon/hwmon0/name": "pwmfan\n",
    "sys/class/hwmon/hwmon3/name": "ina3221\n",
    "sys/class/hwmon/hwmon3/in1_label": "VDD_IN\n",
    "sys/class/hwmon/hwmon3/in1_input": "5032\n",
    "sys/class/hwmon/hwmon3/curr1_input": "1500\n",
    "sys/class/hwmon/hwmon3/in2_label": "VDD_CPU_GPU_CV\n",
    "sys/class/hwmon/hwmon3/in2_input": "5000\n",
    "sys/class/hwmon/hwmon3/curr2_input": "700\n",
}


def test_power_is_that_of_the_input_rail_or_unknown(tree):
    assert board.watts(tree(ORIN_POWER)) == pytest.approx(5.032 * 1.5)
    tree({"sys/class/hwmon/hwmon3/in1_label": "VDD_GPU_SOC\n"})
    assert board.watts(tree({})) is None


def test_a_rail_without_a_current_tells_nothing(tree):
    assert board.watts(tree({**ORIN_POWER, "sys/class/hwmon/hwmon3/curr1_input": "\n"})) is None


def test_the_emptiest_battery_that_feeds_the_board(tree):
    supply = "sys/class/power_supply"
    root = tree(
        {
            f"{supply}/AC/type": "Mains\n",
            f"{supply}/mouse/type": "Battery\n",
            f"{supply}/mouse/scope": "Device\n",
            f"{supply}/mouse/capacity": "3\n",
            f"{supply}/BAT0/type": "Battery\n",
            f"{supply}/BAT0/capacity": "80\n",
            f"{supply}/BAT0/status": "Charging\n",
        }
    )
    assert board.battery(root) == {"percent": 80, "discharging": False}
    tree(
        {
            f"{supply}/BAT1/type": "Battery\n",
            f"{supply}/BAT1/capacity": "40\n",
            f"{supply}/BAT1/status": "Discharging\n",
        }
    )
    assert board.battery(root) == {"percent": 40, "discharging": True}


def test_under_voltage_now(tree):
    root = tree({"sys/class/hwmon/hwmon1/name": "rpi_volt\n"})
    assert board.under_voltage(root) is False
    tree({"sys/class/hwmon/hwmon1/in0_lcrit_alarm": "1\n"})
    assert board.under_voltage(root) is True
    tree({"sys/devices/platform/soc/soc:firmware/get_throttled": "10004"})
    assert board.under_voltage(root) is False


def test_an_empty_tree_has_no_power_battery_or_voltage(tmp_path):
    assert board.watts(tmp_path) is None
    assert board.battery(tmp_path) is None
    assert board.under_voltage(tmp_path) is None
    assert board.available_mib(tmp_path) is None


def test_room_on_the_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    known = os.statvfs(tmp_path)
    expected = known.f_bavail * known.f_frsize / 2**20
    assert board.disk_free_mib(tmp_path / "not" / "yet") == pytest.approx(expected, rel=0.02)
