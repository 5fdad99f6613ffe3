# make quickstart: set up and run the whole thing; make check: format, lint, types; make bench: speed;
# make test: every test; make test-quick: those that start no processes, in a minute;
# make slurm-up, slurm-down: a SLURM cluster on this machine;
# make image-test: the container image, built and tried (as root).
# Everything happens inside .venv/; the tested versions of all dependencies are in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quickstart test test-quick check bench setup slurm-up slurm-down image-test clean

quickstart: $(READY)
	$(BIN)/flearn run configs/quickstart.yaml

test: $(READY)
	$(BIN)/pytest --numprocesses 2 --no-loadscope-reorder

test-quick: $(READY)
	$(BIN)/pytest tests/unit -m 'not processes and not slow'

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	@for program in tests/bench/*.py; do $(BIN)/python $$program || exit 1; done

setup: $(READY)

slurm-up:
	@slurm/dev/cluster.sh up

slurm-down:
	@slurm/dev/cluster.sh down

image-test:
	@$(PYTHON) tests/image/check_image.py

# torch comes first and by its exact version: left to resolve it, pip may pick another build. And deepspeed's
# setup looks for it.
$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "flearn needs Python 3.10 or newer: make PYTHON=python3.11 ..."; exit 2; }
	@echo "Installing flearn and the tested versions of what it needs into $(VENV), once."
	@echo "torch is the largest part."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

clean:
	rm -rf $(VENV) runs build *.egg-info
