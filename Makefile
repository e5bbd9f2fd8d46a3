# make demo     everything from text to a trained, sampled model      make test     the tests
# make lint     ruff, import contracts, types                         make docs     the documentation site
# make corpus   build a larger demo corpus from Debian packages       make clean    remove what was built
# make gpu-check   on a machine with a GPU: prove everything on it, with the machine's own python and no network
#
# Each but the last two sets up $(VENV) first, if it is not there. torch is the user's choice:
#   make demo TORCH=torch==2.12.0    another version
#   make demo TORCH=torch            the newest
#   make demo TORCH=                 whatever $(VENV) has already; the newest if it has none
# A CPU or CUDA build is chosen as pip does it, for example by PIP_INDEX_URL=https://download.pytorch.org/whl/cpu.

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/pip install $(if $(CI),-q)
# One stamp at a time, named after the choice of torch: another choice installs again.
READY := $(VENV)/.ready-$(shell printf '%s' '$(TORCH)' | tr -c 'A-Za-z0-9.' '-')
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*/*.h csrc/cuda/nvcc.options)

.PHONY: setup demo test lint docs corpus gpu-check clean

setup: $(READY)

# torch first, then what builds, then megapre without isolation: its native code must see the torch it will run with.
$(READY): pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "megapre needs Python 3.11 or newer, and $$($(PYTHON) -V) is too old. Try make PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(if $(strip $(TORCH)),$(PIP) '$(TORCH)',$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) torch)
	$(PIP) 'setuptools>=77' wheel 'cmake>=3.26' ninja 'pybind11>=2.12' numpy
	$(PIP) --no-build-isolation -e '.[all]'
	@rm -f $(VENV)/.ready-* && touch $@

demo: setup
	$(BIN)/python examples/demo/run.py

corpus: setup
	$(BIN)/python examples/demo/corpus.py

# The tests that take minutes are marked slow and run in .ci/run.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: setup
	$(BIN)/mkdocs build --strict

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf build dist site *.egg-info megapre/_host.*.so kernels/_native $(VENV)/.ready-*
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find megapre kernels tests -name __pycache__ -prune -exec rm -rf {} +
