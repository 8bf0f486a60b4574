"""Fixtures for every folder of tests. Imports nothing that a device lacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SHARED_DATA = TESTS.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets: EDGESOLVE_DATA, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("EDGESOLVE_DATA", SHARED_DATA))
    if not folder.is_dir():
        if os.environ.get("CI") == "true" and SHARED_DATA.is_dir():
            pytest.fail(f"EDGESOLVE_DATA={folder} is no folder, though {SHARED_DATA} is here.")
        pytest.skip(f"no data sets in {folder}; EDGESOLVE_DATA can name another folder")
    return folder


@pytest.fixture(scope="session")
def bundle_dir(tmp_path_factory) -> Path:
    """A small bundle; whoever changes it copies it first. `test.npz` beside it: labelled frames.

    EDGESOLVE_TEST_BUNDLE where the host built one before (a device can't), else built here, once.
    """
    if prebuilt := os.environ.get("EDGESOLVE_TEST_BUNDLE"):
        return Path(prebuilt)
    out = tmp_path_factory.mktemp("tiny")
    done = subprocess.run(
        [sys.executable, str(TESTS / "tiny_bundle.py"), str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, f"the tiny bundle can't be built:\n{done.stdout}{done.stderr}"
    return out / "bundle"


@pytest.fixture(scope="session")
def python_command() -> list[str]:
    """What starts a child Python; under emulation `sys.executable` is the launcher itself."""
    return [sys.executable]
