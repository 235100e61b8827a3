# make demo: a vocoder learns a voice in five minutes, in demo/.
# make test: everything that must hold before a change is kept.

PYTHON ?= python3
BIN := .venv/bin

# What make test runs with: the torch that the figures in docs/ were measured with, or the oldest or
# the newest of everything that requirements.txt allows.
DEPENDENCIES ?= measured
VERSIONS_measured := echo torch==2.13.0
VERSIONS_oldest := sed 's/>=/==/' requirements.txt
VERSIONS_newest := true

.PHONY: demo test clean

# pesq has no wheels: without a C compiler the demonstration goes on without that metric.
demo: $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-demo.txt
	$(BIN)/python -m pip install --quiet pesq || echo "no pesq, which needs a C compiler"
	$(BIN)/python demo.py

test: $(BIN)/installed-$(DEPENDENCIES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(BIN)/installed-$(DEPENDENCIES): $(wildcard requirements*.txt) | $(BIN)/python
	rm -f $(BIN)/installed-*
	$(VERSIONS_$(DEPENDENCIES)) > $(BIN)/versions.txt
	$(BIN)/python -m pip install --quiet --constraint $(BIN)/versions.txt \
		-r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-nodeps.txt
	touch $@

clean:
	rm -rf .venv demo
