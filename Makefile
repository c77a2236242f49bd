# Every target creates .venv on first use, from the versions pinned in pyproject.toml, and needs no more than
# Python 3.11+, pip and make.
#   make properties PYTEST_FLAGS="--hypothesis-profile=deep"
#   make test PYTHON=python3.12 VENV=/tmp/venv PIP_FLAGS="--index-url ..."
PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
PYTEST_FLAGS ?=
FAULTS_FLAGS ?=
SEEDS ?= 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check --quiet
ready := $(VENV)/.ready
peers := $(VENV)/.peers

# One thread per worker: the workers share the cores.
export OMP_NUM_THREADS = 1

.PHONY: properties deep faults alarms test lint format bench sanitize clean

properties: $(ready)
	$(python) -m pytest -n auto $(PYTEST_FLAGS) properties/

# Plants one small fault after the other and asks which laws notice.
faults: $(ready)
	$(python) -m faults $(FAULTS_FLAGS)

# The correct backends, with other examples each time: make alarms SEEDS="7 8" PYTEST_FLAGS="--backends chunk"
alarms: $(ready)
	for seed in $(SEEDS); do \
		echo "seed $$seed"; $(python) -m pytest -q -n auto --hypothesis-seed=$$seed $(PYTEST_FLAGS) properties/ || exit; \
	done

# More than 20,000 examples of each backend; the interpreted kernels would take too long.
deep: $(ready)
	$(python) -m pytest -n auto --hypothesis-profile=deep --backends recurrent,chunk,log $(PYTEST_FLAGS) properties/

test: $(ready)
	$(python) -m pytest -n auto $(PYTEST_FLAGS) tests/

lint: $(ready)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

format: $(ready)
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

bench: $(peers)
	$(python) -m benchmarks.cpu

# Needs a GPU, the CUDA toolkit, and torch in $(PYTHON).
sanitize:
	for tool in memcheck racecheck initcheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m tests.sanitize || exit; \
	done

# `pip install --group` came with pip 25.1.
$(ready): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'titans needs Python 3.11 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(pip) install $(PIP_FLAGS) 'pip>=25.1'
	$(pip) install $(PIP_FLAGS) --group dev
	$(pip) install $(PIP_FLAGS) --only-binary gmpy2 --group fast \
		|| echo 'no wheel of gmpy2 for this Python: the oracle works without it, more slowly' >&2
	touch $@

$(peers): $(ready)
	$(pip) install $(PIP_FLAGS) --group peers
	touch $@

clean:
	rm -rf dist build .hypothesis .mypy_cache .pytest_cache .ruff_cache $(if $(filter .venv,$(VENV)),.venv)
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
