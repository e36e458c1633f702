# The menu of the repository: `make help`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TRANSFORMERS ?= 5.17.0
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help venv demo test test-gpu lint format bench clean

help:    ## this list
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:    *##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

venv: $(VENV)/.done  ## .venv with everything installed and the native library built

$(VENV)/.done: pyproject.toml requirements-dev.txt requirements-demo.txt setup.py $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements-dev.txt transformers==$(TRANSFORMERS)
	$(BIN)/pip install --quiet --no-deps --requirement requirements-demo.txt
	command -v nvcc >/dev/null || $(BIN)/pip install --quiet --requirement requirements-nvcc.txt
	LLMQAT_FORCE_BUILD=1 $(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: venv  ## the whole river on SmolLM2-135M; writes runs/demo/report.md
	$(BIN)/llmqat demo --output runs/demo

test: venv  ## the tests that run anywhere
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" tests

test-gpu: venv  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests

lint: venv  ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: venv  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: venv  ## the CPU benchmarks behind the tables of the README
	$(BIN)/python -m benchmarks.run

clean:  ## remove build products
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find llmqat_kernels -name '*.so' -delete
