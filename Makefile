# make demo: from nothing to a trained ViL segmentor. make test, make lint: what CI runs.

PYTHON ?= python3

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# The OpenMMLab line: maintained, or classic in a separate environment.
STACK ?= maintained
ifeq ($(STACK),classic)
VENV := .venv-classic
REQUIREMENTS := requirements/openmmlab.txt
else
VENV := .venv
REQUIREMENTS := requirements/dev.txt
endif

BIN := $(VENV)/bin
UV := $(BIN)/uv
INSTALLED := $(VENV)/installed

JOBS ?= 2

CONFIG := configs/upernet_vil_t_demo.py
DATA := data/demo
WORK_DIR := work_dirs/demo

# Make waiting threads yield their core early. On a busy machine, training then takes three quarters
# of the time; yielding at once (OMP_WAIT_POLICY=PASSIVE) takes 1.5 times as long on an idle one.
export GOMP_SPINCOUNT ?= 2000

.DELETE_ON_ERROR:
.PHONY: help install lock demo test test-full gpu-report lint build clean

help:
	@echo "make demo        train ViL-T + UperNet on a small dataset, evaluate, plot predictions"
	@echo "make test        run the fast tests (5 to 15 minutes on 2 cores)"
	@echo "make test-full   run all tests with coverage (30 to 60 minutes on 2 cores)"
	@echo "make gpu-report  test and measure the GPU kernels"
	@echo "make lint        check style, format and spelling"
	@echo "make build       build a wheel and a source distribution in dist/"
	@echo "make install     create $(VENV) only"
	@echo "make lock        update the pins in requirements/dev.txt from requirements/dev.in"
	@echo "make clean       remove $(VENV), $(DATA) and $(WORK_DIR)"
	@echo
	@echo "JOBS=8 runs tests in 8 processes instead of 2."
	@echo "STACK=classic uses the classic line of OpenMMLab (Python 3.10)."
	@echo "PYTHON=python3.12 selects the interpreter (3.10 to 3.13)."
	@echo "UV_TORCH_BACKEND=cpu installs PyTorch without CUDA, which saves about 4 GB."

# -- Environment -----------------------------------------------------------------------------------

install: $(INSTALLED)

$(INSTALLED): $(REQUIREMENTS) pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "mmvil needs Python 3.10 or later; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
ifeq ($(STACK),classic)
# mim knows mmcv's wheels, which depend on PyTorch and CUDA, and imports pkg_resources.
	$(UV) pip install --python $(BIN)/python torch==2.1.2 torchvision==0.16.2 'numpy<2' \
		pip openmim 'setuptools>=77,<81'
	$(BIN)/mim install mmcv==2.1.0
endif
	$(UV) pip install --python $(BIN)/python --requirement $(REQUIREMENTS)
	$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# The CUDA libraries are left out: PyTorch's GPU builds pin them, and its CPU build has none.
lock: $(INSTALLED)
	$(UV) pip compile --quiet --universal --python-version 3.10 --no-annotate \
		--custom-compile-command 'make lock' requirements/dev.in \
		| grep -v -E '^(nvidia|cuda)-|^triton=' > requirements/dev.txt.new
	mv requirements/dev.txt.new requirements/dev.txt

# -- Demo ------------------------------------------------------------------------------------------

# Data and training results are kept: `make demo` evaluates and plots again, and resumes an
# interrupted training run. To train from scratch, remove $(WORK_DIR).
demo: export PYTHONWARNINGS ?= ignore
demo: $(WORK_DIR)/trained
	$(BIN)/python tools/test.py $(CONFIG) "$$(cat $(WORK_DIR)/last_checkpoint)" \
		--work-dir $(WORK_DIR)
	$(BIN)/python tools/visualization/plot_log.py $(WORK_DIR) --out $(WORK_DIR)/curve.png
	$(BIN)/python tools/visualization/plot_predictions.py $(CONFIG) \
		"$$(cat $(WORK_DIR)/last_checkpoint)" --out $(WORK_DIR)/predictions.png
	@echo
	@echo "IoU of each class: the table above.  Loss and mIoU: $(WORK_DIR)/curve.png"
	@echo "Pictures: $(WORK_DIR)/predictions.png.  Checkpoint and log: $(WORK_DIR)"

$(DATA)/made: tools/dataset_converters/make_demo_dataset.py | $(INSTALLED)
	$(BIN)/python $< $(DATA)
	@touch $@

$(WORK_DIR)/trained: | $(INSTALLED) $(DATA)/made
	$(BIN)/python tools/train.py $(CONFIG) --work-dir $(WORK_DIR) \
		$(if $(wildcard $(WORK_DIR)/last_checkpoint),--resume)
	@touch $@

# -- Checks ----------------------------------------------------------------------------------------

# Several processes with one thread each are faster than one with several threads.
test test-full: export OMP_NUM_THREADS = 1

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n $(JOBS) --durations=10 -m 'not slow'

test-full: $(INSTALLED)
	$(BIN)/python -m pytest -q -n $(JOBS) --durations=20 --cov

gpu-report: $(INSTALLED)
	$(BIN)/python tools/analysis_tools/gpu_report.py --out work_dirs/gpu_report

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

build: $(INSTALLED)
	rm -rf dist
	$(UV) build --python $(BIN)/python --no-build-isolation --out-dir dist

clean:
	rm -rf $(VENV) $(DATA) $(WORK_DIR) .coverage*
