# Set up, run and test fxlm. `make help` lists the targets and the variables.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install serve test check lint types architecture format bench clean distclean FORCE

PYTHON ?= python3
TORCH ?= torch>=2.11,<2.14
TORCH_ARGS ?=
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev
MODEL ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OPS_BUILT := $(VENV)/.ops-built
ROOMS := compiler passes models runtime server
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check

help:
	@echo 'make install   set up $(VENV): torch, the constraints, fxlm (editable), its C++ ops'
	@echo 'make serve     install, compile the bundled model once, serve it   [MODEL=... ARGS=...]'
	@echo 'make test      install, check, and the whole test suite            [ARGS="-k pool"]'
	@echo 'make check     ruff, ruff format, mypy --strict, the architecture test'
	@echo 'make format    rewrite the code as ruff wants it'
	@echo 'make bench     run every bench, write bench/results/*.json'
	@echo 'make clean     remove build products and tool caches; distclean: $(VENV) as well'
	@echo
	@echo 'Variables of install, with their defaults:'
	@echo '  PYTHON=$(PYTHON)   3.11 or newer'
	@echo '  TORCH="$(TORCH)"   the requirement given to pip'
	@echo '  TORCH_ARGS="$(TORCH_ARGS)"   options of that pip call alone; for the CPU build (no CUDA download):'
	@echo '      make install TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"'
	@echo '  PIP_ARGS="$(PIP_ARGS)"   options of every pip call'
	@echo '  CONSTRAINTS=$(CONSTRAINTS)   tested versions; empty: the newest that pyproject.toml admits'
	@echo '  EXTRAS=$(EXTRAS)   of pyproject.toml, comma-separated, e.g. dev,cuda'

# --- set-up ------------------------------------------------------------------------------------

install: $(OPS_BUILT)

# The prerequisites of the set-up are looked at before gigabytes are fetched.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'fxlm needs Python 3.11 or newer: make install PYTHON=python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo 'the venv module is missing: sudo apt-get install python3-venv' >&2; exit 1; }
	@command -v "$${CXX:-g++}" >/dev/null \
	  || { echo 'a C++ compiler is missing: sudo apt-get install g++' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A variable named on the command line runs the installation again; otherwise the stamp decides.
ifneq ($(filter command,$(foreach v,TORCH TORCH_ARGS PIP_ARGS CONSTRAINTS EXTRAS,$(origin $(v)))),)
$(INSTALLED): FORCE
endif

# torch comes first and unconstrained, so that the choice of its build is the user's alone.
$(INSTALLED): pyproject.toml $(wildcard constraints.txt) | $(BIN)/pip
	$(PIP_INSTALL) $(PIP_ARGS) 'pip>=25' 'setuptools>=77'
	$(PIP_INSTALL) $(PIP_ARGS) $(TORCH_ARGS) '$(TORCH)'
	$(PIP_INSTALL) $(PIP_ARGS) $(addprefix -c ,$(CONSTRAINTS)) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

# What a machine compiles once: our ops, and the headers that all compiled models share.
$(OPS_BUILT): $(INSTALLED) $(wildcard compiler/ops/csrc/* compiler/ops/build.py)
	$(BIN)/python -m fxlm.compiler.ops.build
	$(BIN)/python -m fxlm.compiler.lower
	@touch $@

# --- run ---------------------------------------------------------------------------------------

serve: install
	@exec $(BIN)/fxlm serve $(MODEL) $(ARGS)

bench: install
	@for bench in probe offline startup; do \
	  echo "== bench/$$bench.py"; $(BIN)/python bench/$$bench.py; done

# --- test --------------------------------------------------------------------------------------

# The suite runs whatever the checks found, and its summary comes last. A worker a core, a thread a
# worker: each takes tests of its neighbour when it has none left.
test: install
	@failed=0; $(MAKE) --no-print-directory lint types || failed=1; \
	$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS) || failed=1; exit $$failed

check: lint types architecture

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

architecture: $(INSTALLED)
	@$(BIN)/pytest -q tests/test_architecture.py

# mypy cannot follow the editable import hook: the rooms are linked under the name they import as.
types: $(INSTALLED)
	@mkdir -p build/typing/fxlm
	@for path in $(ROOMS) fxlm/__init__.py fxlm/__main__.py fxlm/py.typed; do \
	  ln -sfn "../../../$$path" "build/typing/fxlm/$$(basename "$$path")"; done
	@cd build/typing && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fxlm
	@cd build/typing && ../../$(BIN)/mypy --config-file ../../pyproject.toml ../../bench

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# --- tidy --------------------------------------------------------------------------------------

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks *.egg-info
	find $(ROOMS) fxlm tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
