# Two commands do everything on a fresh Debian or Ubuntu machine with Python 3.11+: `make demo` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
UV     := $(BIN)/uv
SAME   := $(VENV)/constraints.txt
PIP    := $(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --constraint $(SAME)
# Twice the cores of a small machine, because most tests wait for something.
PYTEST ?= -n 4 --dist worksteal

.PHONY: demo test test-cluster check test-wheel bench schema lock pin-base clean

demo: $(VENV)/.trainer
	$(BIN)/python examples/digits/make_data.py
	$(BIN)/cvlaunch submit examples/digits/digits.yaml --backend local --follow --sync runs
	$(BIN)/cvlaunch report last

test: $(VENV)/.test
	tests/services/install
	$(BIN)/python -m tests.services.image
	$(BIN)/python -m pytest $(PYTEST)

# The promises and the trainings on a real cluster. KEYS: further keys of the target, such as {namespace: vision}.
test-cluster: $(VENV)/.test
	CVLAUNCH_TEST_CONTEXT='$(CONTEXT)' CVLAUNCH_TEST_IMAGE='$(IMAGE)' CVLAUNCH_TEST_OUTPUT='$(OUTPUT)' \
	CVLAUNCH_TEST_BACKEND='$(BACKEND)' CVLAUNCH_TEST_KEYS='$(KEYS)' \
	$(BIN)/python -m pytest tests/test_conformance.py tests/test_kube_training.py -k 'real and not container_backend'

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

# The trainer image's packages, with hashes. UPGRADE=1 takes the newest; else what is locked stays where it fits.
lock: $(VENV)/.uv
	$(BIN)/python trainer_image/lock.py $(if $(UPGRADE),--upgrade)

# The trainer image's base by its digest, as the registry has it now.
pin-base:
	trainer_image/pin-base

clean:
	rm -rf $(VENV) .cache dist build runs

# The lock without its hashes, so that a training here has the packages of the image.
$(SAME): trainer_image/requirements.lock
	mkdir -p $(@D)
	sed -n -e 's/^\([a-z0-9-]*==[^ ]*\) .*/\1/p' -e 's/^opencv-python-headless==/opencv-python==/p' $< > $@

$(VENV)/.uv: $(SAME)
	$(PYTHON) -m venv $(VENV) || { echo "venv is missing: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(SAME) uv
	touch $@

$(VENV)/.trainer: pyproject.toml $(SAME) | $(VENV)/.uv
	$(PIP) --editable '.[trainer,examples]'
	touch $@

$(VENV)/.test: pyproject.toml $(SAME) | $(VENV)/.uv
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/.check: pyproject.toml $(SAME) | $(VENV)/.uv
	$(PIP) --editable '.[check]'
	touch $@
