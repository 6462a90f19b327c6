# Each target sets up what it needs. `make demo` and `make test` are the two commands of the README.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RUNTIME := $(VENV)/.runtime-installed
TOOLS := $(VENV)/.tools-installed

.PHONY: help setup demo test test-metal lint check doctor verify-demo bench-demo clean
help:
	@echo "make demo   convert the demo checkpoint and ask it a question"
	@echo "make test   run the whole test suite"
	@echo "make lint   ruff and the type checker"
	@echo "make check  lint and test: what continuous integration runs"
	@echo "make doctor, test-metal, verify-demo, bench-demo  what it runs on a Mac besides"
	@echo "make clean  remove the environment and build products"

$(RUNTIME): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mlx-gptoss needs Python 3.11 or newer, got $$($(PYTHON) --version); set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install -qq --editable .
	@touch $@

$(TOOLS): $(RUNTIME)
	$(PY) -m pip install -qq --editable '.[test]'
	@touch $@

setup: $(TOOLS)

demo: $(RUNTIME)
	$(VENV)/bin/mlx-gptoss generate --model demo "What is the capital of France?"

test: $(TOOLS)
	$(PY) -m pytest -n auto

lint: $(TOOLS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright --pythonpath $(PY) --warnings

check: lint test

test-metal: $(TOOLS)  # on the GPU of a Mac; elsewhere each test says why it is skipped
	$(PY) -m pytest -m metal

doctor: $(RUNTIME)  # describes the machine; what it advises is no failure here
	-$(VENV)/bin/mlx-gptoss doctor

verify-demo: $(RUNTIME)
	$(VENV)/bin/mlx-gptoss verify demo

bench-demo: $(RUNTIME)
	$(VENV)/bin/mlx-gptoss bench demo --depths 64,256 --answer 16 --save build/bench

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
