# On a fresh machine `make demo` and `make test` first create .venv and install into it.
# Prerequisites: Python 3.11 with pip and its headers, make, a C++ compiler.
#
#   make test PYTHON=/path/to/python    uses that interpreter as it is and installs nothing
#   make test VENV=/path/to/venv        puts the virtual environment elsewhere

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo bench docs reference test test-unit test-parallel-full soak operators campaigns campaign-kills campaign-corruption campaign-hostile \
        campaign-equivalence campaign-memory mutation locate record-trials record-cost relay eval-check ascend-lower gpu-check npu-check mindformers-check matrix matrix-ci docs-check plan-check plan-steps plan-monotone plan-table asan lint format lock clean

VENV ?= .venv
EXTRAS := ms,pt,serve,data,tokenizers,completion,dev
# Three for two cores: a launch of several processes often waits, for imports and for its slowest rank. Measured on two
# cores: 20 minutes in place of 26.
WORKERS ?= 3
DISTRIBUTED = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PYTEST_ARGS ?=
CAMPAIGN_ARGS ?=
PROCESSOR ?= EPYC
BENCH_ARGS ?=
GPU_ARGS ?=
MATRIX_ARGS ?=
MINDFORMERS_VENV ?= build/mindformers
DOCS_VENV ?= build/docs-venv

# PYTHON is used only from make's command line: the variable is often set in environments for other reasons.
ifeq ($(origin PYTHON),command line)
RUN := $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

help:
	@echo "make demo       train in both frameworks, compare, resume across, generate (3 minutes on 2 cores once installed)"
	@echo "make test       lint and all tests but the full matrix of layouts (20 minutes on 2 cores with installation)"
	@echo "make test-unit  the fast tests (about a minute)"
	@echo "make test-parallel-full  every parallel layout of up to 8 processes, in both frameworks"
	@echo "make soak       2,000 mixed requests and 5,000 invalid ones against the server (1 minute)"
	@echo "make campaigns  kills, corruption, hostile inputs, random equivalence, memory; CAMPAIGN_ARGS reach each (an evening)"
	@echo "make mutation   plant every fault of the catalogue in both twins; the share that the suite's bounds see (10 minutes)"
	@echo "make locate     name the operator and layer of 104 planted faults in each twin, from records (6 minutes)"
	@echo "make record-trials  sketches' error bars and single wrong elements of gradients, 1,000 trials each (4 minutes)"
	@echo "make record-cost  what a recorded step takes beside a plain one, in both frameworks; CAMPAIGN_ARGS='--rows 1' (2 minutes)"
	@echo "make relay      runs that change framework, layout, length, size or adapter midway, against their envelope (an hour)"
	@echo "make eval-check  train a small model on two IQ tasks and see its scores rise, in both frameworks (10 minutes)"
	@echo "make bench      all tables of tele bench, small to large, and bench.json; BENCH_ARGS='--only step save' (an hour)"
	@echo "make operators  compile the C++ operators now and not on first use"
	@echo "make ascend-lower  compile every Triton kernel for Ascend910B3 as far as a machine without one can (1 minute)"
	@echo "make gpu-check  tests and benchmarks of a machine with a GPU; leaves gpu-check.json"
	@echo "make npu-check  benchmarks of a machine with an Ascend; leaves npu-check.json"
	@echo "make mindformers-check  converted weights in MindFormers' own networks, in an environment of its own"
	@echo "make plan-steps  measured against predicted seconds of a step on this machine, idle (PROCESSOR=EPYC, 4 minutes)"
	@echo "make plan-monotone  500 random machines and models: better ones never make the best plan worse (10 minutes)"
	@echo "make plan-check  measured against predicted peak memory of 23 small trainings in both frameworks (an hour)"
	@echo "make plan-table  search the tables of best layouts in docs/parallel.md anew (2 minutes)"
	@echo "make matrix     goldens, parity, conversion and exports in environments of other versions; writes docs/matrix.md"
	@echo "make matrix-ci  exported folders in transformers 5, over the installed packages (half a minute); skipped without an index"
	@echo "make asan       the C++ operators under the address sanitizer (2 minutes)"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documentation as a site in English and Chinese, into build/site (1 minute)"
	@echo "make docs-check that site in a browser: accessibility, console, requests elsewhere, width"
	@echo "make reference  write docs/reference and the figures of the README anew from the program"
	@echo "make format     let ruff rewrite the files"
	@echo "make install    only create $(VENV) and install into it"
	@echo "make lock       write requirements.lock anew from pyproject.toml"
	@echo "make clean      remove $(VENV) and caches"

install: $(READY)

demo: operators
	$(RUN) -m telechat_twins.core.cli demo

bench: operators
	$(RUN) -m telechat_twins.core.bench.suite $(BENCH_ARGS)

# loadfile keeps the tests of a file in one process, so that what a file launches is launched once; tests/conftest.py
# gives the order of the files. One thread each: with more, idle OpenMP threads of one worker spin on the core that the
# other worker needs (measured: ten times slower).
test test-unit test-parallel-full: export OMP_NUM_THREADS := 1
test test-unit test-parallel-full: export OMP_WAIT_POLICY := PASSIVE
# Hundreds of processes import the same files; where this is set, each would compile them again (half a second).
test test-unit test-parallel-full: export PYTHONDONTWRITEBYTECODE :=
test: lint operators
	$(RUN) -m tests.size_report
	$(RUN) -m pytest tests -m "not full" $(DISTRIBUTED) --durations=15 $(PYTEST_ARGS)

test-unit: operators
	$(RUN) -m pytest tests/unit $(DISTRIBUTED) --durations=5 $(PYTEST_ARGS)

# One launch at a time: eight processes already share the cores.
test-parallel-full: operators
	$(RUN) -m pytest tests -m full --durations=0 $(PYTEST_ARGS)

soak: operators
	$(RUN) -m tests.support.serve_soak --backend pt
	$(RUN) -m tests.support.serve_soak --backend ms

campaigns: campaign-kills campaign-corruption campaign-hostile campaign-equivalence campaign-memory

campaign-kills: operators
	$(RUN) -m tests.campaigns.kills $(CAMPAIGN_ARGS)

campaign-corruption: operators
	$(RUN) -m tests.campaigns.corruption $(CAMPAIGN_ARGS)

eval-check: operators
	$(RUN) -m tests.campaigns.eval_check $(CAMPAIGN_ARGS)

campaign-hostile: operators
	$(RUN) -m tests.campaigns.hostile_files $(CAMPAIGN_ARGS)
	$(RUN) -m tests.campaigns.hostile_requests $(CAMPAIGN_ARGS)

campaign-equivalence: operators
	$(RUN) -m tests.campaigns.equivalence $(CAMPAIGN_ARGS)

plan-check: operators
	$(RUN) -m tests.campaigns.plan_check $(CAMPAIGN_ARGS)

docs-check: docs
	$(RUN) -m tests.campaigns.docs_site $(CAMPAIGN_ARGS)

plan-steps: operators
	$(RUN) -m tests.campaigns.plan_steps --label $(PROCESSOR) --machines $(CAMPAIGN_ARGS)

plan-monotone:
	$(RUN) -m tests.campaigns.plan_monotone $(CAMPAIGN_ARGS)

plan-table:
	$(RUN) -m tests.campaigns.plan_table $(CAMPAIGN_ARGS)

campaign-memory: operators
	$(RUN) -m tests.campaigns.memory $(CAMPAIGN_ARGS)

mutation: operators
	$(RUN) -m tests.mutation $(CAMPAIGN_ARGS)

locate: operators
	$(RUN) -m tests.campaigns.locate $(CAMPAIGN_ARGS)
	$(RUN) -m tests.campaigns.locate_layouts

record-trials: operators
	$(RUN) -m tests.campaigns.record_trials $(CAMPAIGN_ARGS)

record-cost: operators
	$(RUN) -m tests.campaigns.record_cost --backend pt $(CAMPAIGN_ARGS)
	$(RUN) -m tests.campaigns.record_cost --backend ms $(CAMPAIGN_ARGS)

relay: operators
	$(RUN) -m tests.campaigns.relay $(CAMPAIGN_ARGS)

# Compiled before the tests: otherwise the first process that needs the operators compiles them within its time limit.
operators: $(READY)
	-$(RUN) -m telechat_twins.kernels.cpu.build

ascend-lower: $(READY)
	$(RUN) -m telechat_twins.kernels.triton.lower

gpu-check: $(READY)
	$(RUN) -m telechat_twins.kernels.bench.gpu_check --out gpu-check.json $(GPU_ARGS)

npu-check: $(READY)
	$(RUN) -m telechat_twins.kernels.bench.npu_check --out npu-check.json $(NPU_ARGS)

matrix: operators
	$(RUN) -m tests.campaigns.matrix $(MATRIX_ARGS)

matrix-ci: $(READY)
	$(RUN) -m tests.campaigns.matrix --ci

# In a separate environment: MindFormers pins transformers and other packages that this project does not need.
mindformers-check: $(MINDFORMERS_VENV)/.installed
	$(MINDFORMERS_VENV)/bin/python -m pytest tests/parity/test_mindformers_wheel.py -v $(PYTEST_ARGS)

$(MINDFORMERS_VENV)/.installed: pyproject.toml requirements.lock | $(READY)
	@if [ -e "$(MINDFORMERS_VENV)" ] && [ ! -f "$(MINDFORMERS_VENV)/pyvenv.cfg" ]; then \
	    echo "make: MINDFORMERS_VENV $(MINDFORMERS_VENV) is not a virtual environment; choose another folder" >&2; exit 2; \
	fi
	@echo "installing MindFormers into $(MINDFORMERS_VENV) (minutes on a slow line)"
	rm -rf "$(MINDFORMERS_VENV)"
	$(RUN) -m venv --without-pip "$(MINDFORMERS_VENV)"
	$(RUN) -m pip --python "$(MINDFORMERS_VENV)/bin/python" install -q --disable-pip-version-check \
	    -e '.[ms,mindformers]' $$(grep -E '^(pytest|hypothesis)==' requirements.lock)
	touch "$@"

# The sanitizer's library must be loaded before Python. Python never frees all memory, so leak detection is off.
asan: $(READY)
	LD_PRELOAD=$$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 $(RUN) -m tests.support.cpu_kernel_checks

# mypy finds packages by folders alone; the links give it the folders as telechat_twins/__init__.py does.
lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	mkdir -p build/types/telechat_twins
	ln -sfn $(foreach folder,core convert kernels telechat_ms pt_reference,../../../$(folder)) build/types/telechat_twins/
	$(RUN) -m mypy

reference: $(READY)
	$(RUN) docs/reference.py
	$(RUN) docs/figure.py

# In a separate environment: the site needs nothing of the program but its pages.
docs: reference $(DOCS_VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict

$(DOCS_VENV)/.installed: pyproject.toml | $(READY)
	@if [ -e "$(DOCS_VENV)" ] && [ ! -f "$(DOCS_VENV)/pyvenv.cfg" ]; then \
	    echo "make: DOCS_VENV $(DOCS_VENV) is not a virtual environment; choose another folder" >&2; exit 2; \
	fi
	rm -rf "$(DOCS_VENV)"
	$(RUN) -m venv --without-pip "$(DOCS_VENV)"
	$(RUN) -m pip --python "$(DOCS_VENV)/bin/python" install -q --disable-pip-version-check \
	    $$($(RUN) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	touch "$@"

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# An interrupted installation leaves .installing behind, and the environment is then made anew: pip cannot tell a
# half-unpacked package from a whole one. Only a folder that is a virtual environment is ever removed.
# pip would compile 14,000 files one after another, a minute; compileall does it on all cores. Some packages hold files
# of other Python versions, which do not compile.
$(VENV)/.installed: pyproject.toml requirements.lock
	@set -euo pipefail; \
	remove() { if [ -f "$(VENV)/pyvenv.cfg" ] || [ -f "$(VENV)/.installing" ]; then rm -rf "$(VENV)"; fi; }; \
	whole() { [ ! -e "$(VENV)/.installing" ] && "$(VENV)/bin/python" -c 'import sys, pip; sys.exit(sys.version_info[:2] != (3, 11))'; }; \
	rm -f "$(VENV)/.installed"; \
	if ! whole 2>/dev/null; then \
	    remove; \
	    for python in python3.11 python3 python ""; do \
	        if [ -n "$$python" ] && "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then break; fi; \
	    done; \
	    if [ -z "$$python" ]; then echo "make: Python 3.11 was not found as python3.11, python3 or python; install it and its venv module" >&2; exit 2; fi; \
	    echo "creating $(VENV) with $$python"; \
	    mkdir -p "$(VENV)"; touch "$(VENV)/.installing"; \
	    "$$python" -m venv "$(VENV)" 2>/dev/null \
	        || { "$$python" -m venv --without-pip "$(VENV)" && "$$python" -m pip --python "$(VENV)/bin/python" install -q pip; } \
	        || { echo "make: $$python cannot create a virtual environment; install its venv module (Debian: python3.11-venv) or pip" >&2; exit 2; }; \
	fi; \
	touch "$(VENV)/.installing"; \
	echo "installing into $(VENV) (MindSpore and PyTorch are large; minutes on a slow line)"; \
	"$(VENV)/bin/python" -m pip install -q --no-compile --disable-pip-version-check -c requirements.lock -e '.[$(EXTRAS)]'; \
	"$(VENV)/bin/python" -m compileall -qq -j 0 -x '/tests?/' "$(VENV)/lib" || true; \
	rm -f "$(VENV)/.installing"; \
	touch "$@"

# pip resolves without installing; it fetches most packages all the same, to read what they require.
lock: $(READY)
	@set -euo pipefail; \
	scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	echo "resolving all extras (minutes on a slow line)"; \
	$(RUN) -m pip install -q --disable-pip-version-check --dry-run --ignore-installed --report "$$scratch/report.json" \
	    ".[$$($(RUN) -m tests.lock extras)]"; \
	$(RUN) -m tests.lock "$$scratch/report.json" > "$$scratch/lock"; \
	cp "$$scratch/lock" requirements.lock; wc -l requirements.lock

clean:
	@if [ -f "$(VENV)/pyvenv.cfg" ] || [ -f "$(VENV)/.installing" ]; then rm -rf "$(VENV)"; fi
	rm -rf build .pytest_cache .ruff_cache .mypy_cache .hypothesis ./*.egg-info
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
