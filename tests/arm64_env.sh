#!/bin/bash
# The installed wheel on an emulated Cortex-A72.
#   arm64_env.sh WHEEL BUNDLE     the device's tests, then instruction counts against the reference
#   arm64_env.sh WHEEL --renew    the reference alone, written
set -euo pipefail
wheel=$(realpath "$1")
if [ "$2" != --renew ]; then
  EDGESOLVE_TEST_BUNDLE=$(realpath "$2") && export EDGESOLVE_TEST_BUNDLE
  export EDGESOLVE_TEST_INT8_BUNDLE=$(dirname "$EDGESOLVE_TEST_BUNDLE")/int8
fi
cd "$(dirname "$0")/.."

PYTHON=.venv/bin/python deploy/arm64/setup.sh .arm64/root .arm64/site
.venv/bin/python -m pip install -q --no-deps --upgrade --target .arm64/site "$wheel"
export NUMBA_CACHE_DIR=$PWD/.arm64/numba-cache
deploy/arm64/python -P tests/device_only.py
if [ "$2" = --renew ]; then exec .venv/bin/python benchmarks/instructions.py --renew; fi
# Of the kernels what depends on the chip or took part from the start; cones, softmax and the rest are NumPy
# alone and minutes long here. The counts below run the solvers once more.
chip=$(printf 'tests/kernels/test_%s.py ' accel warm gates gated designs moments prox ridge drift online \
  fista gap losses penalties variational)
# Of the device what computes, and one life of the service; the rest is Python that knows no chip.
device=$(printf 'tests/device/test_%s.py ' adapt_units audit bench board cli doctor forget int8_bundle kill patch \
  recalibrate runtime)
life=tests/device/test_service.py::test_a_proposal_waits_for_the_operator
# shellcheck disable=SC2086
deploy/arm64/python -P -m pytest -p no:cacheprovider --durations=5 $chip $device $life
.venv/bin/python benchmarks/instructions.py
