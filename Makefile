# `make demo` and `make test` need nothing but python3 (3.10 or newer, with venv) and this file.
# Another interpreter: make PYTHON=python3.12 demo. Another place for the environment: make VENV=/big/disk/venv demo.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UNFINISHED := $(VENV)/.installing
LOG := $(VENV)/install.log
ARGS ?=
DATA ?=
WEIGHTS ?=
# Benchmarks that need data which nobody may hand on, in the order in which one leaves what the next reads; common.py is no program.
ON_TILES := benchmarks/marsscapes_loop.py benchmarks/audit.py benchmarks/archive.py benchmarks/label_efficiency.py
BENCHMARKS := $(filter-out $(ON_TILES) benchmarks/common.py,$(sort $(wildcard benchmarks/[a-z]*.py)))

.PHONY: help install demo test test-unit lint format types bench clean

help: ## this list
	@echo "raysal: masks for a whole archive of rover images from about 3% of hand labels"; echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' Makefile | while IFS='|' read -r name what; do printf '%-17s %s\n' "$$name" "$$what"; done
	@echo; echo "The first of them installs into $(VENV): some minutes and several GB, once. ARGS=... is passed on, for example make test-unit ARGS='-k scores'."

install: $(STAMP) ## the virtual environment with raysal in it

# An install that was cut short leaves $(UNFINISHED) behind; the next one then starts from an empty environment
# (half-written packages can look whole to pip). Downloads are not repeated: pip keeps them in its cache.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "raysal needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@if [ -e $(UNFINISHED) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "making the virtual environment $(VENV)"; \
		$(PYTHON) -m venv --clear $(VENV) \
			|| { echo "$(PYTHON) -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi
	@touch $(UNFINISHED)
	@echo "installing raysal into $(VENV) (some minutes, several GB, once); everything pip says: $(LOG)"
	@set -o pipefail; PYTHONUNBUFFERED=1 $(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off -e '.[test]' 2>&1 | tee $(LOG) | { \
		n=0; while IFS= read -r line; do case "$$line" in \
			Collecting*|Processing*) n=$$((n + 1)); if [ $$((n % 20)) = 0 ]; then echo "  $$n packages found"; fi;; \
			*Downloading*"("[0-9]*" GB)"|*Downloading*"("[0-9][0-9][0-9]*" MB)") echo "  $${line#"$${line%%[! ]*}"}";; \
			Installing\ collected*) echo "  unpacking $$n packages";; \
			ERROR*|error:*) echo "  $$line" >&2;; \
		esac; done; } \
		|| { tail -n 15 $(LOG) >&2; echo "the install failed (above: the end of $(LOG)); mend the cause and run the same make again" >&2; exit 1; }
	@rm -f $(UNFINISHED); touch $@
	@echo "installed"

demo: $(STAMP) ## the whole loop on synthetic Mars scenes, ending with a report and labels
	@$(BIN)/raysal demo $(ARGS)

test: $(STAMP) ## every test
ifeq ($(strip $(ARGS)),)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -n auto --durations=15 # a process a core
	@$(BIN)/python -m pytest tests/e2e tests/ray -n 2 --dist loadfile --no-loadscope-reorder --durations=30 # the longest files first
else
	@$(BIN)/python -m pytest $(ARGS)
endif

test-unit: $(STAMP) ## the tests that start no Ray: the quickest look
	@$(BIN)/python -m pytest tests/unit $(ARGS)

lint: $(STAMP) ## style and formatting, changes nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(STAMP) ## mends style and formatting
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(STAMP) ## static types of raysal/
	@$(BIN)/mypy

bench: $(STAMP) ## every benchmark that needs no data; with DATA=TILES WEIGHTS=FILE the one on real tiles too; a smoke run: ARGS=--quick
	@failed=; for program in $(BENCHMARKS); do \
		echo "== $$program"; $(BIN)/python "$$program" $(ARGS) || failed="$$failed $$program"; \
	done; \
	if [ -n "$(DATA)" ] && [ -n "$(WEIGHTS)" ]; then \
		for program in $(ON_TILES); do \
			echo "== $$program"; $(BIN)/python "$$program" --data "$(DATA)" --weights "$(WEIGHTS)" $(ARGS) || failed="$$failed $$program"; \
		done; \
	else \
		echo "left out: $(ON_TILES): they need real tiles and encoder weights: make bench DATA=TILES WEIGHTS=FILE.safetensors"; \
	fi; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

clean: ## removes the environment and the caches; never runs/, which holds your results
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
