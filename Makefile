# Needs Python 3.11 or later and a package index. Every target makes .venv when it is missing and reuses it otherwise.
SHELL := /bin/sh
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The oldest and newest releases that are served, and one on either side of each change of LiteLLM's internals.
LITELLM_VERSIONS ?= 1.84.0 1.95.0 1.103.0 1.106.2 1.108.0 1.109.1
CONTRACT_TESTS ?= tests/integration/test_litellm_contract.py

ifeq ($(shell command -v $(PYTHON)),)
PYTHON := python3
endif

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-22s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(INSTALLED) ## Three regions, the real LiteLLM proxy, five strategies: one table and a plot
	$(BIN)/gorgo demo

.PHONY: demo-envoy
demo-envoy: $(INSTALLED) ## The same through the real Envoy, against its own load balancing
	$(BIN)/gorgo demo --gateway envoy

.PHONY: test
test: check ## Check, then run all tests
	$(BIN)/python -m pytest

.PHONY: check
check: $(INSTALLED) ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: bench
bench: $(INSTALLED) ## What the plugin costs LiteLLM, against simple-shuffle
	$(BIN)/gorgo bench litellm

.PHONY: bench-envoy
bench-envoy: $(INSTALLED) ## What the service costs Envoy, against no filter and a service that does nothing
	$(BIN)/gorgo bench envoy

.PHONY: bench-estimator
bench-estimator: $(INSTALLED) ## How fast cached tokens are estimated, against the package of the paper's authors
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/gorgo bench estimator

TRACE ?=
.PHONY: bench-routing
bench-routing: $(INSTALLED) ## Every policy of the papers on three simulated fleets; TRACE=file adds a trace to them
	$(BIN)/gorgo bench routing $(if $(TRACE),--trace $(TRACE))

.PHONY: soak
soak: $(INSTALLED) ## Ten minutes of requests through Envoy, with clients that leave: nothing may grow or stay open
	$(BIN)/gorgo soak

.PHONY: real-engine
real-engine: $(INSTALLED) ## Checks against two real vLLM CPU engines in .venv-vllm, behind the real LiteLLM proxy
	$(BIN)/python -m tests.real_engine.run --json out/real-engine/real-engine.json --folder out/real-engine

.PHONY: docs
docs: $(INSTALLED) ## Write the generated pages of docs/ and envoy/envoy.yaml anew
	$(BIN)/python -m gorgo_plugin.reference
	$(BIN)/gorgo envoy-config --config envoy/gorgo.yaml --output envoy/envoy.yaml

.PHONY: test-litellm-versions
test-litellm-versions: $(INSTALLED) ## Run the contract tests on each supported LiteLLM
	@failed=; for version in $(LITELLM_VERSIONS); do \
		sh .ci/with-litellm $$version -m pytest -q $(CONTRACT_TESTS) || failed="$$failed $$version"; \
	done; test -z "$$failed" || { echo "failed on:$$failed"; exit 1; }

.PHONY: constraints
constraints: ## Pin what a new environment resolves to today
	rm -rf $(VENV)-new && $(PYTHON) -m venv $(VENV)-new
	$(VENV)-new/bin/python -m pip install --quiet -e '.[bench,demo,dev]'
	{ sed -n '/^#/p' constraints.txt; \
	  $(VENV)-new/bin/python -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9._-]+==' | sort -f; } > constraints.new
	mv constraints.new constraints.txt && rm -rf $(VENV)-new

.PHONY: clean
clean: ## Remove the environments and caches
	rm -rf $(VENV) $(VENV)-* .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@
