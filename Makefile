# Every command a person needs; `make quickstart` and `make test` do their own set-up.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test check format bench clean

# The set-up alone: exact versions into .venv, this checkout installed in place. Python compiles
# modules when they are first imported; compiling all of them here would take twice as long.
.venv: .venv/.installed
.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --requirement requirements.lock
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

quickstart: .venv/.installed
	$(BIN)/layersweep run configs/quickstart.yaml

test: .venv/.installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.installed
	$(BIN)/python benchmarks/quickstart.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
