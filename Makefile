# Two commands, each doing all of its own set-up: `make demo` and `make test`. `make lint` is what CI runs besides.
PYTHON ?= python3
VENV := .venv
# Installed only where no torch is found. On a machine without a GPU the CPU build comes first: its version, 2.13.0+cpu,
# sorts above the same release with CUDA, so no CUDA packages are pulled in.
TORCH ?= torch==2.13.0
CPU_WHEELS := https://download.pytorch.org/whl/cpu
RUN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(RUN)/snp-llm prune tiny-opt --sparsity 0.3 --output tiny-opt-snp-30 --overwrite

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2  # two processes of one thread each: most tests wait for imports

lint: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

# A torch of the machine's own Python is seen through --system-site-packages and left as it is.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import torch' 2>/dev/null && $(PYTHON) -m venv --system-site-packages $(VENV) || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -c 'import torch' 2>/dev/null || \
	  if command -v nvidia-smi >/dev/null 2>&1; then $(RUN)/python -m pip install -q $(TORCH); \
	  else $(RUN)/python -m pip install -q --retries 0 --extra-index-url $(CPU_WHEELS) $(TORCH); fi
	$(RUN)/python -m pip install -q -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
