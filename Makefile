# The menu of the repository: `make help`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TRANSFORMERS ?= 5.17.0
TRITON ?= 3.6.0
# What test-gpu and bench-gpu may take, each, of ten minutes: starting and summing up come on top.
SECONDS ?= 570
export OMP_WAIT_POLICY ?= PASSIVE
# The packages of the extra `cuda-build`: nvcc for a machine that has none.
CUDA_BUILD := import tomllib; p = tomllib.load(open('pyproject.toml', 'rb')); \
	print(*p['project']['optional-dependencies']['cuda-build'])

CSRC := $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')
# Pickle and remote code (a checkpoint must not run anything), and compiler modes that change numbers.
BANNED := '\btorch\.load\(|allow_pickle|trust_remote_code=True|use_fast_math|-ffast-math|ATen/cuda|yaml\.load\('
NEWEST_TESTS := tests/triton $(addprefix tests/llmqat/test_,convert.py attention.py checkpoint.py trainer.py engine.py \
	quantized_cache.py quantized_cache_masks.py quantized_cache_state.py transformers_engine.py)
# The files that take minutes begin first, so that none of them is what the others wait for.
SLOWEST_TESTS := $(addprefix tests/,emulator/test_planted_bugs.py llmqat/test_fused_training.py \
	llmqat/test_experiments_command.py emulator/test_sanitizers.py kernels/test_other_processors.py)

.PHONY: help venv demo test test-slow test-newest test-gpu lint format bench bench-gpu kernels check-kernels sass tune clean

help:    ## this list
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:    *##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

# BIN=FOLDER: the programs of an environment of your own, in which the package is installed.
ifeq ($(origin BIN),file)
venv: $(VENV)/.done  ## .venv with everything installed and the native library built
else
venv: ; @$(BIN)/python -c "import llmqat"
endif

# torch is pinned: an unpinned one pulls gigabytes of CUDA packages.
$(VENV)/.done: pyproject.toml requirements-demo.txt setup.py $(shell find csrc -type f)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0 transformers==$(TRANSFORMERS) triton==$(TRITON) "setuptools>=77" pybind11
	$(BIN)/pip install --quiet --no-deps --requirement requirements-demo.txt
	command -v nvcc >/dev/null || $(BIN)/python -c "$(CUDA_BUILD)" | xargs $(BIN)/pip install --quiet
	LLMQAT_FORCE_BUILD=1 $(BIN)/pip install --quiet --no-build-isolation --editable ".[dev,eval]"
	touch $@

demo: venv  ## the whole river on SmolLM2-135M; writes runs/demo/report.md
	$(BIN)/llmqat demo --output runs/demo

test: venv  ## the tests that run anywhere
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" tests

# test_compiled.py needs no device. Most of the time goes to compiling, so the processes share the cases of a file too.
# The signal is that of Ctrl-C, to the first process alone: it ends the others and sums up what ran.
test-gpu: venv  ## every Triton test and the others that need a CUDA device, compiled; benchmarks/results/test_gpu.*
	TRITON_INTERPRET=0 timeout --foreground --signal=INT --kill-after=30 $(SECONDS) \
		$(BIN)/python -m pytest -n auto --maxprocesses 12 --dist worksteal \
		-p benchmarks.gpu_tests --gpu-results benchmarks/results \
		-m "(gpu or triton) and not slow" --ignore tests/triton/test_compiled.py tests

# Three processes keep two cores busy: the longest file takes half of the time.
test-slow: venv  ## real installations and other tests of more than 20 seconds
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "slow and not gpu" $(SLOWEST_TESTS) tests

test-newest: venv  ## one in three cases of the tests that touch transformers and triton, on their newest releases
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/newest "transformers>=5.17,<6" "triton>=$(TRITON)"
	PYTHONPATH=build/newest $(BIN)/python -m pytest -n 2 --dist loadfile --one-in 3 -m "not slow and not gpu" \
		$(NEWEST_TESTS)

lint: venv  ## ruff, mypy, clang-format, and calls that must not appear
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)
	! grep -rnE --include=*.py --include=*.cpp --include=*.cu --include=*.h --include=*.cuh $(BANNED) \
		llmqat llmqat_kernels csrc setup.py

format: venv  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/clang-format -i $(CSRC)

bench: venv  ## every operator on this CPU against what one would use instead
	$(BIN)/python -m benchmarks.run

bench-gpu: venv  ## every figure of a GPU, the most important first; benchmarks/results, and report_cuda.md there
	$(BIN)/python -m benchmarks.gpu --seconds $(SECONDS)

kernels: venv  ## compile the Triton kernels that changed for sm_80 and sm_90, no GPU; writes docs/kernels
	$(BIN)/python -m benchmarks.kernel_report --save

check-kernels: venv  ## compile every one of them and fail if docs/kernels is not what comes out
	$(BIN)/python -m benchmarks.kernel_report --check --fresh

sass: venv  ## registers and instructions of the CUDA C++ kernels, no GPU; writes docs/kernels/sass.*
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m benchmarks.sass_report --save

tune: venv  ## time the tiles of the Triton kernels on this GPU; writes its architecture's table
	$(BIN)/python -m benchmarks.tune

clean:  ## remove build products
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find llmqat_kernels -name '*.so' -delete
