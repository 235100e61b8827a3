# make demo: trains a small vocoder in minutes and compares it with pretrained weights.
# make browser: builds the page that vocodes in the browser, and serves it on this machine.
# make test: runs every check that a change must pass.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet

# Without an NVIDIA GPU, PyTorch's CPU build is enough: 0.2 GB instead of 5 GB. pip takes the default
# build where this index cannot be reached.
ifeq ($(shell command -v nvidia-smi 2>/dev/null || true),)
CPU_BUILD := --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu
endif

# The versions that make test uses: PyTorch as measured in docs/, or the oldest or the newest versions
# that requirements.txt allows.
DEPENDENCIES ?= measured
VERSIONS_measured := echo torch==2.13.0
VERSIONS_oldest := sed 's/>=/==/' requirements.txt
VERSIONS_newest := true

.PHONY: demo browser test clean

# pesq has no wheels. Without a C compiler the demonstration leaves this metric out.
demo: $(BIN)/python
	$(PIP) --no-deps $(CPU_BUILD) torch
	$(PIP) -r requirements.txt -r requirements-demo.txt
	$(PIP) pesq || echo "pesq is left out: it needs a C compiler"
	$(BIN)/python demo/learn_a_voice.py

browser: $(BIN)/python
	$(PIP) --no-deps $(CPU_BUILD) torch
	$(PIP) -r requirements.txt onnx
	$(BIN)/python demo/browser/build.py --serve

test: $(BIN)/installed-$(DEPENDENCIES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(BIN)/installed-$(DEPENDENCIES): $(wildcard requirements*.txt) | $(BIN)/python
	rm -f $(BIN)/installed-*
	$(VERSIONS_$(DEPENDENCIES)) > $(BIN)/versions.txt
	$(PIP) --no-deps $(CPU_BUILD) --constraint $(BIN)/versions.txt torch
	$(PIP) --constraint $(BIN)/versions.txt -r requirements.txt -r requirements-dev.txt
	$(PIP) --no-deps -r requirements-nodeps.txt
	touch $@

clean:
	rm -rf .venv demo_output demo/browser/site
