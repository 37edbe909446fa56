# `make` lists what there is. Every target installs what it needs first, and only what is missing.

PYTHON := .venv/bin/python
BIN := .venv/bin
SOURCES := src tests bench tools
RESULTS := test-results

.DEFAULT_GOAL := help
.PHONY: help run stop test check bench bench-vhd bench-disk clean format lint types floors unit guests setup-runtime setup-dev

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | awk -F '\t' '{ printf "make %-9s %s\n", $$1, $$2 }'

run: setup-runtime ## start the service and a first guest; says what to type next
	@$(BIN)/mullion demo

stop: ## shut the guests down and end the service
	@if [ -x $(BIN)/mullion ]; then $(BIN)/mullion stop --with-partitions; else echo "nothing is installed here, so nothing runs"; fi

test: check guests ## everything: checks, all tests, real guests

check: format lint types floors unit ## what should pass before each commit

format: setup-dev ## is the source formatted? (mend it: .venv/bin/ruff format)
	@$(BIN)/ruff format --check --quiet $(SOURCES) || { $(BIN)/ruff format --check $(SOURCES); exit 1; }

lint: setup-dev ## ruff
	@$(BIN)/ruff check --quiet $(SOURCES)

types: setup-dev ## mypy --strict
	@$(BIN)/mypy

floors: setup-dev ## imports go down only
	@$(BIN)/lint-imports --no-logo

unit: setup-dev ## tests without guests: unit and contract
	@mkdir -p $(RESULTS)
	@$(PYTHON) -m pytest tests/unit tests/contract -q -n 2 --junitxml=$(RESULTS)/unit.xml

guests: setup-dev ## the other tests: other people's programs, hostile bytes, real guests
	@mkdir -p $(RESULTS)
	@$(PYTHON) -m pytest tests/interop tests/fuzz tests/vm -q -n 2 --dist loadfile --junitxml=$(RESULTS)/guests.xml

bench: setup-dev ## the promises that are ratios, measured against other programs in one run
	@$(PYTHON) -m bench

bench-vhd: setup-dev ## the same for `mullion vhd`: disk files, without the service
	@$(PYTHON) -m bench.vhd

bench-disk: setup-dev ## the same for disks that run: requests, guests, caps, checkpoints, merging, backup, files
	@$(PYTHON) -m bench.disk

clean: ## remove what was built or installed here; guests and their disks stay
	@rm -rf .venv .stamps .cache build dist $(RESULTS) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find $(SOURCES) \( -name __pycache__ -type d -prune -o -path 'src/*/_*.so' \) -exec rm -rf {} +

setup-runtime:
	@tools/setup.sh runtime

setup-dev:
	@tools/setup.sh dev
