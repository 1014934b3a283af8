# make demo, make test: each sets up what it needs (its own .venv) and runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint install wheel clean

demo: install
	$(BIN)/expertmesh demo

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "ExpertMesh needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 2; }
	@$(PYTHON) -m venv .venv \
		|| { echo "no venv module: install your system's python3-venv package"; exit 2; }
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

# The wheel holds the demo model too.
wheel: install
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv build dist *.egg-info
