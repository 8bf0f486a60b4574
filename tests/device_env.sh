#!/bin/bash
# Runs the device's tests from an installed wheel with only the device's packages: device_env.sh WHEEL BUNDLE
set -euo pipefail
wheel=$(realpath "$1")
export EDGESOLVE_TEST_BUNDLE=$(realpath "$2")
export EDGESOLVE_TEST_INT8_BUNDLE=$(dirname "$EDGESOLVE_TEST_BUNDLE")/int8
cd "$(dirname "$0")/.."
env=build/device-env

[ -x $env/bin/python ] || .venv/bin/python -m venv $env
$env/bin/python -m pip install -q -c constraints.txt "$wheel[onnx,litert,images,metrics,mqtt,sign]" pytest amqtt
$env/bin/python -m pip install -q --force-reinstall --no-deps "$wheel" # same version, new content
$env/bin/python tests/device_only.py

NUMBA_CACHE_DIR=$(realpath build)/numba-cache && export NUMBA_CACHE_DIR
echo "== device tests"
$env/bin/pytest tests/kernels tests/device
echo "== without Numba: whatever solves"
solving=$(printf 'tests/device/test_%s.py ' adapt_units recalibrate runtime audit forget)
# shellcheck disable=SC2086
EDGESOLVE_NUMBA=0 $env/bin/pytest tests/kernels $solving
