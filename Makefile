# Every target creates .venv on first use, from the versions pinned in pyproject.toml, and needs no more than
# Python 3.11+, pip and make.
#   make properties PYTEST_FLAGS="--hypothesis-profile=deep"
#   make test PYTHON=python3.12 VENV=/tmp/venv PIP_FLAGS="--index-url ..."
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
PIP_FLAGS ?=
PYTEST_FLAGS ?=
# `make faults FAULTS_FLAGS=` asks every law about every fault, and looks for the smallest problem: many hours.
FAULTS_FLAGS ?= --named --no-shrink
# What the atlas shows beside the maps that are stored.
ATLAS ?= $(wildcard verdicts*.json maps*.json faults*.json benchmarks*.json recall*.json)
SEEDS ?= 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20

python := $(VENV)/bin/python
ready := $(VENV)/.ready
peers := $(VENV)/.peers
oldest := $(OLDEST)/.ready

# One thread per worker: the workers share the cores.
export OMP_NUM_THREADS = 1

.DEFAULT_GOAL := help
.PHONY: help properties atlas deep faults alarms test test-oldest test-gpu lint format bench sanitize clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

properties: $(ready) ## check every law on examples that Hypothesis draws; the main job
	$(python) -m pytest -n auto --progress --verdicts verdicts.json $(PYTEST_FLAGS) properties/

atlas: $(ready) ## draw the verdicts of `make properties`, and measured errors over bounds, as one page: atlas.html
	$(python) -m properties atlas $(wildcard properties/atlas/*.json) $(ATLAS) -o atlas.html

test: $(ready) ## run the unit tests, those of the suite itself too
	$(python) -m pytest -n auto $(PYTEST_FLAGS) tests/

test-oldest: $(oldest) ## run the unit tests with the oldest torch and triton that are supported
	$(OLDEST)/bin/python -m pytest -n auto $(PYTEST_FLAGS) tests/

# On a GPU machine `make test` runs the kernels in Triton's interpreter, too. Here they are compiled.
test-gpu: $(ready) ## run the unit tests that are for a GPU, on a GPU
	$(python) -m pytest -n 8 -m gpu $(PYTEST_FLAGS) tests/

lint: $(ready) ## ruff and mypy
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

format: $(ready) ## let ruff mend and format
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

faults: $(ready) ## plant small faults one by one: the laws named for each must notice it
	$(python) -m faults $(FAULTS_FLAGS)

# make alarms SEEDS="7 8" PYTEST_FLAGS="--backends chunk"
alarms: $(ready) ## run the properties with 20 other seeds: correct backends must pass
	for seed in $(SEEDS); do \
		echo "seed $$seed"; $(python) -m pytest -q -n auto --hypothesis-seed=$$seed $(PYTEST_FLAGS) properties/ || exit; \
	done

# The interpreted kernels would take too long.
deep: $(ready) ## more than 20,000 examples of each PyTorch backend
	$(python) -m pytest -n auto --hypothesis-profile=deep --backends recurrent,chunk,log $(PYTEST_FLAGS) properties/

bench: $(peers) ## time the PyTorch backends against fla-core on the CPU
	$(python) -m benchmarks.cpu

# Needs a GPU, the CUDA toolkit, and torch in $(PYTHON).
sanitize: ## run the kernels under compute-sanitizer on a GPU
	for tool in memcheck racecheck initcheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m tests.sanitize || exit; \
	done

# `pip install --group` came with pip 25.1.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'titans needs Python 3.11 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }
	@echo 'installing the pinned versions into $(1): minutes, once'
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip --disable-pip-version-check --quiet install $(PIP_FLAGS) 'pip>=25.1'
	$(1)/bin/python -m pip --disable-pip-version-check --quiet install $(PIP_FLAGS) --group $(2)
	$(1)/bin/python -m pip --disable-pip-version-check --quiet install $(PIP_FLAGS) --only-binary gmpy2 --group fast \
		|| echo 'no wheel of gmpy2 for this Python: the oracle works without it, more slowly' >&2
	touch $(1)/.ready
endef

$(ready): pyproject.toml
	$(call install,$(VENV),dev)

$(oldest): pyproject.toml
	$(call install,$(OLDEST),oldest)

$(peers): $(ready)
	$(python) -m pip --disable-pip-version-check --quiet install $(PIP_FLAGS) --group peers
	touch $@

clean: ## remove environments and caches
	rm -rf dist build .hypothesis .mypy_cache .pytest_cache .ruff_cache $(filter .venv,$(VENV)) $(filter .venv-oldest,$(OLDEST))
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
