# Each target sets up what it needs (tools/setup.py), so that a fresh Debian machine takes one command.

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
ARGS ?=

.NOTPARALLEL:
.PHONY: help demo test lint bench test-long fuzz clean setup-test

help:
	@echo "make demo       set up, then mirror a file system in use and verify the copy"
	@echo "make test       set up, then lint and run all tests (ARGS='-k qcow2 -x' are pytest's)"
	@echo "make lint       ruff, mypy --strict, import-linter"
	@echo "make bench      set up, then measure against other programs"
	@echo "make test-long  the tests with longer campaigns: about an hour"
	@echo "make fuzz       damage qcow2 images at random, and compare with qemu-img (SCALE=50)"
	@echo "make clean      remove .venv, .cache and all caches"

demo:
	@$(PYTHON) tools/setup.py demo
	@$(BIN)/python examples/demo.py

setup-test:
	@$(PYTHON) tools/setup.py test

lint: setup-test
	@$(BIN)/ruff check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# Tests marked "guest" stay in one worker: two emulators at a time would only slow each other down.
test: lint
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

test-long: lint
	@DISKWRIGHT_LONG=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --timeout 3600 $(ARGS)

SCALE ?= 50
fuzz: setup-test
	@DISKWRIGHT_FUZZ=$(SCALE) $(BIN)/python -m pytest -n $(JOBS) tests/fuzz $(ARGS)

bench:
	@$(PYTHON) tools/setup.py bench
	@$(BIN)/python -m bench $(ARGS)

clean:
	rm -rf .venv .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
