# make demo: installs into .venv, trains a first model, samples it.  make test: installs and runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo digits test lint bench results smoke format

demo: $(STAMP)
	$(BIN)/python scripts/demo.py

digits: $(STAMP)
	$(BIN)/python scripts/demo.py digits

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

smoke: $(STAMP)
	$(BIN)/python -m pytest -q -m smoke

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m pip install -q -e '.[bench]'
	$(BIN)/python benchmarks/run.py

results: $(STAMP)
	$(BIN)/python scripts/results.py

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $(STAMP)
