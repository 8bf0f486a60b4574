import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgesolve.kernels
from edgesolve.kernels import accel

MODULES = sorted(
    path.stem
    for path in Path(edgesolve.kernels.__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "compiled")
)
HAVE_NUMBA = importlib.util.find_spec("numba") is not None
IMPORT_ALL = "import sys\n" + "".join(f"import edgesolve.kernels.{name}\n" for name in MODULES)
SHRINK = """
import numpy as np
from edgesolve.kernels import accel
from edgesolve.kernels.prox import prox_group_l2
out = np.empty((2, 1))
prox_group_l2(np.array([[3.0], [4.0]]), np.array([0, 2]), 2.5, out)
print(out.ravel().tolist(), accel.compiled() is not None)
"""


def python(code, **env):
    run = [sys.executable, "-c", code]
    done = subprocess.run(
        run, capture_output=True, text=True, env=os.environ | env, timeout=120, check=True
    )
    return done.stdout.strip()


def test_importing_every_module_imports_no_numba():
    assert "ridge" in MODULES and "fista" in MODULES
    assert python(IMPORT_ALL + "print('numba' in sys.modules)") == "False"


def test_kernels_import_numpy_and_the_standard_library_only():
    code = IMPORT_ALL + "print(*{name.split('.')[0] for name in sys.modules})"
    allowed = set(sys.stdlib_module_names) | {"edgesolve", "numpy"}
    before = set(python("import sys; print(*{n.split('.')[0] for n in sys.modules})").split())
    assert set(python(code).split()) <= allowed | before


@pytest.mark.skipif(not HAVE_NUMBA, reason="numba is not installed")
def test_the_first_kernel_called_imports_numba():
    assert python(SHRINK, EDGESOLVE_NUMBA="1") == "[1.5, 2.0] True"


def test_switched_off():
    code = SHRINK + "import sys; assert 'numba' not in sys.modules"
    assert python(code, EDGESOLVE_NUMBA="0") == "[1.5, 2.0] False"


def test_missing():
    hidden = "import sys; sys.modules['numba'] = None\n"
    assert python(hidden + SHRINK, EDGESOLVE_NUMBA="1") == "[1.5, 2.0] False"


@pytest.mark.skipif(not HAVE_NUMBA, reason="numba is not installed")
def test_no_place_for_the_cache():
    """Numba raises RuntimeError on decoration: stood in for by an njit that does the same."""
    broken = (
        "import numba\n"
        "def njit(**options):\n"
        "    raise RuntimeError('no locator available')\n"
        "numba.njit = njit\n"
    )
    assert python(broken + SHRINK, EDGESOLVE_NUMBA="1") == "[1.5, 2.0] False"


def test_twin_fixture_reaches_both_paths(twin):
    assert (accel.compiled() is None) == (twin == "numpy")
