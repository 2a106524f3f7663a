# Everything a person types. Each target sets up what it needs in .venv; when nothing changed that costs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := pyproject.toml deploy/install
# Passed on: make up ARGS="--decode 2", make test ARGS="tests/unit -k lease"
ARGS ?=
# The whole suite is shared out to several processes (tests/sharing.py says how); a part of it begins sooner in one.
SHARED_OUT := --processes auto

.DEFAULT_GOAL := help
.PHONY: help up test check format protos bench chaos clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

up: $(VENV)/serving ## Start a cluster with the default model (ARGS: see `forebay up --help`); Ctrl-C stops it
	@$(BIN)/forebay up $(ARGS)

# Several hundred processes import this tree: Python keeps what it compiled of it, whatever the shell's environment says.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/developing ## Run the tests (ARGS: pytest's)
	$(BIN)/python -m pytest $(or $(ARGS),$(SHARED_OUT))

check: $(VENV)/developing ## Run the linters: style, types, imports between rooms, protocol
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/python -m protos.generate --check

format: $(VENV)/developing ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/developing ## Generate code from protos/forebay/v1
	$(BIN)/python -m protos.generate

bench: $(VENV)/developing ## Measure a cluster that this starts and stops (ARGS: see `forebay bench --help`)
	$(BIN)/forebay bench serve $(ARGS)

chaos: $(VENV)/developing ## Kill, stop and restart everything under 10,000 requests (ARGS: --engine torch --seed N --requests N)
	@$(BIN)/python -m tests.chaos $(ARGS)

clean: ## Remove .venv and caches of tools; models stay in ~/.cache/forebay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build *.egg-info

$(VENV)/serving: $(SETUP)
	deploy/install $(PYTHON) $(VENV) gateway,router,worker,cli
	@touch $@

$(VENV)/developing: $(SETUP)
	deploy/install $(PYTHON) $(VENV) gateway,router,worker,cli,dev
	@touch $@ $(VENV)/serving
