# make demo      the main job, on data that ships with scikit-learn
# make test      the tests that take seconds each, then those of the GPU kernels on the CPU: Triton's interpreted, CUDA's
#                compiled as C++
# make test-all  all tests, likewise, those of CUDA's in two orders, and make test's once more under sanitizers: hours
# make budget    what the GPU kernels need, as compiled: tests/budget.json, docs/triton.md, docs/cuda.md
# make fuzz      20,000 random calls of the compiled kernels under AddressSanitizer and UBSan
# make bench     every operator on its whole grid beside all rivals: at most ten minutes, then docs/benchmarks.md
# make gpu       builds, tests and measures everything on a GPU, in nine minutes, without .venv: docs/gpu.md
# make docs      docs/operators.md from the operator table and the docstrings
# make lint      ruff, mypy, import-linter
# All else runs in .venv, which is made on first use; a changed kernel is rebuilt on the way.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip
KERNELS := $(wildcard csrc/*.* csrc/*/*.*)

# CUDA kernels take minutes to build, and nothing here needs them but what compiles them by itself.
export FAIRKERNELS_CUDA ?= 0

# One thread in each of a few processes is faster than many threads in one.
PROCESSES := -n auto --maxprocesses 4 --dist worksteal
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PROCESSES)

# Interpreted kernels and compiled ones can not share a process, and triton reads this when it is imported.
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) -k "triton and not aot"
ON_CPU := OMP_NUM_THREADS=1 $(BIN)/python tests/cuda_on_cpu/run.py $(PROCESSES)

.PHONY: demo test test-all budget fuzz bench gpu docs lint

demo: .venv/.ready
	$(BIN)/fairkernels demo

test: .venv/.ready
	$(PYTEST) -m "not slow" tests
	$(INTERPRETED) -m "not slow" tests
	$(ON_CPU) -m "not slow"

test-all: .venv/.ready
	$(PYTEST) tests
	$(INTERPRETED) tests
	$(ON_CPU)
	$(ON_CPU) --order reversed
	$(ON_CPU) --order random --sanitize -m "not slow"

budget: .venv/.ready
	$(BIN)/python tests/triton_aot.py --write
	$(BIN)/python tests/cuda_aot.py --write

fuzz: .venv/.ready
	$(BIN)/python tests/fuzz/run.py --calls 20000

bench: .venv/.ready
	$(BIN)/fairkernels bench --output benchmarks/results
	$(BIN)/python benchmarks/report.py

# With the Python that is there and what is installed for it; nothing is fetched.
gpu:
	$(PYTHON) benchmarks/gpu.py

docs: .venv/.ready
	$(BIN)/python docs/generate.py

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The build takes the headers of the installed torch, hence torch first.
.venv/.environment: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt ninja pybind11 setuptools wheel
	touch $@

.venv/.ready: .venv/.environment pyproject.toml setup.py $(KERNELS)
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test,bench]'
	touch $@
