"""Fixtures for every folder of tests. Imports nothing that a device lacks."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
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


@pytest.fixture
def accepts_only():
    """accepts_only(check, answer): `check` passes the answer and fails every mutant of it.

    `blind`: mutants that the check can't see by its nature, such as "scaled" for an accuracy.
    """

    def run(check, answer, blind=()):
        check(answer)
        for name, mutant in _mutants(np.asarray(answer)):
            if name in blind:
                continue
            try:
                check(mutant)
            except AssertionError:
                continue
            pytest.fail(f"the check cannot fail: it passes the {name} answer")

    return run


def _mutants(answer):
    noise = np.random.default_rng(7).standard_normal(answer.shape)
    yield "zero", np.zeros_like(answer)
    yield "scaled", 1.01 * answer
    yield "permuted", np.roll(answer, 1, axis=0)
    yield "flipped", np.flip(answer, -1).copy()
    yield "noise", np.std(answer) * noise
