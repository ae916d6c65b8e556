# Two commands, each doing all of its own set-up: `make demo` and `make test`. `make lint` is what CI runs besides;
# `make docs` builds the documentation, and `make test-oldest` runs the suite on the oldest versions that are supported.
PYTHON ?= python3
VENV := .venv
# Installed only where no torch is found. On a machine without a GPU the CPU build comes first: its version, 2.13.0+cpu,
# sorts above the same release with CUDA, so no CUDA packages are pulled in.
TORCH ?= torch==2.13.0
CPU_WHEELS := https://download.pytorch.org/whl/cpu
RUN := $(VENV)/bin
CONSTRAINTS :=

.PHONY: demo test-all test test-oldest venv-transformers-4 lint docs clean

demo: $(VENV)/.installed
	$(RUN)/snp-llm prune tiny-opt --sparsity 0.3 --output tiny-opt-snp-30 --overwrite

# Two processes: much of the suite is fresh processes that import torch.
test: $(VENV)/.installed
	$(RUN)/python -m pytest -n 2

# TORCH=torch==2.6.0 besides, on a machine where no torch is found, tests that version too.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# What takes longest is left out of `make test`.
test-all: $(VENV)/.installed
	$(RUN)/python -m pytest -n 2 -m ""

# One of those tests loads folders in transformers 4 too, and is skipped without this environment.
venv-transformers-4: .venv-transformers-4/.installed

.venv-transformers-4/.installed:
	$(PYTHON) -m venv .venv-transformers-4
	.venv-transformers-4/bin/python -m pip install -q --retries 0 --extra-index-url $(CPU_WHEELS) $(TORCH) 'transformers==4.57.*'
	touch $@

lint: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

docs: $(VENV)/.installed
	$(RUN)/python -m pip install -q -e '.[docs]'
	$(RUN)/mkdocs build --strict

# A torch of the machine's own Python is seen through --system-site-packages and left as it is.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import torch' 2>/dev/null && $(PYTHON) -m venv --system-site-packages $(VENV) || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -c 'import torch' 2>/dev/null || \
	  if command -v nvidia-smi >/dev/null 2>&1; then $(RUN)/python -m pip install -q $(TORCH); \
	  else $(RUN)/python -m pip install -q --retries 0 --extra-index-url $(CPU_WHEELS) $(TORCH); fi
	$(RUN)/python -m pip install -q $(addprefix --constraint ,$(CONSTRAINTS)) -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-transformers-4 build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
