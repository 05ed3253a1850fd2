# make quickstart   the main job on the embedded tiny model, from nothing (about 15 minutes the first time)
# make test         the default test suite, from nothing
# Both need only Python 3.11 to 3.13, git, make, cmake and a C++ compiler.

PYTHON ?= $(firstword $(foreach v,python3.11 python3.12 python3.13 python3,$(if $(shell $(v) -c "import sys, venv, ensurepip; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,13))" 2>/dev/null && echo ok),$(v))))
VENV := .venv
BIN := $(VENV)/bin
PINS := $(wildcard requirements/*.txt)

.PHONY: quickstart test test-long lint types setup clean

quickstart: $(VENV)/.ready
	$(BIN)/fastft quickstart

test: $(VENV)/.ready-dev
	$(BIN)/python -m pytest

test-long: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -m "long and not gpu"

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev
	$(BIN)/mypy

setup: $(VENV)/.ready-dev

# torch first and alone: an unpinned one would be dragged in with several GB of CUDA packages.
# editable_mode=compat: with setuptools' default, Python started in the folder above the clone takes the clone for the package.
# Unsloth with --no-deps: its metadata asks for torchvision and xformers, which have no CPU build.
$(VENV)/.ready: pyproject.toml $(PINS)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.13 with venv found; install one or set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements/torch.txt
	$(BIN)/pip install --quiet -r requirements/base.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/unsloth.txt
	@echo "building llama-cpp-python: about 4 minutes on 2 cores, once"
	$(BIN)/pip install --quiet -r requirements/gguf.txt
	$(BIN)/pip install --quiet --no-deps --config-settings editable_mode=compat --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready requirements/dev.txt
	$(BIN)/pip install --quiet -r requirements/dev.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
