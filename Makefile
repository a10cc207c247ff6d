# make demo: from nothing to a trained ViL segmentor. make test, make lint: what CI runs.

PYTHON ?= python3
VENV ?= .venv
DATA ?= data/demo
WORK_DIR ?= work_dirs/demo

BIN := $(VENV)/bin
UV := $(BIN)/uv
INSTALLED := $(VENV)/installed
CONFIG := configs/upernet_vil_t_demo.py

.DELETE_ON_ERROR:
.PHONY: help install demo test test-full lint lock clean

help:
	@echo "make demo       train ViL-T + UperNet on a small data set, evaluate, draw pictures"
	@echo "make test       run the tests (less than 15 minutes on 2 cores)"
	@echo "make test-full  run the slow tests too"
	@echo "make lint       check the style"
	@echo "make install    only make $(VENV)"
	@echo "make clean      remove $(VENV), $(DATA) and $(WORK_DIR)"
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter (3.10 to 3.13);"
	@echo "UV_TORCH_BACKEND=cpu installs PyTorch without CUDA, which saves about 4 GB."

# -- Environment ---------------------------------------------------------------------------------

install: $(INSTALLED)

$(INSTALLED): requirements/dev.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "mmvil needs Python 3.10 or later: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(UV) pip install --python $(BIN)/python -r requirements/dev.txt
	$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

# CUDA's libraries are left out of the list: PyTorch pins them itself, and its CPU build has none.
lock: $(INSTALLED)
	$(UV) pip compile --quiet --universal --python-version 3.10 --no-annotate \
		--custom-compile-command 'make lock' requirements/dev.in \
		| grep -v -E '^(nvidia|cuda)-|^triton=' > requirements/dev.txt

# -- Demo ----------------------------------------------------------------------------------------

demo: $(INSTALLED)
	$(BIN)/python tools/dataset_converters/make_demo_dataset.py $(DATA)

# -- Checks --------------------------------------------------------------------------------------

test: $(INSTALLED)
	$(BIN)/python -m pytest -q --durations=10 -m 'not slow'

test-full: $(INSTALLED)
	$(BIN)/python -m pytest -q --durations=20

lint: $(INSTALLED)
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) $(DATA) $(WORK_DIR)
