# Every target sets up all it needs, in .venv here, from a fresh clone with python3, g++ and make.
# CUDA kernels are compiled where nvcc is found. Packages have the versions of constraints.txt, which were
# found with Python 3.11: for a Python that they do not have wheels for, CONSTRAINTS=/dev/null takes newer
# ones. Another torch, in an environment of its own:
#     make pytest VENV=.venv-2.11 TORCH=2.11.0 TORCHVISION=0.26.0
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
TORCH ?=
TORCHVISION ?=
ifneq ($(TORCH),)
ifeq ($(TORCHVISION),)
$(error TORCH=$(TORCH) needs the TORCHVISION= that goes with it)
endif
ifeq ($(VENV),.venv)
$(error TORCH=$(TORCH) needs an environment of its own: VENV=.venv-$(TORCH))
endif
endif
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
PINS := $(abspath $(VENV))/constraints.txt
# By the environment, because pip takes them there for the packages that a build needs, too.
PIP := PIP_CONSTRAINT=$(PINS) PIP_BUILD_CONSTRAINT=$(PINS) $(BIN)/pip
SOURCES := $(wildcard csrc/* csrc/*/*)
TO_FORMAT := $(filter %.h %.cuh %.cpp %.cu,$(SOURCES) $(wildcard tests/emulated/*))

# One GPU architecture and its PTX, which takes half the time of the two that `pip install .` compiles for.
export OCSFAST_CUDA_ARCHS ?= 90

# A thread that waits gives its core away: where something else runs as well, spinning made an epoch
# of the demo five to ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test pytest test-oldest sanitize sanitized fuzz-sanitized emulated emulated-tests fuzz-emulated without-gpu bench bench-gpu quality lint docs clean

setup: $(STAMP)

# torch and torchvision come in one call, so that pip picks two that fit each other. Beside another torch,
# setuptools is free too: torch 2.11 wants an older one. pip itself comes first: that of Debian 12 (23.0) had
# not found versions that go together after eight minutes.
$(STAMP): pyproject.toml setup.py build_backend.py $(CONSTRAINTS) $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	cp $(CONSTRAINTS) $(PINS)
	$(if $(TORCH),sed -i '/^\(torch\|torchvision\|setuptools\)==/d' $(PINS))
	$(if $(TORCH),printf 'torch==%s\ntorchvision==%s\n' $(TORCH) $(TORCHVISION) >> $(PINS))
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet torch torchvision
	$(PIP) install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m ocsfast.train

# The fuzzers are one thread each, and run beside what comes next. The site is built by a test.
test: setup lint pytest
	$(MAKE) sanitized
	$(MAKE) -j2 fuzz-sanitized emulated-tests
	$(MAKE) -j2 fuzz-emulated without-gpu

# The program for a GPU, as far as a CPU can run it.
without-gpu:
	STAGES="machine smoke times launches steps training throughput ncu memcheck" \
		PYTHON=$(BIN)/python bash bench/gpu.sh --device cpu

# Two processes of one thread each: the tests are small, and threads would wait for each other.
pytest: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# With the oldest torch that pyproject.toml admits.
test-oldest:
	$(MAKE) pytest VENV=.venv-oldest TORCH=2.10.0 TORCHVISION=0.25.0

# The ops under AddressSanitizer and UBSan, with random arguments, right and spoilt. The interpreter is not
# built with them, so their libraries have to be loaded before it; what Python keeps to its end is no leak.
SANITIZED := build/sanitized
FUZZ_SECONDS ?= 20
sanitized: setup
	CXX="g++ -fsanitize=address,undefined -fno-sanitize-recover=undefined" CXXFLAGS="-O0 -g1" OCSFAST_CUDA=0 \
		$(PIP) install --quiet --no-deps --upgrade --target $(SANITIZED) .

fuzz-sanitized:
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) \
		$(BIN)/python tests/fuzz_ops.py --seconds $(FUZZ_SECONDS)

sanitize: sanitized
	$(MAKE) fuzz-sanitized

# CUDA's own sources, with fibers for threads, under UBSan: the tests of the ops, the CPU's bits where no sum
# takes part, and random right arguments.
# Deterministic mode fills memory that an op has yet to write with NaN.
EMULATED := $(abspath build/emulated)
EMULATED_SECONDS ?= 15
OP_TESTS := $(patsubst %,tests/ops/test_%.py,group_saliency shrink lasso_grad sgd_step adamw_step partition compare smoke streams walk)
emulated-tests: setup
	CXX="g++ -fsanitize=undefined -fno-sanitize-recover=undefined" CXXFLAGS="-O1 -g1" OCSFAST_CUDA=emulated \
		$(PIP) install --quiet --no-deps --upgrade --target $(EMULATED) .
	PYTHONPATH=$(EMULATED) OMP_NUM_THREADS=1 \
		$(BIN)/pytest -n 2 -p no:cacheprovider $(OP_TESTS)
	$(BIN)/python tests/bits.py --write build/bits.pt
	PYTHONPATH=$(EMULATED) $(BIN)/python tests/bits.py --against build/bits.pt

fuzz-emulated:
	PYTHONPATH=$(EMULATED) $(BIN)/python tests/fuzz_ops.py --right --seconds $(EMULATED_SECONDS)

emulated: emulated-tests
	$(MAKE) fuzz-emulated

# Every op and step beside its roof and its peers: a quarter of an hour on two cores. BENCH="--models ResNet50" for less.
BENCH_RUN := $(BIN)/pytest bench -o python_files='bench_*.py' -o python_functions='bench_*' --benchmark-quiet
bench: setup
	$(BENCH_RUN) --benchmark-json=bench/results/cpu.json $(BENCH)
	$(BIN)/python bench/table.py bench/results/cpu.json
	$(BIN)/python bench/end_to_end.py

# One plan of bench/quality/plans: its runs, then a table. Interrupted, it goes on where it was. The others'
# results are in bench/quality/results; PLAN=cpu IMAGES=FOLDER makes them again, in hours.
PLAN ?= small
IMAGES ?=
QUALITY := build/quality/$(PLAN).jsonl
quality: setup
	$(BIN)/python bench/quality/run.py bench/quality/plans/$(PLAN).yaml --images '$(IMAGES)' \
		--workers 2 --out $(QUALITY)
	$(BIN)/python bench/quality/page.py --results $(QUALITY)

bench-gpu:
	bash bench/gpu.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run -Werror $(TO_FORMAT)

# The documentation as a site, in build/site; a broken link or anchor is an error. Needs no network once set up.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv* build dist runs *.egg-info
	find ocsfast -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
