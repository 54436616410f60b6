# The main commands are `make demo` and `make test`. Both create .venv if it is missing.

PYTHON ?= python3
# Options for pip, for example PIP_ARGS="--find-links /wheels" to use a CPU build of torch from there.
PIP_ARGS ?=
# Versions of packages: pinned (constraints.txt), newest, or oldest (setup.py's lower bounds, by uv).
PACKAGES ?= pinned
# Parallel test processes; each may need 2 GB.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS)
INSTALL_pinned := $(PIP) -c constraints.txt
INSTALL_newest := $(PIP)
INSTALL_oldest := uv pip install --python $(BIN)/python --resolution lowest-direct
# Virtual environment of the second host, ESPnet's s3prl.
ESPNET_VENV ?= .venv-espnet
ESPNET_BIN := $(ESPNET_VENV)/bin
ESPNET_INSTALLED := $(ESPNET_VENV)/.installed
ESPNET_TESTS := espnet chain s3prl_distribution run_module fine_tuning doctor compat upstream package_in_s3prl

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-all test-espnet docs fuzz lint format setup clean

help:
	@echo "make demo    three tiny teachers -> one student, evaluated on a synthetic corpus"
	@echo "make test    lint, types and tests, in about 9 minutes"
	@echo "make test-all   the slow tests too, those of tools/, and 1,000 random inputs for each reader"
	@echo "make test-espnet   what depends on s3prl, with ESPnet and its s3prl, in .venv-espnet (20 minutes)"
	@echo "make docs    the documents as HTML: docs/_build/html/index.html"
	@echo "make fuzz    10,000 random inputs for each file reader (hours; for a nightly job)"
	@echo "make format  format the code with ruff"
	@echo "make clean   remove both environments, demo_run and docs/_build"

demo: $(INSTALLED)
	$(BIN)/s3prl-ekd demo demo_run

test: lint
	$(PYTEST)

test-all: lint
	FUZZ_EXAMPLES=1000 $(PYTEST) -m ""

test-espnet: $(ESPNET_INSTALLED)
	OMP_NUM_THREADS=1 $(ESPNET_BIN)/python -m pytest -m "" $(ESPNET_TESTS:%=tests/test_%.py)

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -q -b html -n -W --keep-going docs docs/_build/html
	@echo "docs/_build/html/index.html"

fuzz: $(INSTALLED)
	FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest -n 0 tests/test_fuzz.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(INSTALLED)

$(INSTALLED): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))" || \
		{ echo "error: $(PYTHON) is not Python 3.10 to 3.13; type: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL_$(PACKAGES)) -e ".[dev]"
	touch $@

# ESPnet's wheel is for Python 3.12 and later; what it needs is in tests/requirements_espnet.txt.
$(ESPNET_INSTALLED): setup.py requirements-espnet.txt tests/requirements_espnet.txt
	$(PYTHON) -m venv $(ESPNET_VENV)
	$(ESPNET_BIN)/python -m pip install --no-deps --ignore-requires-python $(PIP_ARGS) espnet==202611
	$(ESPNET_BIN)/python -m pip install $(PIP_ARGS) -r tests/requirements_espnet.txt
	$(ESPNET_BIN)/python -m pip install $(PIP_ARGS) -r requirements-espnet.txt
	$(ESPNET_BIN)/python -m pip install --no-deps $(PIP_ARGS) -e .
	touch $@

clean:
	rm -rf $(VENV) $(ESPNET_VENV) demo_run docs/_build
