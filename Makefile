# Two commands do everything on a fresh Debian or Ubuntu machine with Python 3.11+: `make demo` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/uv
PIP    := $(UV) pip install --quiet --compile-bytecode --python $(BIN)/python
PYTEST ?= -n 2

.PHONY: demo test check test-wheel bench schema clean

demo: $(VENV)/.trainer
	$(BIN)/python examples/digits/make_data.py
	$(BIN)/cvlaunch submit examples/digits/digits.yaml --backend local --follow --sync runs
	$(BIN)/cvlaunch report last

test: $(VENV)/.test
	tests/services/install
	$(BIN)/python -m pytest $(PYTEST)

check: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel, alone: no checkout on the path, no extras installed.
test-wheel: $(VENV)/.uv
	$(BIN)/python tests/wheel/check.py

bench: $(VENV)/.test
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

schema: $(VENV)/.check
	$(BIN)/cvlaunch schema > docs/job.schema.json

clean:
	rm -rf $(VENV) .cache dist build runs

$(VENV)/.uv:
	$(PYTHON) -m venv $(VENV) || { echo "venv is missing: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	touch $@

$(VENV)/.trainer: pyproject.toml | $(VENV)/.uv
	$(PIP) --editable '.[trainer,examples]'
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.uv
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/.check: pyproject.toml | $(VENV)/.uv
	$(PIP) --editable '.[check]'
	touch $@
