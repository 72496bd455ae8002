# Two commands from a fresh clone, with Python 3.11+ and make only:  make demo   and   make test.
# Set-up lives in .venv; its stamp files make repeated calls instant, and a change of pyproject.toml or
# constraints.txt installs again.

SHELL := /bin/sh
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
DEMO_DIR ?= runs/demo
PYTEST_ARGS ?=
SOAK_ARGS ?=
export PYTHON
# editable_mode=compat: found by its path. A clone is a folder of the same name, and would be taken for the package by
# whoever works in the folder around it.
# Tests of what is not installed (Slurm, libtpu) skip themselves.
FAST := not slow

.DEFAULT_GOAL := help
.PHONY: help demo test test-all soak lint types imports check format setup clean upgrade constraints

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r target text; do \
	  printf '%-20s %s\n' "$$target" "$$text"; done
	@echo 'Variables: PYTHON (interpreter for .venv), PYTEST_ARGS (for example "-k masks"), SOAK_ARGS ("--seconds 60"), DEMO_DIR (runs/demo)'

demo: .venv/.core  ## pretrain a small BERT on CPU, then fill in masked sentences
	$(BIN)/maskformer train --config=configs/bert.py:demo --workdir="$(DEMO_DIR)"
	@echo; echo "Guesses for sentences that the model has not seen:"
	@$(BIN)/maskformer fill --workdir="$(DEMO_DIR)" --examples=4
	@$(BIN)/maskformer fill --workdir="$(DEMO_DIR)" "It is a truth universally [MASK], that a single man"
	@echo; $(BIN)/maskformer report "$(DEMO_DIR)"

test: check  ## lint, types, import order, then the tests
	$(BIN)/python -m pytest -m "$(FAST)" $(PYTEST_ARGS)

test-all: check  ## as test, with the tests marked slow
	$(BIN)/python -m pytest $(PYTEST_ARGS)

soak: .venv/.dev  ## ten minutes of stopping runs at random moments: do they end with the same bits?
	$(BIN)/python tests/soak.py $(SOAK_ARGS)

check: lint types imports

lint: .venv/.dev  ## ruff
	$(BIN)/python -m ruff check .

types: .venv/.dev  ## mypy
	$(BIN)/python -m mypy

imports: .venv/.dev  ## the one-way import order (import-linter)
	$(BIN)/lint-imports

format: .venv/.dev  ## repair what ruff can repair (import order, unused imports)
	$(BIN)/python -m ruff check --fix .

setup: .venv/.dev  ## only make .venv with everything the tests need

clean:  ## remove .venv, caches and build outputs (runs/ stays)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

upgrade: .venv/.dev  ## install the newest versions that pyproject.toml admits (then: make test constraints)
	$(PIP) install --upgrade --upgrade-strategy=eager -e '.[dev]'

constraints: .venv/.dev  ## write the installed versions to constraints.txt
	@{ sed -n '/^#/p' constraints.txt; $(PIP) freeze --exclude-editable | sed -n 's/^[A-Za-z0-9._-]*==[^ ]*/& ; python_version < "3.15"/p'; } > constraints.new
	@mv constraints.new constraints.txt

# The interpreter: $PYTHON if set, else the first of the usual names that is new enough.
.venv/.python:
	@set -e; chosen=; \
	if [ -n "$$PYTHON" ]; then set -- "$$PYTHON"; else set -- python3 python3.14 python3.13 python3.12 python3.11 python; fi; \
	for candidate in "$$@"; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then chosen=$$candidate; break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	  echo "error: maskformer needs Python 3.11 or newer; tried: $$*" >&2; \
	  echo "       $$1 is: $$("$$1" --version 2>/dev/null || echo not there)" >&2; \
	  echo "       Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; fi; \
	echo "Creating .venv with $$("$$chosen" --version)"; \
	"$$chosen" -m venv .venv || { \
	  echo "error: '$$chosen -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

.venv/.core: .venv/.python pyproject.toml constraints.txt
	@echo "Installing maskformer into .venv (a minute or two the first time)"
	@$(PIP) install --quiet --constraint constraints.txt --config-settings editable_mode=compat -e .
	@touch $@

.venv/.dev: .venv/.python pyproject.toml constraints.txt
	@echo "Installing maskformer and its test tools into .venv (a minute or two the first time)"
	@$(PIP) install --quiet --constraint constraints.txt --config-settings editable_mode=compat -e '.[dev]'
	@touch .venv/.core $@
