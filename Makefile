# `make setup` works from nothing: Linux, Python 3.10, 3.11 or 3.12 with its venv module, and PyPI. No GPU is needed.
# A GPU-less machine gets PyPI's CUDA build of torch (several GB) all the same; if pip is told of another index that has
# torch's CPU build (see pytorch.org, "Get started"), pip takes that one, and what follows fits itself to it.

TORCH := 2.13.0
# TorchRec and fbgemm, the only ones that go with this torch (`ctrlib doctor` knows the others).
TORCHREC := 1.8.0

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
# A stamp says that an environment was finished: in this folder, with these files.
KEY := $(shell { echo '$(CURDIR)'; cat Makefile pyproject.toml setup.py; } | sha256sum | cut -c1-16)
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.PHONY: help setup install dev test numeric faults inputs check format demo clean

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 14

setup:  ## make .venv with torch, TorchRec and ctrlib (again: a moment; PYTHON=python3.12 picks a new one's interpreter)
	@if [ -e $(VENV)/.setup-$(KEY) ] && $(PY) -m ctrlib.doctor --quick >/dev/null 2>&1; then
	    echo 'ctrlib is installed in $(VENV)'
	else
	    $(MAKE) --no-print-directory install
	fi

# The order matters. torch comes first, because which fbgemm is right depends on the torch that came (the two fbgemm
# packages overwrite each other). Then TorchRec, without its dependencies, one of which is the CUDA build of fbgemm.
install:
	@is_ours() { grep -qsF '$(CURDIR)/$(VENV)' $(VENV)/bin/activate && [ ! -e $(VENV)/.unfinished ]; }
	if ! { is_ours && $(PY) -c '$(SUITABLE)' && $(PY) -m pip --version; } >/dev/null 2>&1; then
	    python= candidates=$${PYTHON:-python3 python3.12 python3.11 python3.10}
	    for candidate in $$candidates; do  # run each: what is on the PATH may be a stub that fails
	        if "$$candidate" -c '$(SUITABLE)' >/dev/null 2>&1; then python=$$candidate; break; fi
	    done
	    if [ -z "$$python" ]; then
	        echo "None of these is a Python 3.10, 3.11 or 3.12 with its venv module: $$candidates" >&2
	        echo 'Install one (Debian, Ubuntu: sudo apt install python3 python3-venv) or say where one is:' >&2
	        echo '    make setup PYTHON=/path/to/python3.12' >&2
	        exit 1
	    fi
	    echo "==> $(VENV) with $$("$$python" --version)"
	    "$$python" -m venv --clear $(VENV)
	fi
	touch $(VENV)/.unfinished
	rm -f $(VENV)/.setup-* $(VENV)/.dev-*
	echo '==> torch $(TORCH)'
	$(PIP) install torch==$(TORCH)
	fbgemm=$$($(PY) -m ctrlib.doctor --fbgemm)
	echo "==> $$fbgemm, torchrec $(TORCHREC)"
	other=$$([[ $$fbgemm == fbgemm-gpu-cpu==* ]] && echo fbgemm-gpu || echo fbgemm-gpu-cpu)
	if $(PIP) show -q $$other 2>/dev/null; then $(PIP) uninstall -q -y fbgemm-gpu fbgemm-gpu-cpu; fi
	$(PIP) install -q --no-deps $$fbgemm torchrec==$(TORCHREC)
	echo '==> ctrlib'
	CTRLIB_CUDA=0 $(PIP) install -q --no-warn-conflicts -e .
	$(PY) -m ctrlib.doctor
	rm $(VENV)/.unfinished
	touch $(VENV)/.setup-$(KEY)

dev: setup
	@if [ ! -e $(VENV)/.dev-$(KEY) ]; then
	    echo '==> what tests and checks need'
	    CTRLIB_CUDA=0 $(PIP) install -q --no-warn-conflicts -e '.[dev]'
	    touch $(VENV)/.dev-$(KEY)
	fi

test: dev  ## the whole suite: tests/ and the examples in the docstrings (ARGS='-k name' narrows it)
	$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal --durations=15 $(ARGS)

# Every part, the tests of each tower by its name, encoders of numbers, and both engines.
NUMERIC := $(wildcard $(patsubst ctrlib/towers/%,tests/test_%,$(wildcard ctrlib/towers/*.py))) \
	$(patsubst %,tests/test_%.py,conformance towers numeric engines)

numeric: dev  ## the numeric tests as a processor without AVX-512 computes
	ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2 \
	    $(PY) -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(NUMERIC) $(ARGS)

faults: dev  ## small runs, killed at each file operation, stopped and damaged: all must end as if nothing was
	$(PY) tests/damaged_folders.py
	$(PY) tests/commands.py
	$(PY) tests/faults.py $(ARGS)
	$(PY) tests/killed_calls.py $(CALLS)

inputs: dev  ## 10,000 generated tables, whole and damaged: each must be refused by name or be right (ARGS='--help')
	$(PY) tests/generated_inputs.py $(ARGS)

check: dev  ## lint, format, types, and that imports point one way
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_imports.py

format: dev  ## let ruff repair what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

demo: setup  ## download MovieLens 100k, prepare it and train a DCNv2 on it
	$(PY) datasets/movielens_100k.py --out data/movielens_100k
	$(VENV)/bin/ctrlib train data/movielens_100k --model dcnv2 --dropout 0.5 --l2 1e-3 --out runs/demo --overwrite

clean:  ## remove .venv, caches and build leftovers; data/ and runs/ stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
