# Everything a newcomer needs: `make report` and `make test` set up whatever is missing, then do their job.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.moesim-installed
UV := $(shell command -v uv 2>/dev/null)
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup report test test-all lab lint format types contracts check accuracy bench docs constraints clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(STAMP) ## Create .venv with everything pinned by constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "moesim needs Python 3.11 or newer; say make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifneq ($(UV),)
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(UV) pip install --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev,hf]'
else
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev,hf]'
endif
	$(BIN)/python -m moesim.warm
	@touch $@

report: $(STAMP) ## Render the default planning report into out/report (ARGS="-p model mixtral-8x7b ..." for another)
	$(BIN)/moesim report --out out/report $(ARGS)

test: $(STAMP) ## Lint, types, import contracts and the fast tests (under 5 minutes on two cores)
	$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

test-all: $(STAMP) ## Everything, the slow tests too
	$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest -n 2 $(ARGS)

check: lint types contracts ## The gate that the pre-commit hooks run as well

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(STAMP) ## Rewrite the sources in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

lab: $(STAMP) ## Open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir notebooks $(ARGS)

bench: $(STAMP) ## Time the engine and the report; writes docs/speed.md
	$(BIN)/python benchmarks/bench.py

accuracy: $(STAMP) ## Score every carried measurement; writes docs/accuracy.md, its figures and the scores
	$(BIN)/python tools/make_accuracy.py

constraints: ## Resolve constraints.txt again (needs uv; ARGS=--upgrade for newer versions)
	$(PYTHON) tools/make_constraints.py $(ARGS)

clean: ## Remove the environment and the outputs
	rm -rf $(VENV) out
