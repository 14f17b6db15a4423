# Every target creates .venv and installs what it needs, once per change of pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs clean
.NOTPARALLEL:

demo: .venv/.bench
	$(BIN)/python -m benchmarks run demo

test: .venv/.test
	$(BIN)/pytest -n 2 --dist loadfile

lint: .venv/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/lint-imports

# -E reads every page anew, so that the notebooks run against the code as it is now. The examples run as a user runs
# them, without the double precision and the type checks that tests/conftest.py switches on.
docs: .venv/.docs
	$(BIN)/sphinx-build -E -W --keep-going -n -b html docs docs/_build/html
	$(BIN)/pytest --noconftest gn_linear tests/test_readme.py

clean:
	rm -rf .venv docs/_build .pytest_cache .ruff_cache .import_linter_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.%: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
