# Everything here works on a fresh machine: each target makes the environment it needs.
#   make demo   train the diffusion view of a tiny base and measure exact parallel decoding
#   make test   all fast tests          make test-slow   the long ones
#   make lint   ruff and mypy           make base        rebuild the tiny base (about half an hour)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
BASE := assets/tiny-base.tar.xz
# Its slow tests run for longer than they compile: not compiled fast (tests/support/fast_compile.py).
LAWS := tests/orthrus_jax/decoding/test_sampling.py

.PHONY: demo base test test-slow test-ends lint format clean

demo: $(VENV)/.demo
	@echo "demo: starts from the trained base in $(BASE) (make base rebuilds it); distils, trains, measures"
	rm -rf runs/demo && mkdir -p runs/demo
	$(BIN)/python -m tarfile --filter data -e $(BASE) runs/demo
	$(BIN)/python -m train.main --config configs/tiny.py
	$(BIN)/python -m eval.demo --run runs/demo

base: $(VENV)/.demo
	$(BIN)/python -m train.pretrain --config configs/tiny.py --config.base=runs/pretrain/base --overwrite
	cd runs/pretrain && ../../$(BIN)/python -m tarfile -c ../../$(BASE) base

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/.test
	$(PIP) install --editable '.[aot]'
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow \
		--ignore $(LAWS)
	XLA_FLAGS= JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 -m slow $(LAWS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The oldest and the newest supported JAX, each in an environment of its own.
test-ends:
	bash .ci/ends

clean:
	rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing orthrus-jax into $(VENV) (a few minutes the first time)"
	$(PIP) install --editable .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "installing orthrus-jax and its test tools into $(VENV) (a few minutes the first time)"
	$(PIP) install --editable '.[test]'
	@touch $@ $(VENV)/.demo
