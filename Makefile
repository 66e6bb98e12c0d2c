# `make demo` and `make test` are all that a fresh machine needs; `make help` lists the rest.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/dev.txt
# More arguments for pip, for instance an index that has CPU builds of torch.
PIP_ARGS ?=
TORCH_SPEC ?= $(shell grep -E '^torch==' $(CONSTRAINTS))
# 1: run in the Python that is active now, installing nothing but this checkout.
USE_CURRENT_ENV ?= $(if $(VENV),,1)
OLD_TRITON := $(shell grep -E '^triton==' constraints/torch-2.11.txt)
OLD_TRITON_DIR := build/$(subst ==,-,$(OLD_TRITON))
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 2
# Each worker has half of the files, in order, until it is done and takes from the other: the tests
# that share processes or fixtures stay together, and while one waits for its ranks, the other works.
XDIST := -n $(PYTEST_WORKERS) --dist worksteal
# an environment that is used as it is may lack pytest-xdist
WORKERS = $(shell $(PY) -c 'import importlib.util as u; print("$(XDIST)" if u.find_spec("xdist") else "")')

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The repository root must stay off sys.path: from there, the folders passes/ and kernels/ would
# be found under their bare names.
export PYTHONSAFEPATH := 1

ifeq ($(USE_CURRENT_ENV),1)
READY := current-env
PY := $(shell command -v $(PYTHON))
else
READY := $(VENV)/.ready
PY := $(abspath $(VENV))/bin/python
endif

.PHONY: help demo env test cross-compile fuzz models sanitize coverage browser lint format types wheel package clean current-env

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(READY) ## Train three small MoE models, eager beside comet, and print what was rewritten
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) examples/quickstart.py

env: $(READY) ## Make the virtual environment that the other targets use
	@:

test: $(READY) ## Run the CPU test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest $(WORKERS) -m "not gpu and not multigpu" $(PYTEST_ARGS)

cross-compile: $(READY) ## Compile the kernels for GPUs that are not here, with the oldest supported Triton
	@# `make test` does so with the newest, but for a few slow cases; torch itself may have no triton
	@# of its own on a CPU
	[ -d $(OLD_TRITON_DIR) ] || $(PY) -m pip install -qq $(PIP_ARGS) --no-deps --target $(OLD_TRITON_DIR) '$(OLD_TRITON)'
	export PYTHONPATH=$(CURDIR)/$(OLD_TRITON_DIR) OMP_NUM_THREADS=1 COMET_SLOW_TESTS=1; \
	  $(PY) -c 'import triton; print("triton", triton.__version__, triton.__path__[0])'; \
	  $(PY) -m pytest $(WORKERS) tests/kernels/test_cross_compile.py $(PYTEST_ARGS)

fuzz: $(READY) ## Judge FUZZ random layers and as many near-misses (default 10000) in FUZZ_WORKERS processes
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(PY) tests/fuzz.py $${FUZZ:-10000}

models: $(READY) ## Write benchmarks/results/models.md for the installed transformers
	PYTHONPATH=tests $(PY) tests/model_page.py

sanitize: $(READY) ## Run the fused kernels under NVIDIA's compute-sanitizer (needs a GPU)
	@# without torch's cache of memory, an access outside a tensor is one outside all tensors
	for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
	    $(PY) -m pytest tests/kernels/test_sanitized_gpu.py $(PYTEST_ARGS); \
	done

coverage: $(READY) ## Run the CPU test suite and report what it covers
	OMP_NUM_THREADS=1 $(PY) -m pytest $(XDIST) -m "not gpu and not multigpu" --cov $(PYTEST_ARGS)

browser: ## Install a browser for the tests of the HTML report, where that is possible
	@if command -v chromium chromium-browser google-chrome >/dev/null; then \
	  echo "browser: found"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else \
	  echo "browser: no chromium, and not root on a Debian system: the browser tests will be skipped"; \
	fi

lint: $(READY) ## Check style and spelling
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib

format: $(READY) ## Rewrite the files in the style that lint asks for
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: wheel ## Check the types of the built package
	rm -rf build/types
	$(PY) -m pip install -qq --no-deps --no-index --target build/types dist/*.whl
	cd build/types && $(PY) -m mypy --config-file $(CURDIR)/pyproject.toml -p comet_compile

wheel: $(READY) ## Build the wheel into dist/
	@# setuptools would pack the modules of an earlier build that are gone from the sources
	rm -rf build/lib build/bdist.* dist
	$(PY) -m build --wheel --no-isolation --outdir dist . >build.log 2>&1 || { cat build.log; exit 1; }
	@rm -f build.log; ls dist

package: wheel ## Install the wheel into an environment of its own and use it from another folder
	rm -rf build/package && mkdir -p build/package/elsewhere
	$(PY) -m venv --without-pip build/package/env
	$(PY) -m pip --python build/package/env/bin/python install -qq --no-deps --no-index dist/*.whl
	@# torch comes from the first environment; a .pth folder's own .pth files are not read, so
	@# its editable install stays out
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >"$$(build/package/env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first_env.pth"
	cd build/package/elsewhere && OMP_NUM_THREADS=1 ../env/bin/python -I $(CURDIR)/tests/packaging/installed_check.py

clean: ## Remove what the targets made, the virtual environment excepted
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache comet_dump .coverage .coverage.*

current-env:
	@[ -n "$(PY)" ] || { echo "no '$(PYTHON)' on PATH"; exit 1; }
	@$(PY) -c 'import torch' || { echo "USE_CURRENT_ENV=1 needs a Python that has torch; $(PY) has none"; exit 1; }
	@$(PY) -c 'import comet_compile.passes' 2>/dev/null \
	  || $(PY) -m pip install -qq --no-build-isolation --no-deps -e .
	@$(PY) -c 'import comet_compile as c; print(f"using {c.__path__[0]} in $(PY)")'

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	@command -v $(PYTHON) >/dev/null || { echo "no '$(PYTHON)' on PATH: name one with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "comet_compile needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Name another: make PYTHON=python3.12 ..."; exit 1; }
	[ -x $(VENV)/bin/pip ] || $(PYTHON) -m venv $(VENV)
	@if nvidia-smi -L >/dev/null 2>&1; then echo "GPU found"; else \
	  echo "no GPU found: a CPU build of $(TORCH_SPEC) is enough; where pip knows none, PIP_ARGS names an index that has one (README, Install)"; fi
	@# torch first and by itself: no other package may then choose a build of its own
	@echo "installing $(TORCH_SPEC), then the rest of $(CONSTRAINTS), into $(VENV)"
	$(PY) -m pip install -qq $(PIP_ARGS) '$(TORCH_SPEC)'
	$(PY) -m pip install -qq $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@
