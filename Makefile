# make bench: set up and run the quick sweep.  make test: set up, lint, types, tests.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: bench test lint types tests clean

bench: $(VENV)/.installed
	$(BIN)/cpbench run quick --out results/quick

test: lint types tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

# Three workers on two cores: launchers, Slurm and time limits are mostly waited for.
tests: $(VENV)/.installed $(VENV)/mpich/bin/mpiexec $(VENV)/.retrieval
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder \
		--durations=40 --durations-min=5

# The constraints hold pip to one torch: an open range may fetch several GB of CUDA libraries.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# The other MPI, for the tests, out of the way of the first.
$(VENV)/mpich/bin/mpiexec: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps \
		--ignore-installed --prefix $(VENV)/mpich mpich
	touch $@

# hnswlib has no wheels: without a compiler or Python's headers its tests are skipped.
$(VENV)/.retrieval: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[retrieval]" \
		|| echo "hnswlib could not be built; its tests will be skipped"
	touch $@

clean:
	rm -rf $(VENV) results build dist *.egg-info
