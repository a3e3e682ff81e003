PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FLOOR ?= .venv-floor
# for the floor, another build of torch than the one on PyPI can be named here
TORCH ?= 2.6.0

.PHONY: help demo app test test-all test-floor tables leaderboard bench docs lint clean

help:
	@echo "make demo   train a CAPT adapter on handwritten digits, measure it, load it back (about 5 minutes)"
	@echo "make test   run the tests"
	@echo "make test-all  and those that take minutes"
	@echo "make test-floor  with the oldest packages that it runs with, on Python 3.11 (TESTS=... for some of them)"
	@echo "make app    a page to try the demo's adapter on"
	@echo "make tables rebuild docs/results from the lines of the benchmarks"
	@echo "make leaderboard  rebuild docs/leaderboard from the same lines"
	@echo "make bench  what a training step costs, beside the published one (10 minutes on 2 cores, 13 GB of memory)"
	@echo "make docs   build the documentation into build/"
	@echo "make lint   ruff and mypy"
	@echo "make clean  remove the environment and everything that was made"

demo: $(VENV)/ready
	$(BIN)/capt-peft demo

app: $(VENV)/ready
	$(BIN)/capt-peft app

# each worker has one thread and takes a file at a time, so that a file's fixtures are made once
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-all: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" -n auto --dist loadfile

test-floor: $(FLOOR)/ready
	OMP_NUM_THREADS=1 $(FLOOR)/bin/python -m pytest -n auto --dist loadfile $(TESTS)

tables: $(VENV)/ready
	for lines in docs/results/*/lines.jsonl; do \
		$(BIN)/capt-peft report $$lines --output $$(dirname $$lines) > /dev/null || exit 1; done

leaderboard: $(VENV)/ready
	$(BIN)/capt-peft leaderboard docs/results/*/lines.jsonl --output docs/leaderboard

bench: $(VENV)/ready
	$(BIN)/python benchmarks/step.py

# a warning about a docstring fails it too, which --strict lets pass
docs: $(VENV)/ready
	@mkdir -p build
	$(BIN)/zensical build --clean --strict > build/docs.log 2>&1; status=$$?; cat build/docs.log; exit $$status
	@! grep -n griffe build/docs.log

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the environment: made anew whenever the dependencies change
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(FLOOR)/ready: pyproject.toml constraints-floor.txt
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints-floor.txt torch==$(TORCH) --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) $(FLOOR) outputs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
