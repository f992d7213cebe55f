# Everything a newcomer or CI types. Needs make and Python >= 3.10; `make` alone lists the targets.
# Paths are relative, so that a clone may lie anywhere, under a name with spaces too.

PYTHON ?= python3
PY     := .venv/bin/python
STAMP  := .venv/.installed
TORCH  := torch==2.13.0
TORCH_CPU_BUILDS := https://download.pytorch.org/whl/cpu

# Data and models come inside packages: no hub is asked. `make lab HF_HUB_OFFLINE=0` allows downloads.
HF_HUB_OFFLINE ?= 1
TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE TOKENIZERS_PARALLELISM

# The stamp holds the folder it was made for: an environment does not survive a move, so a moved clone starts again.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(shell pwd -P))
$(shell rm -f $(STAMP))
endif

.PHONY: help setup tutorial test lab refresh bench
.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make .venv with everything installed in it (4 minutes, 2.5 GB)

tutorial: $(STAMP) ## execute notebooks 00 to 11 into runs/<time>/ (5 minutes)
	$(PY) -m retro_nb run tutorial

test: $(STAMP) ## ruff, the rooms' imports, mypy, the unit tests, every notebook under nbval (10 minutes)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports --no-logo
	$(PY) -m mypy
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -n 2 --dist loadgroup
	@if ls notebooks/*.ipynb >/dev/null 2>&1; then set -x; OMP_NUM_THREADS=1 $(PY) -m pytest \
	  --nbval-lax --nbval-current-env --nbval-cell-timeout 600 -n 2 --dist loadscope notebooks; fi

lab: $(STAMP) ## open copies of the notebooks in JupyterLab, in my_notebooks/, which git ignores
	$(PY) -c "from pathlib import Path; from retro_nb.lab.refresh import copy_notebooks; copy_notebooks(Path('my_notebooks'))"
	$(PY) -m jupyterlab --ServerApp.root_dir=. $(LAB_ARGS) my_notebooks/00_start_here.ipynb

refresh: $(STAMP) ## execute the committed notebooks again, in place
	$(PY) -m retro_nb refresh

bench: $(STAMP) ## measure beside the reference on the CPU, 10 minutes, into README
	for name in embedding neighbours dataset training sampling; do \
	  CUDA_VISIBLE_DEVICES= $(PY) benchmarks/$$name.py || exit 1; done
	$(PY) benchmarks/readme.py

$(STAMP): pyproject.toml constraints.txt Makefile
	@command -v "$(PYTHON)" >/dev/null || { echo "No $(PYTHON) here: install Python 3.10 or newer, or say: make setup PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1), too old: RETRO-nb needs 3.10 or newer. Say: make setup PYTHON=/path/to/newer/python3"; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { rm -rf .venv; "$(PYTHON)" -m venv .venv; } || { rm -rf .venv; echo "$(PYTHON) cannot make virtual environments: install its venv module (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  echo "No NVIDIA GPU: asking for the CPU build of $(TORCH), which saves gigabytes of CUDA"; \
	  $(PY) -m pip install --no-deps --retries 0 --timeout 10 --extra-index-url $(TORCH_CPU_BUILDS) "$(TORCH)" \
	  || echo "No CPU build could be had: installing the usual one"; fi
	$(PY) -m pip install -c constraints.txt -e ".[notebooks,data,scale,test]"
	$(PY) -m pip install --no-deps retro-pytorch==0.3.9
	@pwd -P > $(STAMP)
