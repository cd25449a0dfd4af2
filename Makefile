# One entry for people and for CI; `make` alone says what there is.
# Needs git, make and a Python of 3.11 or newer; everything else goes into $(VENV).

VENV ?= .venv
PY := $(VENV)/bin/python
# The first interpreter that starts, is new enough and can make an environment; or PYTHON=… by hand.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

# Nothing we start tells anybody that it ran.
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false

SEED := 0
STEPS := 1
LESSON := even_numbers

.DEFAULT_GOAL := help
.PHONY: help install demo learn your-trainer ui test test-fast check bench swaps long simulate bad-days train-kills nodes postgres test-stores test-train tinker oracles families strangers engines own-fleet containers conformance fuzz lock golden deploy wheel clean

help:  ## show this
	@echo 'hotload: a checkpoint travels to scored rollouts. Start with `make demo`.'
	@echo
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16 | sed 's/^/  make /'

install: $(VENV)/installed  ## set up $(VENV) from requirements.lock (every target does it by itself)

demo: install  ## five cycles on this machine: emulator, Prefect server, real weights; under two minutes
	$(PY) -m examples.demo

learn: install  ## a training run whose reward rises, in a minute: SEED=1, STEPS=4 a version
	$(PY) -m examples.rl_loop.$(LESSON) --seed $(SEED) --steps-per-version $(STEPS)

your-trainer: install .trainers-venv/installed  ## a plain transformers loop on the cycle, against three emulated replicas
	$(PY) -m examples.your_trainer --python .trainers-venv/bin/python

ui: install  ## the flow runs of the last demo, in a browser
	$(PY) -m examples.demo --ui

test: install  ## the whole suite; starts its own servers on loopback
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not heavy'

test-fast: install  ## what needs no server and little time: under a minute on two quiet cores
	$(PY) -m pytest -n 2 -m 'not server and not slow and not heavy'

check: install  ## ruff, format, mypy, which package may import which
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(PY) -m pytest tests/test_architecture.py

WITNESS := .oracle-venv/bin/python
bench: install  ## the measured promises: codec (`make oracles` first adds its peers), publishing, losses, ranks, rollouts, agents, cost of a cycle
	$(PY) -m benchmarks.codec --witness $(WITNESS) --write
	$(PY) -m benchmarks.losses
	$(PY) -m benchmarks.ranks
	$(PY) -m benchmarks.client
	$(PY) -m benchmarks.whole_path
	$(PY) -m benchmarks.fan_out
	$(PY) -m benchmarks.sampling_processes
	$(PY) -m benchmarks.rollout_memory
	$(PY) -m benchmarks.publish
	$(PY) -m benchmarks.nodes
	$(PY) -m benchmarks.from_bucket
	$(PY) -m benchmarks.agents
	$(PY) -m benchmarks.cycle_overhead
	$(PY) -m benchmarks.trigger_latency
	$(PY) -m benchmarks.async_loop

swaps: install  ## a run over three policy versions with swaps and faults: the report against the emulator's own log
	$(PY) -m benchmarks.swaps --mode ASYNC
	$(PY) -m benchmarks.swaps --mode SYNC

long: install  ## what `make test` leaves out because it takes minutes, and more kills of what it has
	$(PY) -m pytest -m heavy
	HOTLOAD_KILLS=10 $(PY) -m pytest tests/flows/test_kill.py tests/flows/test_retain.py tests/flows/test_rollout_swaps.py \
		tests/agent/test_kills.py -k random

CYCLES := 10000
WHOLE := 1000
simulate: install  ## 10,000 publishing cycles and 1,000 whole ones under faults; SEED=7 CYCLES=300 WHOLE=0
	$(PY) -m tests.simulation --seed $(SEED) --cycles $(CYCLES) --whole $(WHOLE)

BAD_DAYS := tests/flows/test_prefect_bad_days.py tests/flows/test_worker_bad_days.py
bad-days: install  ## Prefect's server away, locked, gone for good; a worker killed: also what `make test` leaves out
	$(PY) -m pytest $(BAD_DAYS)

train-kills: install  ## training runs killed at every arrow of a step: the same bits as a straight one; some minutes
	$(PY) -m pytest tests/flows/test_rl_loop_kills.py tests/flows/test_async_rl_loop_kills.py

nodes: install  ## shards placed on two nodes with directories of their own, a rollout that two share, one of them killed; some minutes
	$(PY) -m pytest tests/flows/test_nodes.py

postgres: install  ## the ways in and a cycle with PostgreSQL behind Prefect (Debian: postgresql-15)
	$(PY) -m tests.postgres $(PY) -m pytest tests/flows/test_ways_in.py tests/flows/test_cycle.py

test-stores: install  ## the store tests again, against Ceph's radosgw (Debian: ceph-mon ceph-osd radosgw)
	$(PY) -m tests.radosgw $(PY) -m pytest tests/blocks -m stores

test-train: .trainers-venv/installed  ## the trainers, with torch and transformers: the properties of both, one against the other; wandb, offline
	HF_HUB_OFFLINE=1 .trainers-venv/bin/$(ORACLES) tests/trainers/test_trainers.py \
		tests/trainers/test_torch_trainer.py tests/trainers/test_router_replay.py \
		tests/trainers/test_wandb.py

tinker: .tinker-venv/installed  ## the tinker client and SkyRL's server: adapter, probe, states, the loop; 7 GB, ten minutes
	.tinker-venv/bin/python -m pytest -c tests/tinker/pytest.ini tests/tinker

ORACLES := python -m pytest -c tests/oracles/pytest.ini
oracles: .oracle-venv/installed .trainers-venv/installed  ## our bytes in the vendor's own package, our batches and losses in TRL, verl and torch
	.oracle-venv/bin/$(ORACLES) tests/oracles/test_arc_v2.py
	HF_HUB_OFFLINE=1 .trainers-venv/bin/$(ORACLES) tests/oracles/test_trl.py tests/oracles/test_verl.py \
		tests/oracles/test_losses.py tests/oracles/test_rank_tensors.py

FAMILIES := build/families
families: install .families-venv/installed  ## model families in miniature: doctor, check, encode, apply, verify, a whole cycle
	rm -rf $(FAMILIES)
	HF_HUB_OFFLINE=1 .families-venv/bin/python tests/families/build.py $(FAMILIES)
	$(PY) -m tests.families $(FAMILIES)

strangers: install .strangers-venv/installed .cwtrain-venv/installed  ## the vendor's SDK and client against emulator and door, openai, and CoreWeave's loader
	.strangers-venv/bin/python -m pytest -c tests/strangers/pytest.ini tests/strangers --ours $(PY)
	OURS=$(PY) .cwtrain-venv/bin/python -m pytest -c tests/oracles/pytest.ini tests/oracles/test_cwtrain_door.py

engines: .engines-venv/installed  ## llama.cpp's server, classes and routes of vLLM and SGLang, against our rollout client and agents
	.engines-venv/bin/python -m pytest -c tests/engines/pytest.ini tests/engines

containers: install .containers-venv/installed  ## the containers without Docker: image built, services started, two cycles; schemas; root, some minutes
	.containers-venv/bin/kubernetes-validate --strict deployments/kubernetes.yaml
	.containers-venv/bin/python tests/containers/check_compose.py deployments/compose.yaml
	$(PY) -m tests.containers

own-fleet: install .own-fleet-venv/installed  ## two `transformers serve` with agents, a door, the flow: five versions, each held to the trainer's
	$(PY) -m pytest tests/own_fleet/test_transformers_serve.py

# The implementations on trial together in each environment: each is tried alone, and with the others.
ADAPTERS := tests/conformance/adapters
HERE := $(addprefix $(ADAPTERS)/,ours.py slime.py)
WITH_TORCH := $(addprefix $(ADAPTERS)/,ours.py fireworks.py modelexpress.py)
WITH_CWTRAIN := $(addprefix $(ADAPTERS)/,ours.py cwtrain.py)
RECEIVERS := .oracle-venv/installed .cwtrain-venv/installed
ONLY := $(if $(LARGE),--large)
conformance: install $(RECEIVERS)  ## ours against the vendor's package and three more, both ways; LARGE=1: 2 GiB
	$(PY) -m tests.conformance $(HERE) $(ONLY)
	$(PY) -m tests.conformance $(ADAPTERS)/command_line.toml $(ONLY)
	.oracle-venv/bin/python -m tests.conformance $(WITH_TORCH) $(ONLY)
	.cwtrain-venv/bin/python -m tests.conformance $(WITH_CWTRAIN) $(ONLY)

SECONDS := 300
fuzz: .fuzz-venv/installed  ## the readers of headers, indexes and frames with bytes nobody wrote; SECONDS=3600
	.fuzz-venv/bin/python -m tests.fuzz $(SECONDS) build/corpus

lock: install  ## resolve pyproject.toml into requirements.lock; delete the file first to upgrade everything
	$(VENV)/bin/uv pip compile pyproject.toml --extra pipeline --extra math --extra dev --quiet --no-config \
		--universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--output-file requirements.lock

golden: install  ## rebuild the golden files; fails if one of them changed
	$(PY) -m tests.golden.rebuild
	git diff --exit-code --stat -- tests/golden ':!*.py'

POOL := process
deploy: install  ## blocks, work pool, cycle, watch and retention on the Prefect server of your profile; POOL=docker, kubernetes
	$(PY) -m prefect block register -m blocks.__main__
	$(PY) -m prefect work-pool inspect hotload-$(POOL) >/dev/null 2>&1 \
		|| $(PY) -m prefect work-pool create hotload-$(POOL) --type $(POOL)
	$(PY) -m prefect --no-prompt deploy --prefect-file deployments/prefect.yaml --name $(POOL) \
		$(if $(filter process,$(POOL)),--name watch --name retention --name training --name async-training)

# What is not the codec and the values needs the extra `clients`.
NEEDS_CLIENTS := polars|jsonschema|hotload\.(clients|dataset|report|sampling)
ALONE := ../venv/bin/python -m pytest -c ../../pyproject.toml -o pythonpath=
wheel: install  ## build the library; test it outside this directory, alone and with its clients, without Prefect
	rm -rf build dist
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(PY) -m venv build/venv
	sed -n 's/^\([a-z].*\) \\$$/\1/p' requirements.lock > build/versions.txt
	build/venv/bin/python -m pip install --quiet --constraint build/versions.txt dist/*.whl \
		hypothesis pytest pytest-asyncio pytest-timeout safetensors
	mkdir -p build/alone/tests
	cp -R tests/factories.py tests/signals.py tests/hotload tests/golden build/alone/tests/
	cd build/alone && $(ALONE) $$(grep -LE '$(NEEDS_CLIENTS)' tests/hotload/test_*.py)
	build/venv/bin/python -m pip install --quiet --constraint build/versions.txt "$$(echo dist/*.whl)[clients]"
	cd build/alone && $(ALONE) $$(grep -lE '$(NEEDS_CLIENTS)' tests/hotload/test_*.py)

clean:  ## remove what was built, measured and cached; the environments stay
	rm -rf build dist .demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -not -path './.*venv/*' -prune -exec rm -rf {} +

$(VENV)/locked: requirements.lock
	@test -n "$(PYTHON)" || { echo 'No Python >= 3.11 that can make a virtual environment was found.' \
		'Name one: make PYTHON=/path/to/python3 …' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# The locked pip first: the one that comes with Python may be too old to read a pin for extras.
	sed -n '/^pip==/,/[^\\]$$/p' requirements.lock > $(VENV)/pip.lock
	$(PY) -m pip install --disable-pip-version-check --quiet --require-hashes -r $(VENV)/pip.lock
	$(PY) -m pip install --disable-pip-version-check --quiet --require-hashes -r requirements.lock
	@touch $@

$(VENV)/installed: $(VENV)/locked pyproject.toml
	PYTHONWARNINGS=ignore $(PY) -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch $@

# $(call make-environment,PYTHON,>= 3.11): the environment of a target, with what its requirements
# files name; those that end in -alone.txt without what they ask for in turn.
INTO = $(@D)/bin/python -m pip install --disable-pip-version-check --quiet
define make-environment
@test -n "$($(1))" || { echo 'No Python $(2) found: make $(1)=… $(MAKECMDGOALS)' >&2; exit 1; }
$($(1)) -m venv $(@D)
$(INTO) $(addprefix -r ,$(filter-out %-alone.txt,$^))
$(if $(filter %-alone.txt,$^),$(INTO) --no-deps $(addprefix -r ,$(filter %-alone.txt,$^)))
@touch $@
endef

.oracle-venv/installed: tests/oracles/requirements.txt tests/oracles/requirements-alone.txt
	$(call make-environment,PYTHON,>= 3.11)

.families-venv/installed: tests/families/requirements.txt
	$(call make-environment,PYTHON,>= 3.11)

.strangers-venv/installed: tests/strangers/requirements.txt
	$(call make-environment,PYTHON,>= 3.11)

.engines-venv/installed: tests/engines/requirements.txt tests/engines/requirements-alone.txt
	$(call make-environment,PYTHON,>= 3.11)

.containers-venv/installed: tests/containers/requirements.txt tests/containers/requirements-alone.txt
	$(call make-environment,PYTHON,>= 3.11)

.own-fleet-venv/installed: tests/own_fleet/requirements.txt
	$(call make-environment,PYTHON,>= 3.11)

# cwtrain asks for 3.12; pyenv keeps its Pythons where no PATH finds them.
PYTHON312 ?= $(shell for python in python3.14 python3.13 python3.12 python3 \
	"$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null \
	&& echo $$python && break; done)
.cwtrain-venv/installed: tests/oracles/requirements-cwtrain.txt
	$(call make-environment,PYTHON312,>= 3.12)

# So does SkyRL.
.tinker-venv/installed: tests/tinker/requirements.txt
	$(call make-environment,PYTHON312,>= 3.12)

# verl takes no 3.13.
PYTHON311 ?= $(shell for python in python3.12 python3.11 \
	"$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[12].*/bin/python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info >= (3, 13))' 2>/dev/null \
	&& echo $$python && break; done)
.trainers-venv/installed: tests/oracles/requirements-trainers.txt
	$(call make-environment,PYTHON311,3.11 or 3.12)

.fuzz-venv/installed: tests/fuzz/requirements.txt
	@test -n "$(PYTHON)" || { echo 'No Python >= 3.11 found: make PYTHON=… fuzz' >&2; exit 1; }
	$(PYTHON) -m venv .fuzz-venv
	.fuzz-venv/bin/python -m pip install --disable-pip-version-check --quiet \
		-r tests/fuzz/requirements.txt || .fuzz-venv/bin/python -m pip install \
		--disable-pip-version-check --quiet $$(grep -v -e atheris -e '^#' tests/fuzz/requirements.txt)
	@touch $@
