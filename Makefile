# make demo: a vocoder learns a voice in five minutes, in demo/.
# make test: everything that must hold before a change is kept.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

# pesq has no wheels: without a C compiler the demonstration goes on without that metric.
demo: $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-demo.txt
	$(BIN)/python -m pip install --quiet pesq || echo "no pesq, which needs a C compiler"
	$(BIN)/python demo.py

test: $(BIN)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(BIN)/installed: requirements.txt requirements-demo.txt requirements-dev.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv demo
