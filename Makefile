# `make lab` and `make test` do all set-up; `make help` lists the rest.
# The virtual environment is made once, and again only when what it is made from changes.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FIRST_NOTEBOOK := labs/00_start_here.ipynb
NOTEBOOK ?= $(shell find solutions -name '*.ipynb' -not -path '*/.*' | sort)
JUPYTER_ARGS ?=
# Jupyter asks for this word where the user is root, as in a container.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope
NOTEBOOKS := --nbval --nbval-current-env --nbval-cell-timeout 300
# Two test processes share the machine; more threads in each only get in each other's way.
test test-fast: export OMP_NUM_THREADS ?= 1

.PHONY: help setup lab test test-fast check format solutions labs peers clean

help:
	@echo "make lab        a first reply from the engine, then JupyterLab (JUPYTER_ARGS=...)"
	@echo "make test       everything: lint, import rules, types, unit tests, notebooks"
	@echo "make test-fast  the same without notebooks and slow tests, for developing"
	@echo "make check      lint, format, import rules and types only"
	@echo "make format     let ruff format and fix"
	@echo "make solutions  run the notebooks of solutions/ and keep their outputs (NOTEBOOK=...)"
	@echo "make labs       write labs/ from solutions/"
	@echo "make peers      vLLM and transformers in .venv-peers, for benchmarks/engine.py"
	@echo "make clean      remove .venv and caches"

# The stamp holds the folder it was made in, so a moved repository is set up again.
ifneq ($(shell test -x $(BIN)/python && cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	@sh scripts/setup.sh $(VENV)
	@echo '$(CURDIR)' > $@

setup: $(STAMP)

lab: $(STAMP)
	@$(BIN)/course chat "Where is my order A-1842?"
	@$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/$(FIRST_NOTEBOOK) $(AS_ROOT) $(JUPYTER_ARGS)

test: check
	$(PYTEST) $(NOTEBOOKS) tests solutions labs

test-fast: check
	$(PYTEST) -m "not slow and not network" tests

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# One thread: on a busy machine two that wait for each other make the kept timings meaningless. All of
# them begin with no part and no points, and run in the order of the course.
solutions: export OMP_NUM_THREADS ?= 1
solutions: export COURSE_PARTS_DIR := $(abspath $(VENV))/parts
solutions: $(STAMP)
	$(if $(filter file,$(origin NOTEBOOK)),rm -rf "$$COURSE_PARTS_DIR")
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False $(NOTEBOOK)

labs: $(STAMP)
	$(BIN)/course release

peers:
	sh scripts/peers.sh

clean:
	rm -rf $(VENV) .venv-peers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
