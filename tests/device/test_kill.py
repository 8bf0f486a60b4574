"""`kill -9` at any moment of a recalibration: the head before it answers, or the new one, whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

CRASH = Path(__file__).with_name("recalibrate_crash.py")
EMULATED = os.environ.get("EDGESOLVE_EMULATED") == "1"


@pytest.fixture
def crash(bundle_dir, frames, tmp_path):
    """crash(how, n) -> counts by how many generations there were before, in memory where possible."""

    def run(how, n):
        shared = Path("/dev/shm")
        usable = os.access(shared, os.W_OK)
        np.save(tmp_path / "window.npy", frames.window[:48])
        with tempfile.TemporaryDirectory(dir=shared if usable else tmp_path) as folder:
            arguments = how, bundle_dir, tmp_path / "window.npy", folder, n
            done = subprocess.run(
                [sys.executable, str(CRASH), *map(str, arguments)],
                capture_output=True,
                text=True,
                timeout=900,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_dying_at_every_durable_call(crash):
    found = crash("fault", 5 if EMULATED else 1)
    for counts in found.values():
        assert counts["died"] >= (3 if EMULATED else 16)
        assert EMULATED or (counts["old"] >= 2 and counts["new"] >= 1)


def test_kill_9_at_random_moments(crash):
    n = 3 if EMULATED else 12
    found = crash("kill", n)
    for counts in found.values():
        # How many were caught in the middle depends on the machine; that each left a whole head doesn't.
        assert counts["old"] + counts["new"] == counts["kills"] == n
