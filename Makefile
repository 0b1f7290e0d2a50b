# Two commands for a newcomer: `make demo` and `make test`. Both need only Python 3.11 or 3.12 and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check format gpu-paper clean

demo: .venv/core
	$(BIN)/sdn demo

test: .venv/dev
	$(BIN)/python -m pytest -n 2

check: .venv/dev
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 -m "not slow"

format: .venv/dev
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

# The study's missing runs, several networks at once on one GPU, stopping in time; the next call goes on.
SDN ?= $(BIN)/sdn
MINUTES ?= 8
JOBS ?= 8
RESULTS ?= results/paper
WORK ?= runs/paper
PAIRS := $(foreach data,cifar10 cifar100,$(foreach net,vgg16 resnet56 wrn32-4 mobilenet,$(data):$(net):fast)) cifar10:vgg16:paper
gpu-paper:
	@test -n "$(DATA)" || { echo "Say where the official data folders are: make gpu-paper DATA=folder"; exit 2; }
	printf '%s\n' $(PAIRS) | xargs -P $(JOBS) -I RUN sh -c 'run=RUN; rest=$${run#*:}; \
	  $(SDN) paper run $(DATA) --datasets $${run%%:*} --networks $${rest%%:*} --recipe $${rest#*:} --minutes $(MINUTES) \
  --results $(RESULTS) --work $(WORK)'

clean:
	rm -rf .venv runs demo-run build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 12), 'shallowdeep needs Python 3.11 or 3.12: make PYTHON=python3.12 ...'"
	$(PYTHON) -m venv .venv

# torch first and alone: with it in place nothing else asks a registry for another build of it.
.venv/core: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

.venv/dev: .venv/core
	$(INSTALL) -e '.[dev]'
	touch $@
