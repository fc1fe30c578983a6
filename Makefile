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

.PHONY: setup test test-all test-slow fuzz mutate matrix bench bench-all bench-gpu lint format clean
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

# Says its seed, and of a failure the smallest problem that fails. FUZZ: further options of pytest.
SEED ?= $(shell date +%s)
FUZZ_ALL = -m pytest tests/test_properties.py -k any_problem --hypothesis-profile=fuzz --hypothesis-seed=$(SEED) $(FUZZ)
fuzz: setup
	$(BIN)/python $(FUZZ_ALL)
	TRITON_INTERPRET=1 $(BIN)/python $(FUZZ_ALL)

mutate: setup
	$(BIN)/python -m tests.mutate

# By the Pythons and the registry at hand; a session takes 6 GB of disk while it runs.
matrix: setup
	$(INSTALL) nox
	$(BIN)/nox

# $(call measure,BENCHMARK[,FILE]) and its options: JSON and plot in $(RESULTS). `make bench` leaves out bfloat16, compilers,
# large sweeps and rounds: five minutes, of rows that mean what those of `make bench-all` do.
measure = $(BIN)/python -m benchmarks.$(1) --json $(RESULTS)/$(or $(2),$(1)).json
drawn = $(measure) --plot $(RESULTS)/$(or $(2),$(1)).png
bench-all: RESULTS := benchmarks/results/all

bench: setup
	$(call drawn,tail) --dtype float32 --rounds 5 --seconds 0.2
	$(call drawn,block) --rounds 5 --seconds 0.3
	$(call drawn,resnet18) --providers fused
	$(call drawn,inference) --sizes 224 --batch-sizes 1,8 --providers "fused, inference" --rounds 3 --seconds 0.3
	$(call drawn,train) --epochs 1
	@echo; ls $(RESULTS)/*.png

bench-all: setup
	$(call drawn,tail)
	$(call drawn,tail,sizes) --sizes --dtype float32 --rounds 3
	$(call drawn,overhead)
	$(call drawn,block)
	$(call drawn,resnet18)
	$(call measure,resnet18,resnet18-bfloat16) --dtype bfloat16 --providers fused --rounds 2 --seconds 0.2
	$(call measure,resnet18,resnet18-no-mallopt) --no-mallopt --providers fused
	$(call drawn,models)
	$(call drawn,inference) --providers "torch.compile, freezing" "fused, inference"
	$(call measure,inference,inference-bfloat16) --dtype bfloat16 --batch-sizes 1,8 --providers "torch.compile, freezing" "fused, inference"
	$(call measure,shares)
	$(call measure,memory)
	$(call drawn,train)
	$(call drawn,sync)
	@echo; ls $(RESULTS)/*.png

# On a machine with a GPU, nvcc, torch and, maybe, no network: by its own $(PYTHON), for its own GPU alone.
CAPABILITY = $(PYTHON) -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
bench-gpu:
	FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$$($(CAPABILITY)) $(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m benchmarks.gpu --json $(RESULTS)/gpu.json --markdown $(RESULTS)/gpu.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES) $(wildcard tests/c*_*/*.[ch]*)
	$(BIN)/mypy
	$(BIN)/python -m tests.mutate --check

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES) $(wildcard tests/c*_*/*.[ch]*)

clean:
	rm -rf $(VENV) build *.egg-info resnet_fused/*.so benchmarks/results
