# make quickstart   the main job on the embedded tiny model, from nothing (about 15 minutes the first time)
# make test         the default test suite, from nothing
# make wheel        a wheel of fastft in dist/, to install elsewhere or to upload to a notebook
# Both of the first need only Python 3.11 to 3.13, git, make, cmake and a C++ compiler.
#
# TORCH_INDEX=URL   an index to take torch from (the CPU build, where pip's own holds only CUDA's)
# WORKERS=2         how many tests run beside each other, each with one thread (12 instead of 21 min)
# HASHES=1          check the tested set against requirements/lock-*.txt (not torch, nor build tools)

PYTHON ?= $(firstword $(foreach v,python3.11 python3.12 python3.13 python3,$(if $(shell $(v) -c "import sys, venv, ensurepip; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,13))" 2>/dev/null && echo ok),$(v))))
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PINS := $(wildcard requirements/*.txt)
SETUP = $(PYTHON) tools/setup_env.py $(VENV) $(if $(HASHES),--hashes)
export TORCH_INDEX

.PHONY: quickstart test test-fast test-long lint types setup wheel release gpu-check test-mac clean

quickstart: $(VENV)/.ready
	$(BIN)/fastft quickstart
	@echo "fastft is $(BIN)/fastft; 'source $(BIN)/activate' makes it plain 'fastft' in this terminal"

# A file's tests stay in one worker (they share checkpoints and runs).
test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# What needs no torch and no model: under a minute.
test-fast: $(VENV)/.ready-dev
	$(BIN)/python -m pytest tests/fast

test-long: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m "long and not gpu"

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/mypy

setup: $(VENV)/.ready-dev

wheel: $(VENV)/.ready
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

release: $(VENV)/.ready-dev
	$(BIN)/python tools/release.py

# On a machine with an NVIDIA card: does it train exactly, fit as planned, and how fast?
gpu-check: $(VENV)/.ready
	$(BIN)/fastft selftest

# The MLX engine's tests, on a Mac or on Linux (355 MB more). mlx-lm wants another transformers on paper.
test-mac: $(VENV)/.ready-dev
	$(BIN)/pip install --quiet "mlx[cpu]==0.32.4; sys_platform == 'linux'" "mlx==0.32.4; sys_platform == 'darwin'"
	$(BIN)/pip install --quiet --no-deps mlx-lm==0.32.2
	$(BIN)/python -m pytest -m "long or not long" tests/unit/test_mlx.py tests/e2e/test_mlx_run.py tests/fast/test_unified_memory.py

$(VENV)/.ready: pyproject.toml $(PINS)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 with venv found; install one or set PYTHON=..." >&2; exit 1; }
	@$(SETUP)

$(VENV)/.ready-dev: $(VENV)/.ready requirements/dev.txt
	@$(SETUP) --dev

clean:
	rm -rf $(VENV) build dist *.egg-info
