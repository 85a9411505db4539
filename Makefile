# Two commands: `make run` shows the whole way of a novel into Milvus, `make test` runs every check there is.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help run test lint types unit venv venv-dev clean

help:
	@echo "make run    set everything up, start the service, embed the sample novel, answer one question"
	@echo "make test   set everything up, then lint, types, import rules and the whole suite"
	@echo "make venv   only the virtual environment in $(VENV)"
	@echo "make clean  remove $(VENV), caches and build results (not jobworker-data)"

run: venv
	@$(BIN)/python samples/main_job.py $(ARGS)

test: lint types unit

lint: venv-dev
	@echo "== lint: ruff check, ruff format --check"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: venv-dev
	@echo "== types: mypy --strict"
	@scripts/typecheck.sh

unit: venv-dev
	@scripts/fetch-redis.sh $(VENV)
	@echo "== tests: import rules and the whole suite"
	@# In the order of the folders: the long ones first, so that both processes end at about the same time.
	@$(BIN)/python -m pytest -n 2 --no-loadscope-reorder $(ARGS)

venv: $(VENV)/.stamp
venv-dev: $(VENV)/.stamp-dev

# A stamp is newer than what it was made from, or the environment is brought up to date.
$(VENV)/.stamp: setup.cfg pyproject.toml constraints.txt
	@scripts/make-venv.sh $(VENV) embedded
	@touch $@

# It holds all of the other, so that one is spared where the tests come first.
$(VENV)/.stamp-dev: setup.cfg pyproject.toml constraints.txt
	@scripts/make-venv.sh $(VENV) embedded,dev
	@touch $(VENV)/.stamp $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
