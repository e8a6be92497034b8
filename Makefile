# First commands on a fresh machine: `make demo`, `make test`. Everything lands in .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
FAST := -m "not slow"
# one process a core and one thread a process: small models gain nothing from a second thread
PARALLEL := -n auto --dist loadfile
# -E: all pages anew; what an earlier build remembers of names that have moved would be warnings
SITE = OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -E -W --keep-going -c docs -d build/doctrees . build/site

.PHONY: help install demo test test-slow check format tables clean docs dist
help:
	@echo "make demo       install, then poison and defend a small model; ends with a report"
	@echo "make test       the fast tests (under 10 minutes)"
	@echo "make test-slow  real-model end-to-end tests (about half an hour)"
	@echo "make check      ruff, mypy, tables, docs site, import directions"
	@echo "make format     let ruff rewrite"
	@echo "make docs       the site into build/site; a warning is an error"
	@echo "make dist       wheel and source distribution into dist/, checked"
	@echo "make tables     regenerate the tables of the docs from results/"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Assay needs Python 3.11 or newer; '$(PYTHON)' is `$(PYTHON) --version 2>&1`."; \
	  echo "Name another one: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once, some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps byzfl
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	@$(BIN)/assay demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(FAST) --doctest-modules tests src/assay

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check src tests scripts
	$(BIN)/ruff format --check src tests scripts
	$(BIN)/mypy
	$(BIN)/python -m assay.bench.tables --check
	$(BIN)/python -m pytest -q tests/test_architecture.py
	$(SITE)

docs: $(STAMP)
	$(SITE)
	@echo "build/site/index.html"

dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python -m twine check --strict dist/*

format: $(STAMP)
	$(BIN)/ruff format src tests scripts
	$(BIN)/ruff check --fix src tests scripts

tables: $(STAMP)
	$(BIN)/python -m assay.bench.tables

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
