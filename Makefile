# make demo: train and score on generated patients. make test: every check. make soak: the hardest ones at full size
# (50,000 drawn NIfTI headers, a CT of 512 x 512 x 800, 400 kills in mid-save), half an hour. All install what they need
# into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test soak install clean

demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/surm-seg train --output runs/demo

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/python -m pytest

soak: .venv/installed-dev
	SURM_SOAK=1 SURM_DRAWS=50000 $(BIN)/python -m pytest -s tests/test_headers.py tests/soak

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
