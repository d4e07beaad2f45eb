# `make` alone lists what can be done. Everything is installed into .venv and nowhere else.
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
PYTHON ?=
JOBS ?= 2
TORCH_INDEX ?=
export TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help demo venv test test-slow lint format clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PYTHON=python3.12    the interpreter to build $(VENV) with (default: 3.13, 3.12, 3.11 or python3)"
	@echo "  JOBS=2               processes that run the quick tests"
	@echo "  TORCH_INDEX=URL      where torch comes from (default: wherever pip looks); for PyTorch's CPU builds:"
	@echo "                       make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu"

demo: $(VENV)/.core  ## look, draw, answer and edit with the small model: demo/sheet.png
	@echo "== drawing demo/sheet.png"
	@$(BIN)/openbagel demo

venv: $(VENV)/.dev  ## set up .venv with everything a developer needs

test: lint  ## lint, types and the quick tests
	@echo "== quick tests"
	@$(BIN)/python -m pytest -q --durations=10 -n $(JOBS) --dist loadfile -m "not slow"

test-slow: $(VENV)/.dev  ## the tests that take minutes
	@echo "== slow tests"
	@$(BIN)/python -m pytest -q --durations=10 -m slow; code=$$?; \
	if [ $$code -eq 5 ]; then echo "there is no slow test"; else exit $$code; fi

lint: $(VENV)/.dev  ## ruff and pyright, changing nothing
	@echo "== ruff"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@echo "== pyright"
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev  ## let ruff reformat and repair what it can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean:  ## remove caches, builds and demo/ (keeps .venv)
	rm -rf build dist demo .pytest_cache .ruff_cache .hypothesis
	find openbagel tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@python="$(PYTHON)"; \
	for candidate in python3.13 python3.12 python3.11 python3; do \
	  if [ -z "$$python" ] && $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then python=$$candidate; fi; \
	done; \
	if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "openbagel needs Python 3.11 or newer; found $${python:-none}."; \
	  echo "Install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; \
	fi; \
	echo "== making $(VENV) with $$python"; \
	"$$python" -m venv --clear $(VENV) || { rm -rf $(VENV); \
	  echo "That Python cannot make environments (on Debian and Ubuntu: apt install python3-venv)."; exit 1; }

# torch goes first and alone, so that TORCH_INDEX rules it and nothing else.
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing $(TORCH) (the large one)"
	@$(PIP) install -q --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@echo "== installing openbagel and what it needs"
	@$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@echo "== installing the developer's tools"
	@$(PIP) install -q -c constraints.txt -e ".[dev]"
	@touch $@
