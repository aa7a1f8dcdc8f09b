# Every target first sets up `.venv`, once (scripts/setup).
#   ARGS    goes to the command:     make pretrain ARGS='--model small'
#   PYTHON  picks the interpreter:   make test PYTHON=python3.12
#   WORKERS says in how many processes tests run, each of which needs up to 6 GB
ARGS ?=
WORKERS ?= 2
PYTHON ?=

.PHONY: help setup pretrain test test-long check format wheel-check benchmark clean

help:
	@echo 'make pretrain     pretrain a small ALBERT on the English prose of this machine'
	@echo 'make test         run the test suite'
	@echo 'make test-long    run the tests that take longest'
	@echo 'make check        lint, formatting and types'
	@echo 'make format       format, and fix what the linter can'
	@echo 'make wheel-check  build, install into an empty environment, import from elsewhere'
	@echo 'make benchmark    microseconds a step beside a hand-written loop'
	@echo 'make clean        remove .venv and everything built; runs/ stays'
	@echo
	@echo "ARGS='...' goes to the command, PYTHON=python3.12 picks the interpreter."

setup:
	@PYTHON='$(PYTHON)' sh scripts/setup

# Short rows, from which a model learns soonest; longer ones go on from it (README.md).
# `exec`: signals reach the training process itself, and its last words come before make's.
pretrain: setup
	@exec env GLIBC_TUNABLES=glibc.malloc.hugetlb=1 .venv/bin/albert pretrain --seq-len 16 --batch-size 128 $(ARGS)

test: setup
	@exec .venv/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-long: setup
	@exec .venv/bin/python -m pytest -n $(WORKERS) --dist worksteal -m 'long and not slow' $(ARGS)

check: setup
	@exec sh scripts/check

format: setup
	@.venv/bin/ruff check --fix --quiet .
	@exec .venv/bin/ruff format .

wheel-check: setup
	@exec .venv/bin/python scripts/wheel-check

benchmark: setup
	@exec .venv/bin/python -m benchmarks.loop_overhead $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
