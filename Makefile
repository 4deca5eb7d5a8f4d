# Everything a developer or a newcomer runs. Needs Python >= 3.10 (the tests: >= 3.11), make and a package registry.

PYTHON ?= python3
COVERAGE ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
FUZZ_ARGS ?=
SAME_ARGS ?=

BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
PACKAGE := setup.cfg pyproject.toml $(wildcard converter/*.py converter/*/*.py converter/*/*/*.py)
# The torch that the tests are pinned to, as setup.cfg has it.
TORCH := $(shell sed -n 's/^ *\(torch==[^ ]*\).*/\1/p' setup.cfg)
# What is installed without what it asks for.
TRAINERS_ALONE := $(shell sed -n '/^trainers-alone =/,/^[a-z]/s/^ *\([a-z]*==[^ ]*\).*/\1/p' setup.cfg)
# Azure's stores for the tests; all else that they need is in setup.cfg.
AZURITE := azurite@3.35.0
# Every file of a folder with its size.
SIZES = find $(1) -type f | sort | xargs ls -lh | awk '{ printf "%8s  %s\n", $$5, $$NF }'

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.NOTPARALLEL:
.PHONY: help demo test test-remote coverage test-all fuzz lint format-check ruff-check type-check readme-check docs-check docs format bench same matrix samples clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F '|' '{ printf "make %-14s%s\n", $$1, $$2 }'

demo: .venv-demo/installed  ## convert a small Stable Diffusion folder, without torch, and show it before and after
	@rm -rf build/demo && mkdir -p build/demo
	@echo
	@echo "1. A model folder as it is often found: Stable Diffusion (tiny, random weights) with torch .bin weights."
	@echo "   unet/ is in two shards. Diffusers does not load it: \"no file named diffusion_pytorch_model.bin\"."
	.venv-demo/$(BIN)/python scripts/make_sample.py build/demo/model
	@cd build/demo && $(call SIZES,model)
	@echo
	@echo "2. What wconv sees in it. It reads headers only, no weights."
	.venv-demo/$(BIN)/wconv inspect build/demo/model
	@echo
	@echo "3. Every .bin becomes safetensors, in a new folder. Configs and tokenizer come along, the source stays."
	.venv-demo/$(BIN)/wconv to-safetensors build/demo/model -o build/demo/converted
	@echo
	@echo "4. The new folder. Diffusers loads this one."
	@cd build/demo && $(call SIZES,converted)
	.venv-demo/$(BIN)/wconv inspect build/demo/converted
	@echo
	@echo "5. Are these the same weights? Every value of both folders is compared."
	.venv-demo/$(BIN)/wconv verify build/demo/model build/demo/converted
	@echo
	@echo "That was all. Try it on a folder of yours: .venv-demo/$(BIN)/wconv to-safetensors FOLDER -o NEW_FOLDER"

# Measuring takes a third more time; what is run while something is written need not wait for it.
PYTEST = .venv/$(BIN)/python $(if $(COVERAGE),-m coverage run )-m pytest

test: .venv/installed  ## run the tests but the slow and the remote ones (PYTEST_ARGS=... for more options)
	@rm -rf build/coverage && mkdir -p build/coverage
	$(PYTEST) -n 2 -m "not slow and not remote" $(PYTEST_ARGS)

test-remote: .venv/installed .venv-servers/installed  ## run the tests with stores: S3, Azure, the web and the Hub, all on this machine
	@mkdir -p build/coverage
	$(PYTEST) -n 2 -m "remote and not slow" $(PYTEST_ARGS)

coverage:  ## hold what "make test test-remote COVERAGE=1" has reached
	.venv/$(BIN)/python -m coverage combine -q
	.venv/$(BIN)/python -m coverage report

test-all: .venv/installed .venv-coreml/installed .venv-engines/installed .venv-servers/installed  ## run all tests
	.venv/$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: format-check ruff-check type-check readme-check docs-check  ## run all the checks below

format-check: .venv-lint/installed  ## is everything formatted?
	.venv-lint/$(BIN)/ruff format --check

ruff-check: .venv-lint/installed  ## lint
	.venv-lint/$(BIN)/ruff check

type-check: .venv-lint/installed  ## check the types
	.venv-lint/$(BIN)/mypy converter tests scripts

readme-check: .venv-lint/installed  ## are the .rst files valid?
	@mkdir -p build
	@set -e; for file in *.rst docs/*.rst; do \
		echo "docutils $$file"; \
		.venv-lint/$(BIN)/python -m docutils --report=info --halt=warning --syntax-highlight=none \
			$$file build/$$(basename $$file).html; \
	done

docs-check: .venv-lint/installed  ## do docs/ say what the commands and the doctor say?
	.venv-lint/$(BIN)/python scripts/make_docs.py --check

docs: .venv-lint/installed  ## write docs/commands.rst and docs/findings.rst from the code
	.venv-lint/$(BIN)/python scripts/make_docs.py

format: .venv-lint/installed  ## format everything and mend what the linter can
	.venv-lint/$(BIN)/ruff check --fix-only
	.venv-lint/$(BIN)/ruff format

bench: .venv/installed  ## time wconv against cp and others (BENCH_ARGS=... for options)
	.venv/$(BIN)/python scripts/bench.py $(BENCH_ARGS)

same: .venv/installed  ## hold what is written against what the last release writes (SAME_ARGS=... for a commit)
	.venv/$(BIN)/python scripts/same_bytes.py $(SAME_ARGS)

matrix:  ## install and convert with each Python that setup.cfg promises and that is here
	$(PYTHON) scripts/matrix.py build/matrix
	@rm -rf build/lib

samples: .venv-trainers/installed  ## make tests/corpus/training anew
	.venv-trainers/$(BIN)/python scripts/make_training_samples.py build/training --pack tests/corpus/training

fuzz: .venv-fuzz/installed  ## feed the readers made-up files, a minute each (FUZZ_ARGS=... for options)
	.venv-fuzz/$(BIN)/python scripts/fuzz.py $(FUZZ_ARGS)

clean:  ## remove environments, caches and all that was built
	rm -rf .venv .venv-demo .venv-lint .venv-fuzz .venv-coreml .venv-engines .venv-servers .venv-trainers build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find converter scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The environments. Each holds an empty file "installed", newer than what it was installed from.

.venv-demo/installed: $(PACKAGE)
	@echo "Installing wconv without torch into .venv-demo ..."
	@rm -rf build/lib
	@$(PYTHON) -m venv .venv-demo
	@.venv-demo/$(BIN)/python -m pip install -q .
	@touch $@

# torch goes first and alone, so that nothing that depends on torch gets to choose it.
.venv/installed: setup.cfg pyproject.toml
	@echo "Installing $(TORCH), wconv and what its tests need into .venv (a few minutes) ..."
	@$(PYTHON) -m venv .venv
	@.venv/$(BIN)/python -m pip install -q $(TORCH)
	@.venv/$(BIN)/python -m pip install -q -e ".[test]"
	@touch $@

.venv-coreml/installed: setup.cfg pyproject.toml
	@echo "Installing coremltools and what it converts with into .venv-coreml (a few minutes) ..."
	@$(PYTHON) -m venv .venv-coreml
	@.venv-coreml/$(BIN)/python -m pip install -q $(TORCH)
	@.venv-coreml/$(BIN)/python -m pip install -q ".[coreml]"
	@touch $@

.venv-engines/installed: setup.cfg pyproject.toml
	@echo "Installing wconv and the engines of clusters into .venv-engines ..."
	@$(PYTHON) -m venv .venv-engines
	@.venv-engines/$(BIN)/python -m pip install -q -e ".[engines]"
	@touch $@

# DeepSpeed is built here, without its operators, which need a compiler; it looks at the torch that is there.
.venv-trainers/installed: setup.cfg pyproject.toml
	@echo "Installing torch, transformers, accelerate, DeepSpeed and ultralytics into .venv-trainers (a few minutes) ..."
	@$(PYTHON) -m venv .venv-trainers
	@.venv-trainers/$(BIN)/python -m pip install -q $(TORCH)
	@.venv-trainers/$(BIN)/python -m pip install -q ".[trainers]"
	@DS_BUILD_OPS=0 .venv-trainers/$(BIN)/python -m pip install -q --no-deps --no-build-isolation $(TRAINERS_ALONE)
	@touch $@

# Azurite needs npm; without, its tests are left out.
.venv-servers/installed: setup.cfg pyproject.toml Makefile
	@echo "Installing Swift, snailmail and Azurite into .venv-servers ..."
	@$(PYTHON) -m venv .venv-servers
	@.venv-servers/$(BIN)/python -m pip install -q ".[servers]"
	@if command -v npm >/dev/null; then npm install --silent --no-audit --no-fund --prefix .venv-servers $(AZURITE); \
		else echo "There is no npm: the tests with Azure's store will be left out."; fi
	@touch $@

.venv-fuzz/installed: setup.cfg pyproject.toml
	@echo "Installing wconv and atheris into .venv-fuzz ..."
	@$(PYTHON) -m venv .venv-fuzz
	@.venv-fuzz/$(BIN)/python -m pip install -q -e ".[fuzz]"
	@touch $@

.venv-lint/installed: setup.cfg pyproject.toml
	@echo "Installing wconv and the linters into .venv-lint ..."
	@$(PYTHON) -m venv .venv-lint
	@.venv-lint/$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@
