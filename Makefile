# `make demo` and `make test` set everything up themselves; nothing but Python 3.11, make and g++
# is needed beforehand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The pinned torch has a CPU build; any other version may pull gigabytes of CUDA.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint types imports chromium redis unit gpu picture benchmarks clean

help:
	@echo "make demo        grow a network on handwritten digits, and watch it"
	@echo "make test        lint, types, dependency direction, tests"
	@echo "make gpu         the tests that need a CUDA device, with the torch that is installed"
	@echo "make picture     draw docs/grown_run.png anew"
	@echo "make benchmarks  print the figures of benchmarks/RESULTS.md that need no GPU"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing esper and what it needs (once)"
	$(INSTALL) -e '.[data,report]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing esper with its development tools (once)"
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps timm  # wants torchvision, which its models do without
	@touch $@ $(VENV)/.runtime

demo: $(VENV)/.runtime
	@$(BIN)/esper grow digits --control

test: lint types imports unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

# Tests marked browser drive Debian's Chromium; without one they are skipped, and say so.
chromium:
	@for name in chromium chromium-browser google-chrome; do \
		command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing chromium for the browser tests (once)"; \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null \
			&& exit 0; fi; \
	echo "no Chromium, and none could be installed: browser tests will be skipped"

# Tests marked redis start Debian's redis-server; without one they are skipped, and say so. RUNLEVEL
# keeps Debian from starting a server of its own.
redis:
	@command -v redis-server >/dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing redis-server for the tests of the bus (once)"; \
		{ apt-get update -qq && RUNLEVEL=1 apt-get install -y -qq --no-install-recommends \
			redis-server; } >/dev/null && exit 0; fi; \
	echo "no redis-server, and none could be installed: redis tests will be skipped"

# One thread per process: two test processes share two cores.
unit: $(VENV)/.dev chromium redis
	ESPER_ARTEFACTS=$${ESPER_ARTEFACTS:-build/artefacts} OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

# Those that `make test` skips. With a venv of one's own: make gpu VENV=~/venv
gpu: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m gpu

picture: $(VENV)/.runtime
	$(BIN)/esper report $$($(BIN)/esper grow digits --out $$(mktemp -d)/digits --quiet) \
		--png docs/grown_run.png --only loss --only quality-accuracy --only lanes

# What takes hours comes from the runs that are kept; what is a ratio of times is measured anew.
benchmarks: $(VENV)/.dev chromium redis
	for folder in benchmarks/results/compare-*; do $(BIN)/esper inspect $$folder || exit 1; done
	$(BIN)/python benchmarks/useless_seeds.py --cache benchmarks/results/useless_seeds.jsonl
	$(BIN)/python benchmarks/seed_objective.py --cache benchmarks/results/seed_objective.jsonl
	$(BIN)/python benchmarks/growth_timing.py --seeds 1 --cache benchmarks/results/growth_timing.jsonl \
		--arms host "at 6 %" "at 12 %" "at 25 %" "at 38 %" "at 50 %" "at 12 and 38 %" \
		"at 25 %, behind the last layer" "at 25 %, copies"
	$(BIN)/python benchmarks/growth_treatments.py --cache benchmarks/results/growth_treatments.jsonl
	$(BIN)/python benchmarks/slot_overhead.py
	$(BIN)/python benchmarks/slot_overhead.py --compile whole
	$(BIN)/python benchmarks/slot_overhead.py --compile regional
	$(BIN)/python benchmarks/compile_lifecycle.py
	$(BIN)/python benchmarks/telemetry_cost.py
	$(BIN)/python benchmarks/telemetry_cost.py --host cnn --samples 2
	$(BIN)/python benchmarks/isolation_monitor.py
	$(BIN)/python benchmarks/snapshot_cost.py
	$(BIN)/python benchmarks/dashboard_load.py
	$(BIN)/python benchmarks/bus_priority.py
	$(BIN)/python benchmarks/bus_throughput.py
	$(BIN)/python benchmarks/host_parallelism.py --hosts 1 4 16 64
	$(BIN)/python benchmarks/policies.py --tasks digits --seeds 10
	$(BIN)/python benchmarks/policies.py --tasks text --seeds 5

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
