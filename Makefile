# Every target sets up its own virtual environment in .venv on first use. PYTHON chooses the interpreter (3.11 or newer).
#
#   make demo                        the main job, end to end
#   make demo DEMO_ARGS="--json"     with arguments
#   make test                        the fast tests;  make test-slow  the slow ones
#   make lint    make bench

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.ready-dev

.PHONY: demo test test-slow lint bench clean

demo: $(READY)
	$(BIN)/saebench demo $(DEMO_ARGS)

test: $(DEV_READY)
	$(BIN)/python -m pytest -q -m "not slow" $(TEST_ARGS)

test-slow: $(DEV_READY)
	$(BIN)/python -m pytest -q -m slow $(TEST_ARGS)

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/train.py $(BENCH_ARGS)

# The tested PyTorch first: a plain install of the package could pull another build.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit("saebench needs Python 3.11 or newer, found " + sys.version.split()[0] + ": make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	touch $@

$(READY): $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" --editable ".[app]"
	touch $@

$(DEV_READY): $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" --editable ".[dev]"
	touch $@ $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
