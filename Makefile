# Everything runs from .venv, which the first target that needs it builds. `make help` lists the targets.

# `make test TORCH=2.11.0` runs with another version of torch, in a virtual environment of its own.

PYTHON ?= python3
TORCH ?=
VENV := .venv$(TORCH:%=-%)
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BENCH := $(VENV)/.installed-bench
# Another torch brings a Triton of its own.
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)

.PHONY: help install demo demo-vision test test-all lint format notebooks bench gpu bench-programs bench-precision bench-composition clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED)  ## build .venv, or bring it up to date

# One pip call for everything: the pin of torch then also picks the build, a local one such as +cpu where there is one.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(RUN) || { \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	        echo "fzero needs Python 3.11 or newer, and '$(PYTHON)' is missing or older: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; \
	        exit 1; }; \
	    $(PYTHON) -m venv $(VENV); }
	$(if $(TORCH),sed -E 's/^torch==.*/torch==$(TORCH)/; /^triton==/d' constraints.txt > $(CONSTRAINTS))
	$(RUN) -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

# DeepSpeed is built from source: for a CPU, and without its own kernels, which the benchmark does not use.
$(BENCH): $(INSTALLED)
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(RUN) -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS) -e '.[bench]'
	@touch $@

demo: $(INSTALLED)  ## train a small GPT
	$(RUN) examples/train_gpt.py

demo-vision: $(INSTALLED)  ## train a vision transformer and a GPT together, to read and add handwritten digits
	$(RUN) examples/vision_language.py

test: $(INSTALLED)  ## the fast tests and the doctests, by three workers
	$(RUN) -m pytest -n 3 --dist worksteal

test-all: $(INSTALLED)  ## the slow tests too
	$(RUN) -m pytest -n 3 --dist worksteal -m ''

lint: $(INSTALLED)  ## ruff and mypy; changes nothing
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(INSTALLED)  ## let ruff fix and format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(BENCH)  ## time and memory of a step on this machine's CPU, beside DDP, FSDP2 and DeepSpeed
	$(RUN) benchmarks/step.py

gpu: $(INSTALLED)  ## all there is to see on one GPU, in under nine minutes; DEVICE=cpu rehearses it
	$(RUN) benchmarks/gpu.py --device $(or $(DEVICE),cuda)

bench-programs: $(INSTALLED)  ## what programs tell without running: peaks, traffic, tracing time, large worlds
	$(RUN) benchmarks/programs.py

bench-precision: $(INSTALLED)  ## every policy: does it train like fp32, what the state weighs, the published model's memory
	$(RUN) benchmarks/state_bytes.py
	$(RUN) benchmarks/published.py
	$(RUN) benchmarks/parity.py

notebooks: $(INSTALLED)  ## execute the notebooks in place, so that they are stored with what they show
	$(RUN) examples/notebooks/execute.py

bench-composition: $(INSTALLED)  ## what composition costs, and what adapters on a frozen base hold
	$(RUN) benchmarks/composition.py

clean:  ## remove what runs leave behind, except virtual environments
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
