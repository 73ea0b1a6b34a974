# `make` or `make help` lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.moetrace
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.DEFAULT_GOAL := help
# one test process for each core: llama.cpp is run with one thread; neighbours stay together, as they share fixtures
PARALLEL := --numprocesses auto --maxprocesses 8 --dist worksteal

# which of tests/stress `make stress` runs: T=test_kill.py; all by default
T ?=

.PHONY: help setup demo report-image releases test test-unit test-slow test-device hosts test-cpp sanitize stress lint docs notebooks clean wheel bench-overhead bench-analysis bench-machines bench-live bench-first-hour gpu-check

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"

# moetrace itself, editable, with what the tests need; rebuilt when the native sources change
$(STAMP)-package: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet "scikit-build-core>=0.11" "pybind11>=3.0" "cmake>=3.24" ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[test]'
	@touch $@

# the pinned llama.cpp: built once, cached by pip
$(STAMP)-runtime: $(BIN)/python moetrace/host/pin.txt moetrace/host/install-llama.sh
	moetrace/host/install-llama.sh cpu $(BIN)/python
	@touch $@

setup: $(STAMP)-package $(STAMP)-runtime ## virtual environment, moetrace and llama.cpp

docs: $(STAMP)-package ## the documentation as a site: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# a llama-server that is there already will do, if doctor says so; else the pinned one is built
demo: $(STAMP)-package ## record a small model from start to end
	@$(BIN)/moetrace doctor 2> /dev/null || $(MAKE) $(STAMP)-runtime
	$(BIN)/moetrace demo

wheel: $(BIN)/python ## wheels for each Python that is found, and a check of each in a clean environment
	packaging/wheel.sh dist
	$(BIN)/python -m pip install --quiet pyelftools
	for wheel in dist/*.whl; do \
	    python=$$(echo $$wheel | sed 's/.*-cp3\([0-9]*\)-cp.*/python3.\1/'); \
	    $(BIN)/python packaging/check.py $$wheel $$python || exit 1; done

report-image: setup ## the README's picture of a report, of the demo's trace; needs Chromium
	test -d demo/demo.moet || $(BIN)/moetrace demo
	$(BIN)/python docs/images/make.py demo/demo.moet

test: setup lint test-cpp ## everything but the slow tests
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-unit: $(STAMP)-package ## the tests that need no llama.cpp
	$(BIN)/python -m pytest tests/unit tests/stats -m "not slow" $(PARALLEL)

test-slow: setup ## the tests that take minutes
	$(BIN)/python -m pytest -m slow --ignore tests/device --timeout 3600

test-device: setup ## devices: one of the tests' own, RPC, and Vulkan where it can be built; an hour on two cores
	$(BIN)/python -m pytest tests/device --timeout 3600 $(PARALLEL)

hosts: setup ## README's table of hosts and devices: what test-device and packages of others show; an hour and a half
	MOETRACE_HOSTS=docs/hosts.json $(BIN)/python -m pytest tests/device tests/integration/test_server.py \
	    tests/integration/test_foreign_builds.py tests/integration/test_record_block.py --timeout 3600 $(PARALLEL)
	$(BIN)/python docs/hosts.py

test-cpp: $(STAMP)-package ## the C++ tests
	$(BIN)/cmake -S . -B build/tests -DMOETRACE_TESTS=ON -DMOETRACE_WERROR=ON > build-tests.log || (cat build-tests.log; exit 1)
	@rm -f build-tests.log
	$(BIN)/cmake --build build/tests --parallel 2
	$(BIN)/ctest --test-dir build/tests --output-on-failure

sanitize: $(STAMP)-package ## the C++ tests under AddressSanitizer, UBSan and ThreadSanitizer
	for s in address,undefined thread; do \
	    $(BIN)/cmake -S . -B build/$${s%%,*} -DMOETRACE_TESTS=ON -DMOETRACE_SANITIZE=$$s -DCMAKE_BUILD_TYPE=RelWithDebInfo && \
	    $(BIN)/cmake --build build/$${s%%,*} --parallel 2 && \
	    $(BIN)/ctest --test-dir build/$${s%%,*} --output-on-failure || exit 1; \
	done

stress: setup ## kill, damage, fuzz, race and starve it: an hour on four cores; writes docs/reliability.md
	MOETRACE_STRESS=whole $(BIN)/python -m pytest tests/stress/$(T) --timeout 7200 $(PARALLEL) --dist loadfile
	$(BIN)/python tests/stress/report.py

lint: $(STAMP)-package ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: setup ## execute the example notebooks
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[notebooks]'
	$(BIN)/python examples/notebooks/execute.py

bench-overhead: setup ## what tracing costs; writes docs/benchmarks.md
	$(BIN)/python benchmarks/bench_overhead.py

bench-machines: $(STAMP)-package ## many traces on 1, 2 and 4 processes; TRACES=N of a million tokens each (default 10)
	$(BIN)/python benchmarks/bench_machines.py $(if $(TRACES),--traces $(TRACES))

bench-live: setup ## what watching a recording costs: decode speed with serve and live beside it, and without
	$(BIN)/python benchmarks/bench_live.py

bench-first-hour: $(STAMP)-package ## three new users from nothing to the first picture: commands and seconds; SERVER=llama-server for the one who has it
	$(BIN)/python benchmarks/first_hour.py $(if $(SERVER),--server $(SERVER))

bench-analysis: $(STAMP)-package ## the analyses against the notebook's own method, and all of stats and report at the size of real models (half an hour); REAL=FOLDER of DOMAIN.npz, too
	$(BIN)/python benchmarks/bench_analysis.py
	$(BIN)/python benchmarks/bench_stats.py $(if $(REAL),--real $(REAL))

releases: setup ## build llama.cpp releases of two years (once, an hour) and try moetrace on each
	PYTHON=$(BIN)/python llama.cpp/releases.sh build/releases
	MOETRACE_STRESS=whole MOETRACE_WRITE=1 $(BIN)/python -m pytest tests/stress/test_releases.py

gpu-check: ## build for CUDA and check there; SOURCES_GPU=FOLDER, see the script
	benchmarks/gpu-check.sh $(SOURCES_GPU)

clean: ## remove what was built
	rm -rf build $(VENV) demo
