# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
JOBS ?= 2

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/python -m toprovar_jax.generate --prompt "three yellow stars in a night sky" --output_dir $(DEMO)

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests

# Everything but tests/with_torch, for interpreters that have no PyTorch.
test-without-torch: $(VENV)/.without-torch
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests --ignore=tests/with_torch

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

$(VENV)/.without-torch: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable . beartype hypothesis optax psutil pytest \
	  pytest-xdist
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info
