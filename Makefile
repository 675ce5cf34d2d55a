# Everything runs inside .venv, which the first target called creates. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
# Which Python `make build` builds the extension for.
BUILD_PYTHON ?= $(CURDIR)/$(BIN)/python
# Whether it compiles the CUDA kernels: AUTO (where nvcc is found), ON or OFF.
GGRO_CUDA ?= AUTO
AARCH64_CXX ?= aarch64-linux-gnu-g++
AARCH64_OBJECTS := $(patsubst csrc/%.cpp,build/aarch64/%.o,csrc/dispatch.cpp csrc/errors.cpp $(wildcard csrc/cpu/*.cpp))
NATIVE_SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/include/ggro/*.h csrc/cuda/*.cu csrc/cuda/*.h)
C_SOURCES := $(NATIVE_SOURCES) $(wildcard tests/emulation/*.cpp tests/emulation/*.h)

.DEFAULT_GOAL := help
.PHONY: help build demo test emulation test-asan triton-cubins cuda-budget gpu-check check-aarch64 lint format bench readme-table clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# Does what .venv/installed did with the changed sources, but only for those.
build:  ## rebuild the extension in place after a change of csrc
	PATH="$(dir $(BUILD_PYTHON)):$$PATH" cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$(CURDIR)/ggro_kernels" -DPython_EXECUTABLE="$(BUILD_PYTHON)" \
	  -Dpybind11_DIR="$$($(BUILD_PYTHON) -m pybind11 --cmakedir)" -DGGRO_CUDA=$(GGRO_CUDA)
	PATH="$(dir $(BUILD_PYTHON)):$$PATH" cmake --build build/dev

demo: .venv/installed  ## GGRO beside its baselines on the embedded models; writes report.html
	$(BIN)/ggro demo

test: .venv/installed emulation  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

emulation: .venv/installed  ## the CUDA kernels for the CPU, for the tests
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S tests/emulation -B build/emulation -G Ninja --log-level=WARNING \
	  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/emulation -- --quiet

test-asan: .venv/installed  ## the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	.ci/test-asan

triton-cubins: .venv/installed  ## the Triton kernels compile for sm_80, sm_90 and sm_100, without a spill
	$(BIN)/python -m tests.cubins

cuda-budget: .venv/installed  ## the CUDA kernels, compiled by nvcc where there is one, keep their budget of registers
	$(BIN)/python -m tests.cuda_budget

# Works without .venv: a machine with a GPU may have no network to create it from.
gpu-check:  ## on a machine with an NVIDIA GPU: build, tests, benchmarks, report; some of them: STEPS="tests report"
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tests.gpu_check $(if $(WHEELS),--wheels "$(WHEELS)") $(STEPS)

check-aarch64: $(AARCH64_OBJECTS)  ## the CPU kernels compile for aarch64, without a warning

build/aarch64/%.o: csrc/%.cpp $(filter %.h,$(NATIVE_SOURCES))
	@command -v $(AARCH64_CXX) >/dev/null || { echo "$(AARCH64_CXX) is missing: apt-get install g++-aarch64-linux-gnu, or set AARCH64_CXX" >&2; exit 1; }
	@mkdir -p $(@D)
	$(AARCH64_CXX) -std=c++17 -O3 -fopenmp -Wall -Wextra -Werror -DGGRO_ISA=baseline -Icsrc -Icsrc/include -Icsrc/cpu -c $< -o $@

lint: .venv/installed  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)

format: .venv/installed  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_SOURCES)

bench: .venv/installed  ## kernels and decoding against their baselines
	$(BIN)/python -m benchmarks --memory
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.guided_search --embedded --memory
	$(BIN)/python -m benchmarks.pareto
	$(BIN)/python -m benchmarks.prm_training --model embedded --memory

readme-table: .venv/installed  ## README's table of the kernels from the committed results
	$(BIN)/python -m benchmarks.readme

clean:  ## remove everything that is built
	rm -rf .venv build dist *.egg-info python/*.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f ggro_kernels/*.so

# Constraints bind the build environment too, so that a fresh machine builds what CI built.
.venv/installed: pyproject.toml constraints.txt setup.py CMakeLists.txt $(NATIVE_SOURCES)
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install --quiet --editable '.[test,lint,bench,native,train]'
	touch $@
