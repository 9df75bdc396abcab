# make            what there is
# TORCH_INDEX=URL takes torch from another package index; PYTHON=python3.12 another interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := $(VENV)/constraints.txt
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c $(CONSTRAINTS)
CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help setup quickstart preferences test test-processors test-slow mutation-test kill-test lean-test deepspeed-test \
	trackers-test lint bench notebooks docs dist wheel-test audit pretrain clean
.SUFFIXES:
.DELETE_ON_ERROR:

help: ## say what there is
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' \
		| awk -F '\t' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## install everything into .venv, once
quickstart: setup ## train the built-in model for four to eight minutes; the report is runs/quickstart/report.html
	@$(BIN)/progrpo train quickstart --out runs/quickstart --overwrite

preferences: setup ## from 200 pairs of pictures to an aligned model, in minutes; runs/preferences/run/report.html
	@$(BIN)/python examples/preferences.py --folder runs/preferences

# files in their order: the last ones are quick, so that both processes end together
IN_TWO := -n 2 --dist loadscope --no-loadscope-reorder
# both processes have a core each, on which more threads wait for each other
test test-processors test-slow: export OMP_NUM_THREADS := 1
test test-processors test-slow: export OPENBLAS_NUM_THREADS := 1
test: lint ## style, types and the tests
	@$(BIN)/python -m pytest $(IN_TWO)
# what depends on a processor's kernels, as older ones compute it: with AVX2 alone, and without bfloat16's instructions
OLDER := "ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2" \
	"ONEDNN_MAX_CPU_ISA=AVX512_CORE ATEN_CPU_CAPABILITY=default"
BY_PROCESSOR := tests/invariant/test_ratio.py tests/invariant/test_processes.py \
	tests/invariant/test_reused_rollout.py tests/unit/test_invariance.py
test-processors: $(VENV)/.ready-dev ## the tests of ratios and processes again, with the kernels of older processors
	@set -e; for isa in $(OLDER); do echo "$$isa"; env $$isa $(BIN)/python -m pytest $(IN_TWO) $(BY_PROCESSOR); done
test-slow: wheel-test docs mutation-test kill-test lean-test deepspeed-test trackers-test ## what takes minutes
	@$(BIN)/python -m pytest -m slow
mutation-test: $(VENV)/.ready-dev ## thousands of wrong recipes, command lines, files and models
	@$(BIN)/python -m tests.mutation
kill-test: setup ## kill a run a hundred times, also within checkpoints, and compare what comes out
	@$(BIN)/python benchmarks/kill.py --kills 100
lint: $(VENV)/.ready-dev ## style and types
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "ruff would reformat files: run '$(BIN)/ruff format .'"; exit 1; }
	@$(BIN)/mypy --no-error-summary

# not those that want another version of the code, another framework, its files, or a GPU and the hub
ELSEWHERE := benchmarks/same_runs.py benchmarks/frameworks% benchmarks/imports.py benchmarks/real.py
BENCHMARKS := $(filter-out $(ELSEWHERE),$(wildcard benchmarks/*.py))
bench: $(VENV)/.ready-dev ## the figures of the notes
	@set -e; for file in $(BENCHMARKS); do $(BIN)/python $$file; done
notebooks: $(VENV)/.ready-dev ## execute the notebooks of examples/ and save them with their outputs
	@$(BIN)/python docs/notebooks.py
docs: $(VENV)/.ready-docs ## build the documentation, build/site/index.html, and check its links; a warning is an error
	@rm -rf build/site build/doctrees
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs/site -d build/doctrees . build/site
	@$(BIN)/python docs/site/check.py build/site
pretrain: setup ## make shapes-flow anew (hours on a CPU; stop and go on as you like)
	@$(BIN)/progrpo pretrain shapes-flow

dist: ## build dist/: the sdist, and the wheel from it; check both
	@rm -rf dist build/dist && $(PYTHON) -m venv build/dist
	@build/dist/bin/python -m pip install -qq --disable-pip-version-check build==1.6.1 twine==7.0.0
	@for what in "" "--wheel --outdir dist/direct"; do build/dist/bin/python -m build $$what . >build/dist/log 2>&1 \
		|| { cat build/dist/log; exit 1; }; done
	@build/dist/bin/python -m twine check --strict dist/*.whl dist/*.tar.gz
	@$(PYTHON) .ci/release.py dist && rm -r dist/direct && ls -sh dist
wheel-test: ## build the wheel, or take WHEEL=FILE, and train from it in an empty environment of PYTHON
	@rm -rf build/wheel && mkdir -p build/wheel
	@if [ -n "$(WHEEL)" ]; then cp "$(WHEEL)" build/wheel; \
		else $(PYTHON) -m pip wheel -qq --disable-pip-version-check --no-deps --wheel-dir build/wheel .; fi
	@$(MAKE) --no-print-directory VENV=build/wheel/venv WHAT="$$(ls build/wheel/*.whl)" setup
	@cd build/wheel && venv/bin/progrpo train quickstart --iterations 1 --eval.pictures 12 --out run

lean-test: $(VENV)/.ready-dev ## test the extra `lean`, which is not in .venv since every start takes longer with it
	@$(INSTALL) --no-deps --upgrade --target build/lean bitsandbytes
	@PYTHONPATH=build/lean $(BIN)/python -m pytest tests/unit/test_adamw_8bit.py

# where torch is the CPU's, so are its processes; ninja and a C++ compiler build what they speak by, once
deepspeed-test: $(VENV)/.ready-dev ## test the extra `deepspeed`, which is not in .venv either, on the CPU
	@DS_BUILD_OPS=0 $(INSTALL) --no-deps --upgrade --target build/deepspeed deepspeed einops hjson msgpack ninja \
		nvidia-ml-py py-cpuinfo
	@PATH="$(CURDIR)/build/deepspeed/bin:$$PATH" PYTHONPATH="$(CURDIR)/build/deepspeed" \
		$(BIN)/python -m pytest -m slow tests/e2e/test_deepspeed.py

# beside .venv, since they bring older versions of what others use; swanlab takes no protobuf from 7 on
TRACKERS := wandb trackio swanlab brotli gradio-client httpcore httpx nvidia-ml-py orjson pwinput pyecharts \
	prettytable pydantic-settings pyroaring python-dotenv python-multipart \
	simplejson watchdog websockets wrapt
trackers-test: $(VENV)/.ready-dev ## test the extras `wandb`, `trackio` and `swanlab`, which reach no server here
	@$(INSTALL) --no-deps --upgrade --target build/trackers $(TRACKERS)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target build/trackers 'protobuf<7'
	@PYTHONPATH=build/trackers $(BIN)/python -m pytest tests/unit/test_trackers.py

audit: ## ask the advisory database about every pinned package (needs the network)
	@$(PYTHON) -m venv build/audit
	@build/audit/bin/python -m pip install -qq --disable-pip-version-check pip-audit==2.10.1
	@build/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

clean: ## remove what was built, but no runs
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache

# --- how things are installed --------------------------------------------------------------------------------------

WHAT ?= --editable .

# An installed torch is reused with all that it came with. Otherwise the pinned one is installed: a CUDA build if there
# is an NVIDIA GPU (PyPI's), elsewhere on Linux the much smaller CPU build, if its index can be reached.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@if $(PYTHON) $(has_torch) && $(PYTHON) -m venv --system-site-packages $(VENV) && $(BIN)/python $(has_torch); then \
		echo "setting up $(VENV) with the torch that is installed"; \
		grep -v '^torch==' constraints.txt > $(CONSTRAINTS); \
	else \
		echo "setting up $(VENV): installing torch (minutes)"; \
		$(PYTHON) -m venv $(VENV) && cp constraints.txt $(CONSTRAINTS) && $(INSTALL) $(torch_index) torch; \
	fi
	@touch $@

has_torch = -c 'import torch' 2>/dev/null
reachable = $(PYTHON) -c 'import urllib.request as u; u.urlopen("$(CPU_INDEX)/torch/", timeout=3)' 2>/dev/null
torch_index = $$( \
	if [ -n "$(TORCH_INDEX)" ]; then echo --extra-index-url "$(TORCH_INDEX)"; \
	elif [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && $(reachable); then \
		echo --extra-index-url "$(CPU_INDEX)"; \
	fi)

$(VENV)/.ready: $(VENV)/.torch pyproject.toml
	@echo "setting up $(VENV): installing progrpo and what it needs (a minute or two)"
	@$(INSTALL) $(WHAT)
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "setting up $(VENV): installing the tools for development"
	@$(INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready
	@echo "setting up $(VENV): installing what builds the documentation"
	@$(INSTALL) --editable '.[docs]'
	@touch $@
