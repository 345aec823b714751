# Every target makes its own virtual environment in .venv first; a second call takes no time for it.
# Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The group `dev` of pyproject.toml, spelled out because `pip --group` needs pip >= 25.1;
# tests/test_house.py holds the two together.
DEV := pytest pytest-timeout pytest-xdist pytest-randomly hypothesis jsonschema opacus ruff mypy

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1
export DO_NOT_TRACK := 1

.PHONY: help demo test fuzz lint bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   train a real model inside a memory budget, and write the page about it"
	@echo "make test   run every test"
	@echo "make fuzz   ten thousand cases of each kind of bad input (long)"
	@echo "make lint   check style and types"
	@echo "make bench  measure against every peer (long)"
	@echo "make clean  remove .venv and caches"

demo: $(INSTALLED)
	$(BIN)/remat demo

# One thread each: small kernels on many threads took one test from 0.3 s to 26 s.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 REMAT_FUZZ_CASES=10000 $(BIN)/python -m pytest -n 2 --timeout=7200 tests/test_fuzz.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python benchmarks/core.py
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/checkmate.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/steptime.py

# torch comes first and alone: where a build for this machine is at hand it is taken as it is.
$(INSTALLED): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("remat needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[eval,export,text,track,integrations,ray]" $(DEV)
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
