# Two commands for a newcomer: `make demo` and `make test`. Both need only Python 3.11 or 3.12 and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check format gpu-paper bench report trust docs clean

demo: .venv/core
	$(BIN)/sdn demo

test: .venv/dev
	$(BIN)/python -m pytest -n 2

check: .venv/dev
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 -m "not slow"

format: .venv/dev
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

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

# Seconds of early exits on a public ResNet-56: it is converted once, and what is there is not made again. RIVAL: the weights of ResNet-20.
# AT: the two exits that `sdn tune` proposed when four were asked (0.25 0.4 0.55 0.75).
BENCH ?= runs/bench$(filter-out -cpu,-$(DEVICE))
AT ?= layer2.1:out layer3.1:out
BATCHES ?= 1 64
# Equal accuracy by a second look: make bench LOOK=mirror DROP=0 BENCH=runs/bench-look ...
LOOK ?=
DROP ?= 0.005
# Which half of the test set chooses, and which reports; the other way about: make bench HALVES='b a' BENCH=runs/bench-swapped ...
HALVES ?= a b
# Where it runs: make bench DEVICE=cuda ...
DEVICE ?= cpu
bench: .venv/dev
	@test -n "$(DATA)" -a -n "$(WEIGHTS)" || { echo "Say where things are: make bench DATA=cifar-10-batches-py WEIGHTS=resnet56-4bfd9763.th"; exit 2; }
	test -f $(BENCH)/plan/plan.json || $(SDN) plan shallowdeep.paper.networks:resnet56 $(DATA) --split train --weights $(WEIGHTS) --at $(AT) --out $(BENCH)/plan
	test -f $(BENCH)/train/sdn.json || $(SDN) train $(DATA) --split train --plan $(BENCH)/plan --augment flip-crop --views 6 --device $(DEVICE) --out $(BENCH)/train
	test -f $(BENCH)/trace/run.json || $(SDN) collect $(DATA) --split test --half $(word 1,$(HALVES)) --sdn $(BENCH)/train $(if $(LOOK),--second-look $(LOOK)) --device $(DEVICE) --out $(BENCH)/trace
	set -e; for size in $(BATCHES); do \
	  $(SDN) tune --sdn $(BENCH)/train --trace $(BENCH)/trace --max-accuracy-drop $(DROP) --batch-size $$size --threads 1 --device $(DEVICE) \
	    --out $(BENCH)/tune-$$size; \
	  $(SDN) bench $(DATA) --split test --half $(word 2,$(HALVES)) --sdn $(BENCH)/train --policy $(BENCH)/tune-$$size --batch-sizes $$size --device $(DEVICE) \
	    $(if $(RIVAL),--rival shallowdeep.paper.networks:resnet20 --rival-weights $(RIVAL)) --out $(BENCH)/batch-$$size; done

# The page of the committed CIFAR-10 run, from files alone; with DATA=cifar-10-batches-py also its images.
REPORT ?= runs/report.html
report: .venv/dev
	$(SDN) report results/demo-cifar10 --policy results/demo-cifar10 $(if $(wildcard results/demo-cifar10/bench.json),--bench results/demo-cifar10) \
	  --class-names airplane automobile bird cat deer dog frog horse ship truck --title "A public ResNet-56 on CIFAR-10" $(if $(DATA),--images $(DATA) --split test) --out $(REPORT)

# The documentation as a site in site/: what points nowhere, or is in no list, is an error.
docs: .venv/docs
	$(BIN)/python -m pytest tests/test_site.py
	$(BIN)/zensical build --strict --clean

# Everything in results/trust again. The committed traces suffice for all but drift, attacks and other inputs; those take DATA (a folder with
# cifar-10-batches-py and cifar-100-python) and WEIGHTS (one with resnet20-12fca82f.th and resnet56-4bfd9763.th). What takes long goes on if killed.
TRUST ?= results/trust
TRACE := results/demo-cifar10
FRESH := runs/trust
PY := OMP_NUM_THREADS=1 $(BIN)/python -W ignore
WEIGHTS56 = $(WEIGHTS)/resnet56-4bfd9763.th
trust: .venv/dev
	$(SDN) compare --trace $(TRACE) --out $(FRESH)/compare
	$(SDN) reliability --trace $(TRUST)/second-look --out $(FRESH)/reliability
	cp $(FRESH)/compare/compare.json $(FRESH)/reliability/reliability.json $(TRUST)
	for drop in 0 -0.002; do \
	  $(SDN) calibrate --trace $(TRUST)/second-look --max-accuracy-drop $$drop --confidence 0.95 --out $(FRESH)/look$$drop || exit 1; \
	  cp $(FRESH)/look$$drop/run.json $(TRUST)/second-look/certificate$$drop.json; done
	$(PY) benchmarks/policies.py $(TRACE)/trace.safetensors $(TRUST)/policies.json
	$(PY) benchmarks/policies.py $(TRUST)/second-look/trace.safetensors $(TRUST)/policies-second-look.json
	$(if $(DATA),test -f $(FRESH)/sdn/sdn.json || $(SDN) demo --data cifar10 --data-dir $(DATA)/cifar-10-batches-py --weights $(WEIGHTS56) \
	  --at 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 --out $(FRESH)/sdn)
	$(if $(DATA),$(PY) benchmarks/victims.py $(DATA)/cifar-10-batches-py $(DATA)/cifar-100-python $(WEIGHTS)/resnet20-12fca82f.th $(WEIGHTS56) \
	  $(FRESH)/sdn $(FRESH)/networks)
	$(PY) benchmarks/alarms.py $(TRACE)/trace.safetensors $(TRUST)/alarms.json --second $(TRUST)/second-look/trace.safetensors \
	  $(if $(DATA),--networks $(FRESH)/networks)
	OMP_NUM_THREADS=1 $(SDN) prove-guarantee $(TRACE)/trace.safetensors --out $(FRESH)/proof
	cp $(FRESH)/proof/proof.json $(TRUST)
	$(if $(DATA),$(PY) benchmarks/drift.py $(FRESH)/sdn $(WEIGHTS56) $(DATA)/cifar-10-batches-py $(TRUST)/drift.json)
	$(if $(DATA),$(PY) benchmarks/attack.py $(DATA)/cifar-10-batches-py $(WEIGHTS56) $(FRESH)/sdn $(FRESH)/attack $(TRUST)/attack.json)

clean:
	rm -rf .venv runs demo-run site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

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

.venv/docs: .venv/dev
	$(INSTALL) -e '.[docs]'
	touch $@
