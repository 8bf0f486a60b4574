# One folder, .venv, holds everything that the workstation needs; `make` alone lists what can be made.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(wildcard kernels/*.py host/*.py device/*.py)
TINY := build/tiny
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-device test-arm64 reference-arm64 bench-main bench-solvers bench-compression bench-artefacts bench-bcd bench-refit bench-adaptation bench-service bench-faults fuzz wheel clean distclean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

venv: .venv/.stamp  ## everything in .venv: host, both runtimes, test tools, at the tested versions

.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt -e '.[host,onnx,litert,images,metrics,mqtt,sign,demo,test]'
	@# For tests, without what they ask for and don't need: another build of torch; pandas, xarray.
	$(PIP) install -q -c constraints.txt --no-deps torchvision celer download
	@touch $@

demo: venv  ## build, run and recalibrate a small network; the report is in demo_out/
	$(BIN)/python benchmarks/demo.py --out demo_out

test: venv  ## lint, format, and every test on the workstation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# One BLAS thread: two make thousands of small products slower.
	OPENBLAS_NUM_THREADS=1 $(BIN)/pytest

test-device: wheel $(TINY)/.stamp  ## the installed wheel without torch, with Numba and without
	tests/device_env.sh build/wheel/*.whl $(TINY)/bundle

test-arm64: wheel $(TINY)/.stamp  ## the installed wheel on an emulated Raspberry Pi 4
	tests/arm64_env.sh build/wheel/*.whl $(TINY)/bundle

reference-arm64: wheel  ## the instruction counts that test-arm64 compares with, counted anew
	tests/arm64_env.sh build/wheel/*.whl --renew

bench-main: venv  ## the main job, side by side with the peers
	$(BIN)/python benchmarks/main_job.py

bench-solvers: venv .venv-peers/.stamp  ## the convex solvers, side by side with the peers (hours)
	$(BIN)/python benchmarks/bench_solvers.py

bench-compression: venv  ## closed-form compression beside low-rank baselines (an hour)
	$(BIN)/python benchmarks/bench_compression.py

bench-artefacts: venv  ## one network as fp32, fp16, int8, pruned, with a head: bytes, accuracy, latency
	$(BIN)/python benchmarks/bench_artefacts.py

bench-bcd: venv  ## block coordinate descent beside Adam and the published steps (hours)
	$(BIN)/python benchmarks/bench_bcd.py

bench-refit: venv  ## what refitting and fine-tuning buy after closed-form compression (half an hour)
	$(BIN)/python benchmarks/bench_refit.py

bench-adaptation: venv  ## recalibration beside NEO, T3A, Tent: fifteen corruptions and more (an hour)
	$(BIN)/python benchmarks/bench_adaptation.py

bench-service: venv  ## p99 while adapting, and a simulated week of the service (half an hour)
	$(BIN)/python benchmarks/bench_service.py

bench-faults: venv  ## every write of the state folder failed, killed, cut short (two minutes)
	$(BIN)/python benchmarks/bench_faults.py

fuzz: venv $(TINY)/.stamp  ## hostile bundles, images, HTTP requests and MQTT commands (ten minutes)
	$(BIN)/python benchmarks/fuzz_http.py --cases 30000
	$(BIN)/python benchmarks/fuzz_mqtt.py --cases 30000
	$(BIN)/python benchmarks/fuzz_bundle.py --bundle $(TINY)/bundle

.venv-peers/.stamp: pyproject.toml benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	@# One by one: a peer that can't be had is a printed skip.
	.venv-peers/bin/pip install -q -c benchmarks/peers.txt -e . scikit-learn
	for p in adelie celer skglm torch pyscnn 'cvxpy clarabel'; do \
	  .venv-peers/bin/pip install -q -c benchmarks/peers.txt $$p || echo "no $$p"; done
	@touch $@

wheel: venv  ## the wheel, in build/wheel
	@rm -rf build/lib build/bdist* build/wheel  # setuptools would pack modules that were deleted since
	$(PIP) wheel -q --no-deps -w build/wheel .

$(TINY)/.stamp: .venv/.stamp tests/tiny_model.py tests/tiny_bundle.py $(SOURCES)
	rm -rf $(TINY)
	$(BIN)/python tests/tiny_bundle.py $(TINY) --int8
	@touch $@

clean:  ## remove what was built, keep .venv and the emulated Pi
	rm -rf build dist demo_out bench_out .pytest_cache .ruff_cache .numba_cache
	find . -name __pycache__ -not -path './.venv*/*' -not -path './.arm64/*' -prune -exec rm -rf {} +

distclean: clean  ## remove those as well
	rm -rf .venv .venv-peers .arm64 *.egg-info
