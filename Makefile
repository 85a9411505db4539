# `make run` embeds a sample novel into Milvus, `make test` runs all checks, `make help` lists every target.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin

# Five processes keep two cores busy: most of the time, a test waits for a server and uses no processor.
# --no-loadscope-reorder keeps the order of tests/conftest.py: long tests first, so that all processes end together.
PYTEST := $(BIN)/python -m pytest -n 5 --no-loadscope-reorder

# Tests start hundreds of interpreters. Without bytecode on the disk, each of them compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run test lint format types suite unit bench tools venv venv-dev clean

help: ## list the targets
	@awk -F ':[^#]*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

run: venv ## set up, start the service, embed the sample novel, ask the search API one question
	@$(BIN)/python samples/main_job.py $(ARGS)

test: lint types suite ## set up, then lint, types and all tests: what CI runs

lint: venv-dev ## ruff check, ruff format --check
	@echo "== lint: ruff check, ruff format --check"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: venv-dev ## sort imports and format the code
	@$(BIN)/ruff check --fix --select I .
	@$(BIN)/ruff format .

types: venv-dev ## mypy --strict
	@echo "== types: mypy --strict"
	@scripts/typecheck.sh

suite: venv-dev tools ## all tests; one file: make suite ARGS=tests/store/test_fence.py
	@echo "== tests: import rules and the whole suite"
	@$(PYTEST) $(ARGS)

unit: venv-dev tools ## only tests/unit: about a minute
	@$(PYTEST) tests/unit $(ARGS)

bench: venv-dev ## all benchmarks beside a bare loop, Dramatiq and huey; ARGS=--quick: 3 minutes
	@$(BIN)/python bench/run.py $(ARGS)

tools: venv-dev ## fetch the programs that tests need and this machine lacks into .venv/debian
	@scripts/fetch-tools.sh $(VENV)

venv: $(VENV)/.stamp ## only the virtual environment in .venv, for make run
venv-dev: $(VENV)/.stamp-dev ## the virtual environment with the Python packages of the tests

# The environment is updated when one of these files is newer than the stamp.
$(VENV)/.stamp: setup.cfg pyproject.toml constraints.txt
	@scripts/make-venv.sh $(VENV) embedded
	@touch $@

# It contains all of the smaller one, so both stamps are renewed.
$(VENV)/.stamp-dev: setup.cfg pyproject.toml constraints.txt
	@scripts/make-venv.sh $(VENV) embedded,dev
	@touch $(VENV)/.stamp $@

clean: ## remove .venv, caches and build results (not jobworker-data)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
