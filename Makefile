# `make test` and `make demo` need only Python 3.11+ with venv; the rest is installed into .venv.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: install test lint demo evidence
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	@touch $(STAMP)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --no-error-summary

test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

demo: install
	$(VENV)/bin/dpn demo

evidence: install
	$(VENV)/bin/python benchmarks/evidence.py
