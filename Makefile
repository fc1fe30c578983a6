# Two commands do everything on a fresh machine: `make test` and `make bench`. Each sets up .venv first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RESULTS := benchmarks/results
BUILT := $(VENV)/built

# pip's isolation would build against another copy of torch, downloaded for the build alone.
INSTALL := $(BIN)/pip install --disable-pip-version-check --quiet
CXX_SOURCES := $(foreach extension,cpp h cu cuh,$(wildcard csrc/*.$(extension) csrc/*/*.$(extension)))
SOURCES := setup.py pyproject.toml $(CXX_SOURCES)

.PHONY: setup test test-all test-slow mutate bench bench-gpu lint format clean
.DELETE_ON_ERROR:

setup: $(BUILT)

$(BUILT): $(SOURCES)
	@test -e $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "make: needs python3-venv"; exit 1; }
	$(INSTALL) "setuptools>=77" wheel "torch>=2.10" ninja pybind11 packaging
	$(INSTALL) --no-build-isolation --editable ".[test,bench,lint]"
	@touch $@

test: SELECTED := not slow and not expensive
test-all: SELECTED := not slow
test test-all: setup
	$(BIN)/python -m resnet_fused
	$(BIN)/python -m pytest -m "$(SELECTED)" -n 2
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "$(SELECTED)" -n 2

test-slow: setup
	$(BIN)/python -m pytest -m slow

mutate: setup
	$(BIN)/python -m tests.mutate

bench: setup
	@mkdir -p $(RESULTS)
	$(BIN)/python -m benchmarks.tail --json $(RESULTS)/tail.json --plot $(RESULTS)/tail.png
	$(BIN)/python -m benchmarks.tail --sizes --dtype float32 --rounds 3 --json $(RESULTS)/sizes.json --plot $(RESULTS)/sizes.png
	$(BIN)/python -m benchmarks.overhead --json $(RESULTS)/overhead.json --plot $(RESULTS)/overhead.png
	$(BIN)/python -m benchmarks.block --json $(RESULTS)/block.json --plot $(RESULTS)/block.png
	$(BIN)/python -m benchmarks.resnet18 --json $(RESULTS)/resnet18.json --plot $(RESULTS)/resnet18.png
	$(BIN)/python -m benchmarks.resnet18 --no-mallopt --providers fused --json $(RESULTS)/resnet18-no-mallopt.json
	$(BIN)/python -m benchmarks.models --json $(RESULTS)/models.json --plot $(RESULTS)/models.png
	$(BIN)/python -m benchmarks.inference --sizes 224 --batch-sizes 1,8 --json $(RESULTS)/inference.json --plot $(RESULTS)/inference.png
	$(BIN)/python -m benchmarks.shares --json $(RESULTS)/shares.json
	$(BIN)/python -m benchmarks.memory --json $(RESULTS)/memory.json
	$(BIN)/python -m benchmarks.train --json $(RESULTS)/train.json --plot $(RESULTS)/train.png

# On a machine with a GPU, nvcc, torch and, maybe, no network: by its own $(PYTHON), for its own GPU alone.
CAPABILITY = $(PYTHON) -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
bench-gpu:
	FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$$($(CAPABILITY)) $(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m benchmarks.gpu --json $(RESULTS)/gpu.json --markdown $(RESULTS)/gpu.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES) $(wildcard tests/cuda_on_cpu/*.[ch]*)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES) $(wildcard tests/cuda_on_cpu/*.[ch]*)

clean:
	rm -rf $(VENV) build *.egg-info resnet_fused/*.so $(RESULTS)
