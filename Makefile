# make demo    set up, then train a sharded model on real data
# make test    set up, then lint, types, import layers, tests
# DEVICE=cuda  with the CUDA builds of torch and fbgemm (default: cpu)

PYTHON ?= python3
DEVICE ?= cpu
# Further arguments for pip; on a machine that offers both builds of torch, the index of its CPU builds.
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed-$(DEVICE)
SHIM_cpu := ./packaging/fbgemm-gpu-cpu
SHIM_cuda :=
NATIVE := $(wildcard thresher/embeddings/kernels/native/*.cpp thresher/embeddings/kernels/native/*.h) \
	thresher/embeddings/kernels/native/build.py thresher/embeddings/kernels/native/sources.py

.PHONY: setup demo test test-all lint types layers unit wheel peers clean

setup: $(STAMP)

$(STAMP): setup.py pyproject.toml thresher/pins.py packaging/fbgemm-gpu-cpu/pyproject.toml $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Thresher needs Python >= 3.11, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) --disable-pip-version-check -q $(SHIM_$(DEVICE)) -e '.[dev]'
	$(BIN)/python -m pip check
	rm -f $(VENV)/installed-*
	touch $@

demo: setup
	$(BIN)/thresher train examples/completejourney.yaml

test: setup lint types layers unit

test-all: setup lint types layers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ""

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell thresher benchmarks docs examples README.md

types:
	$(BIN)/mypy

layers:
	$(BIN)/lint-imports

unit:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

# The peers that benchmarks compare with; nothing else needs them.
peers: setup
	$(BIN)/python -m pip install $(PIP_ARGS) -q -r benchmarks/peers.txt --no-deps

clean:
	rm -rf $(VENV) build *.egg-info
