# Needs Python 3.11 or newer and make; everything else is installed into .venv with pip, at the versions of constraints.txt.
.DEFAULT_GOAL := help
.PHONY: help setup passkey eval eval-16m reference-model lookup-model dictionary-model protos test test-slow test-gpu check stubs-fresh deploy-sane bench soak clean

PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
BIN := .venv/bin
READY := .venv/.ready
PROTOS := $(sort $(wildcard protos/*/v1/*.proto))
MODELS := model_worker/reference
PROTOC := $(BIN)/python -m grpc_tools.protoc -Iprotos

help:  ## Show the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1 — \2/p' $(MAKEFILE_LIST) | awk -F ' — ' '{printf "  %-16s %s\n", $$1, $$2}'

setup: $(READY)  ## Create .venv and install everything at its pinned version (quick when nothing changed)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "fot needs Python 3.11 or newer; none was found (set PYTHON=/path/to/python)" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-input -c constraints.txt setuptools $$(grep '^torch==' constraints.txt)
	PYTHONWARNINGS=ignore $(BIN)/pip install -q --no-input -c constraints.txt --no-build-isolation -e '.[worker,serving,ray,curves,dev]'
	@touch $@

passkey: setup  ## The main job: 20 pass keys, each found in a haystack of 262,144 tokens (half a minute on two cores)
	mkdir -p passkey-results
	$(BIN)/fot passkey --tokens 262144 --trials 20 --require 1.0 \
		--json passkey-results/passkey.json --plot passkey-results/passkey.png

STUDY = $(BIN)/fot eval $(1) --json eval-results/$(1).json --plot eval-results/$(1).png
eval: setup  ## Run every study with the models that come along; results go to eval-results/
	mkdir -p eval-results
	$(call STUDY,needle)
	$(call STUDY,lookup)
	$(call STUDY,ruler)
	$(call STUDY,perplexity)
	$(call STUDY,dense)
	$(call STUDY,approximation)
	$(call STUDY,distraction)
	$(call STUDY,dictionary)

eval-16m: setup  ## FoT's dictionary in a memory of 16,777,216 tokens, exactly and by index (an hour, 13 GB of RAM)
	mkdir -p eval-results
	OMP_NUM_THREADS=$$(nproc) $(BIN)/fot eval dictionary --model dictionary --sizes 16M --questions 550 \
		--engine exact --engine faiss:IVF4096,PQ128x4fsr --probes 64,256,1024 --json eval-results/dictionary_16m.json \
		--plot eval-results/dictionary_16m.png --plot-search eval-results/dictionary_16m_search.png

runs/reference-first/model: | setup
	$(BIN)/fot train $(MODELS)/reference/first.toml --out runs/reference-first

reference-model: setup runs/reference-first/model  ## Train the reference model anew, into runs/reference (an hour and a half)
	$(BIN)/fot train $(MODELS)/reference/train.toml --out runs/reference

lookup-model: setup runs/reference-first/model  ## Train the look-up model anew, into runs/lookup (two hours)
	$(BIN)/fot train $(MODELS)/lookup/first.toml --out runs/lookup-first
	$(BIN)/fot train $(MODELS)/lookup/train.toml --out runs/lookup

dictionary-model: setup  ## Train the model of the dictionary study anew, into runs/dictionary (an hour)
	$(BIN)/fot train $(MODELS)/dictionary/train.toml --out runs/dictionary

protos: setup  ## Regenerate the gRPC stubs from protos/
	$(PROTOC) --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS:protos/%=%)

# Compiled modules are kept, whatever the environment says: tests start hundreds of processes that import the packages.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest

# Three processes for two cores: many tests wait for processes that start, or for those they killed.
test: setup  ## Run the tests (ten minutes on two cores)
	$(PYTEST) -n 3 --dist loadscope

test-slow: setup  ## Run the tests that are too slow for every day, most of them on Ray
	$(PYTEST) -m slow --timeout 600

test-gpu: setup  ## Run the tests that need a CUDA device
	$(BIN)/pytest -m gpu

check: setup stubs-fresh deploy-sane  ## Lint, format, types, import contracts, stub freshness, deployment files
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --cache-dir .cache/imports

stubs-fresh: setup
	rm -rf .cache/stubs && mkdir -p .cache/stubs
	$(PROTOC) --python_out=.cache/stubs --pyi_out=.cache/stubs --grpc_python_out=.cache/stubs $(PROTOS:protos/%=%)
	@for stub in $$(cd .cache/stubs && find . -name '*_pb2*.py*'); do \
		cmp -s .cache/stubs/$$stub $$stub || { echo "$$stub is stale: run make protos and commit" >&2; exit 1; }; done

deploy-sane: setup
	$(BIN)/pytest -q tests/deployment/test_deploy_files.py tests/deployment/test_deploy_commands.py tests/deployment/test_deploy_watching.py

bench: setup  ## Measure attend, ingest, wire, prefill and decode; results go to bench-results/ (more than an hour)
	mkdir -p bench-results
	$(BIN)/fot bench wire --json bench-results/wire.json
	$(BIN)/fot bench ingest --json bench-results/ingest.json
	$(BIN)/fot bench attend --json bench-results/attend.json
	$(BIN)/fot bench prefill --json bench-results/prefill.json
	$(BIN)/fot bench decode --json bench-results/decode.json

FOT_SOAK_KILLS ?= 1000
FOT_SOAK_OPS ?= 200000
FOT_SOAK_FLIPS ?= 1000
soak: setup  ## Run the long crash, fault and model tests (hours); sizes by FOT_SOAK_KILLS, FOT_SOAK_OPS, FOT_SOAK_FLIPS
	FOT_SOAK_KILLS=$(FOT_SOAK_KILLS) FOT_SOAK_OPS=$(FOT_SOAK_OPS) FOT_SOAK_FLIPS=$(FOT_SOAK_FLIPS) \
		$(BIN)/pytest -m soak --timeout=0 -s

clean:  ## Remove what builds and tests left, but not .venv
	rm -rf .cache build dist bench-results eval-results passkey-results runs *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
