#!/bin/bash
# Runs the device's tests from an installed wheel on an emulated Cortex-A72: arm64_env.sh WHEEL BUNDLE
set -euo pipefail
wheel=$(realpath "$1")
export EDGESOLVE_TEST_BUNDLE=$(realpath "$2")
cd "$(dirname "$0")/.."

PYTHON=.venv/bin/python deploy/arm64/setup.sh .arm64/root .arm64/site
.venv/bin/python -m pip install -q --no-deps --upgrade --target .arm64/site "$wheel"
export NUMBA_CACHE_DIR=$PWD/.arm64/numba-cache
deploy/arm64/python -P tests/device_only.py
deploy/arm64/python -P -m pytest -p no:cacheprovider --durations=5 tests/kernels tests/device
