# `make demo` and `make test`; `make test-all` adds the slow tests. Everything lands in .venv; PYTHON names another interpreter (>= 3.11).
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all lint clean

demo: $(VENV)/core-installed
	rm -rf demo-pruned demo-pruned-recovered
	$(VENV)/bin/minillm-jax demo --output demo-pruned

test: $(VENV)/test-installed lint
	$(VENV)/bin/python -m pytest

test-all: $(VENV)/test-installed lint
	$(VENV)/bin/python -m pytest -m "slow or not slow"

lint: $(VENV)/test-installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

$(VENV)/core-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/test-installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) demo-pruned demo-pruned-recovered
