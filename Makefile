# Every target sets up all it needs, in .venv here, from a fresh clone with python3, g++ and make.
# CUDA kernels are compiled where nvcc is found.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
SOURCES := $(wildcard csrc/* csrc/*/*)
TO_FORMAT := $(filter %.h %.cuh %.cpp %.cu,$(SOURCES))

# A thread that waits gives its core away: where something else runs as well, spinning made an epoch
# of the demo five to ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test lint clean

setup: $(STAMP)

# torch and torchvision come in one call, so that pip picks two that fit each other.
$(STAMP): pyproject.toml setup.py build_backend.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch torchvision
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m ocsfast.train

test: setup lint
	$(BIN)/pytest
	$(BIN)/python -m ocsfast.train --quick --out runs/quick

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(TO_FORMAT)

clean:
	rm -rf .venv build dist runs *.egg-info ocsfast/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
