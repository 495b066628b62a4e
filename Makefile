# The workshop. `make serve` is for everyone; `make test` and `make check` are exactly what CI runs.
# It all lives in .venv: nothing is installed for the system, and no root is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
ARGS ?=
TEST_ARGS ?=

# Changing what is installed makes the environment be brought up to date; else it is left alone.
INSTALLED_FROM := pyproject.toml constraints.txt
SERVE_STAMP := $(VENV)/.installed-serve
DEV_STAMP := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test check format clean

help: ## show this list
	@echo "Seamount: the private DeepSeek stack. Needs Python 3.11 or newer and make."
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | column -t -s '|' 2>/dev/null \
		|| sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(firstword $(MAKEFILE_LIST))

serve: $(SERVE_STAMP) ## chat with the embedded model at 127.0.0.1:8000; ARGS="--port 8080 /models/folder" are passed on
	@exec $(BIN)/seamount serve $(ARGS)

test: $(DEV_STAMP) ## run every test; TEST_ARGS="-k name" are passed on to pytest
	@sh .ci/browser
	@$(BIN)/python -m pytest $(TEST_ARGS)

check: $(DEV_STAMP) ## format, lint, types, import layers, dead code
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture

.PHONY: bench-peers
bench-peers: $(DEV_STAMP) ## measure Seamount beside its peers (hours); ARGS="--rounds 1 --rows 128x1" are passed on
	@$(BIN)/python bench/peers/measure.py $(ARGS)

format: $(DEV_STAMP) ## bring the code into the house's format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## remove the environment and every cache
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@PYTHON="$(PYTHON)" sh .ci/environment $(VENV)

# Torch comes first and by itself: it is most of the download, and a broken connection then costs only its own part.
$(SERVE_STAMP): $(INSTALLED_FROM) | $(BIN)/python
	@echo "Installing Seamount into $(VENV) (once; torch is most of it) ..."
	@$(PIP) --constraint constraints.txt torch
	@$(PIP) --constraint constraints.txt --editable '.[serve]'
	@touch $@

$(DEV_STAMP): $(INSTALLED_FROM) $(SERVE_STAMP)
	@echo "Installing what tests and checks need into $(VENV) ..."
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@
