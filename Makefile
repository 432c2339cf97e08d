# PYTHON: the interpreter that makes the virtual environment (3.11 or newer; found if not given).
# TORCH_INDEX: where the CPU build of torch comes from when pip's own indexes have none.
PYTHON ?=
VENV ?= .venv
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# OVERLAY_VLLM, OVERLAY: a release of vLLM that has no CPU wheel, and the folder of an environment with it.
OVERLAY_VLLM ?= 0.33.0
OVERLAY ?= .venv-overlay
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
overlay = $(BIN)/python scripts/overlay.py $(OVERLAY_VLLM) $(OVERLAY) -n 2 --dist worksteal

.PHONY: help setup demo test test-all overlay lint bench clean

help:
	@echo "make setup | demo | test | test-all | overlay | lint | bench | clean   (ARGS=... is passed on)"

setup: $(STAMP)
	@echo "The environment is ready: $(VENV)"

$(STAMP): pyproject.toml requirements/cpu.txt requirements/dev.txt scripts/setup-venv.sh
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" scripts/setup-venv.sh "$(VENV)"
	@touch $@

demo: $(STAMP)
	$(BIN)/tangram demo $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest tests -q -n 2 --dist worksteal --durations=15 -m "not thorough" $(ARGS)
	$(if $(ARGS),,$(overlay))

test-all: $(STAMP)
	$(BIN)/python -m pytest tests -q -n 2 --dist worksteal --durations=15 $(ARGS)

overlay: $(STAMP)
	$(overlay) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	@echo "The benchmarks are scripts in benchmarks/; $(BIN)/python -m benchmarks.bars runs those of the docs."

clean:
	rm -rf $(VENV) $(OVERLAY) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
