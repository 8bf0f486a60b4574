"""Doctor and warmup: a crash is caught and named, every complaint carries its advice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgesolve.device import board, doctor, warmup
from edgesolve.device.errors import BackendError

A72 = "CPU part\t: 0xd08\n"


@pytest.fixture
def versions(monkeypatch):
    """Pretend that these packages are installed, and no others; imports succeed."""
    installed = {"numpy": "2.4.6"}
    monkeypatch.setattr(board, "version", installed.get)
    monkeypatch.setattr(doctor, "in_subprocess", lambda script: ("", ""))
    return installed


def record(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return root


def test_this_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("EDGESOLVE_PYTHON", raising=False)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    found = {check.name: check for check in doctor.checks(tmp_path / "not" / "yet")}
    for name in ("64-bit", "glibc", "page size", "free disk", "clock", "numba cache"):
        assert found[name].status == "ok", found[name]
    for check in found.values():
        assert check.status in ("ok", "warn", "fault", "not measured")
        assert bool(check.advice) == (check.status != "ok"), check
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    "script, failure",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "died of SIGILL"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died of SIGSEGV"),
        ("import sys; sys.exit(128 + 4)", "died of SIGILL"),
        ("import sys; sys.exit(255)", "ended with status 255"),
        ("raise ImportError('libgomp.so.1 is missing')", "ImportError: libgomp.so.1 is missing"),
        ("print('fine')", ""),
    ],
)
def test_a_crash_is_named(script, failure, monkeypatch):
    monkeypatch.delenv("EDGESOLVE_PYTHON", raising=False)
    found, said = doctor.in_subprocess(script)
    assert found == failure
    assert said == ("" if failure else "fine")


def test_a_hang_ends(monkeypatch):
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.2)
    assert doctor.in_subprocess("import time; time.sleep(60)")[0] == "no answer within 0.2 s"


def test_a_runtime_that_crashes_is_a_fault(versions, monkeypatch, tmp_path):
    versions["onnxruntime"] = "1.31.1"
    monkeypatch.setattr(doctor, "in_subprocess", lambda script: ("died of SIGILL", ""))
    onnx, *_, summary = doctor._runtimes(tmp_path)
    assert (onnx.status, onnx.found) == ("fault", "1.31.1: died of SIGILL")
    assert (summary.name, summary.status) == ("runtime", "fault")


def test_one_working_runtime_is_enough(versions, tmp_path):
    versions["ai-edge-litert"] = "2.3.0"
    found = {check.name: check.status for check in doctor._runtimes(tmp_path)}
    expected = {"onnxruntime": "not measured", "ai-edge-litert": "ok"}
    assert found == expected | {"tflite-runtime": "not measured"}


def test_the_version_that_dies_on_a_pi_4(versions, tmp_path):
    versions["onnxruntime"] = "1.21.0"
    root = record(tmp_path, "proc/cpuinfo", A72)
    onnx = next(doctor._runtimes(root))
    assert onnx.status == "fault" and "pip install 'onnxruntime>=1.22'" in onnx.advice
    record(tmp_path, "proc/cpuinfo", A72.replace("d08", "d0b"))
    assert next(doctor._runtimes(root)).status == "ok"


@pytest.mark.parametrize("numpy, status", [("2.4.6", "fault"), ("1.26.4", "ok")])
def test_tflite_runtime_with_numpy_2(versions, tmp_path, numpy, status):
    versions |= {"tflite-runtime": "2.14.0", "numpy": numpy}
    check = {c.name: c for c in doctor._runtimes(tmp_path)}["tflite-runtime"]
    assert check.status == status
    if status == "fault":
        expected = (
            "tflite-runtime 2.14.0 was built for NumPy 1; found NumPy 2.4.6: "
            "pip install ai-edge-litert, or 'numpy<2'."
        )
        assert check.advice == expected


def test_numba_missing_or_broken_is_a_warning(versions, monkeypatch):
    assert doctor._numba().status == "warn" and "NumPy" in doctor._numba().advice
    versions["numba"] = "0.68.1"
    assert doctor._numba().status == "ok"
    monkeypatch.setattr(doctor, "in_subprocess", lambda script: ("died of SIGSEGV", ""))
    assert "EDGESOLVE_NUMBA=0" in doctor._numba().advice


def test_the_board(tmp_path):
    assert doctor._governor(tmp_path).status == "not measured"
    assert doctor._throttling(tmp_path).status == "not measured"
    assert doctor._swap(tmp_path).status == "not measured"
    record(tmp_path, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "ondemand\n")
    assert "performance" in doctor._governor(tmp_path).advice
    throttle = "sys/devices/platform/soc/soc:firmware/get_throttled"
    assert doctor._throttling(record(tmp_path, throttle, "0\n")).status == "ok"
    assert "power" in doctor._throttling(record(tmp_path, throttle, "50000\n")).advice
    assert "fan" in doctor._throttling(record(tmp_path, throttle, "40000\n")).advice
    header = "Filename Type Size Used Priority\n"
    assert doctor._swap(record(tmp_path, "proc/swaps", header)).found == "none"
    zram = header + "/dev/zram0 partition 1048576 0 100\n"
    assert doctor._swap(record(tmp_path, "proc/swaps", zram)).found == "zram"
    card = zram + "/var/swap file 524288 0 -2\n"
    assert doctor._swap(record(tmp_path, "proc/swaps", card)).found == "/var/swap"


def test_the_rest(monkeypatch, tmp_path):
    assert doctor._clock(0.0).status == "warn"
    monkeypatch.setattr(board, "glibc", lambda: None)
    assert doctor._glibc().status == "fault"
    monkeypatch.setattr(board, "glibc", lambda: "2.27")
    assert doctor._glibc().status == "warn"
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    assert doctor._sixty_four_bits().status == "fault"
    monkeypatch.setattr(os, "sysconf", lambda name: 65536)
    assert doctor._page_size().status == "warn"
    monkeypatch.setattr(doctor, "_FREE_MIB", 2**40)
    assert doctor._disk(tmp_path / "state").status == "fault"


# -- warmup ----------------------------------------------------------------------------------


def test_the_cache_has_a_default(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    assert warmup.cache_folder() == tmp_path / ".cache" / "edgesolve" / "numba"
    assert os.environ["NUMBA_CACHE_DIR"] == str(warmup.cache_folder())
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/elsewhere")
    assert warmup.cache_folder() == Path("/elsewhere")


def test_a_cache_that_cannot_be_written_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "numba"))
    with pytest.raises(
        BackendError, match=r"can't be written \(Not a directory\): set NUMBA_CACHE"
    ):
        warmup.warmup()
    assert doctor._cache().status == "warn"


def test_warmup_reports_each_kernel(tmp_path):
    pytest.importorskip("numba", reason="without Numba there is nothing to compile")
    script = (
        "from edgesolve.device.warmup import cache_folder, warmup; kernels = warmup()\n"
        "assert kernels and all(seconds >= 0 for _, seconds in kernels); print(cache_folder())"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    environment.pop("EDGESOLVE_NUMBA", None)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "numba")
    assert list((tmp_path / "numba").rglob("*.nbi")), "the cache is where it said"
