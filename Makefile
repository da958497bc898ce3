# Everything runs in .venv, which is made on first use and brought up to date when
# pyproject.toml or constraints.txt change. Another interpreter: make PYTHON=python3.12 ...
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The lane of the oldest versions has the oldest Python and a separate environment.
OLDEST_PYTHON ?= python3.10
OLDEST := .venv-oldest
# Processes that share the tests; each takes one core and up to 2 GB. Three were slower on two cores.
WORKERS ?= 2
SHARED = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
RUFF = echo "ruff: lint and format, a second" && $(BIN)/ruff check . && $(BIN)/ruff format --check .
# pyright is told not to look for newer releases of itself: the version is pinned.
PYRIGHT = PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

.DEFAULT_GOAL := help
.PHONY: help setup train bench test test-fast test-docs test-all test-oldest test-slurm lint format docs build check-build clean

help:
	@echo "make train   train on the handwritten digits with two ranks, write runs/digits-<time>/"
	@echo "make bench   results against the oracle, then speed, in benchmarks/results/; under 8 minutes"
	@echo "make test    lint, types and all tests: what must pass before a change goes in"
	@echo "make test-fast  the quick tests, under 90 seconds on two idle cores: for the inner loop"
	@echo "make test-docs    examples of docstrings, README.md and docs/, under a minute"
	@echo "make test-all  all tests, with the rare cases that make test leaves out, about 15 minutes"
	@echo "make test-oldest  all tests on Python 3.10 and the oldest versions promised, in .venv-oldest"
	@echo "make test-slurm   a study and a training on a real SLURM; needs root on Debian, about 5 minutes"
	@echo "make lint    ruff and pyright only"
	@echo "make format  let ruff rewrite the sources"
	@echo "make docs    the documentation site, in site/; needs Python 3.11"
	@echo "make build   the source archive and the wheel, in out/"
	@echo "make check-build  installs what make build wrote in an empty environment and trains there"
	@echo "make setup   only make .venv (the others do it when needed)"
	@echo "make clean   remove caches and build results; keeps .venv*, runs/ and dist/ (dist/ is source)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null \
	  || { echo "gq_triton needs Python 3.10 or newer, and '$(PYTHON)' is not on the PATH: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "gq_triton needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name a newer one: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV): installs PyTorch and the tools, 1 to 10 minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "'$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt pip setuptools
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[dev]"
	@touch $@

# OMP_NUM_THREADS=1 is what torchrun sets for several ranks on one machine, here without its warning.
train: $(READY)
	@out=runs/digits-$$(date +%Y%m%d-%H%M%S); \
	echo "Training on the digits data with two ranks into $$out: about a minute"; \
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --standalone --nproc-per-node=2 \
	  launch/train.py --task digits --out $$out

bench: $(READY)
	@echo "Checking the results, then measuring: under 8 minutes; gq-triton bench --help has the options"
	@$(BIN)/gq-triton bench

# A file stays with one worker, and the longest files begin first: tests/conftest.py sorts them.
# Tests often wait for processes that they start, so pyright runs beside them, and reports at the end.
test: $(READY)
	@$(RUFF)
	@echo "pytest: all tests with $(WORKERS) workers, about 9 minutes on two cores; pyright runs beside them"
	@types=$$(mktemp); $(PYRIGHT) > $$types 2>&1 & pyright=$$!; \
	trap 'kill $$pyright' INT TERM; \
	$(BIN)/pytest $(SHARED); tests=$$?; \
	wait $$pyright; checked=$$?; \
	echo "pyright:"; cat $$types; rm $$types; \
	exit $$((tests || checked))

test-fast: $(READY)
	@echo "pytest: the quick tests with $(WORKERS) workers, under 90 seconds on two idle cores"
	@$(BIN)/pytest $(SHARED) -m "not slow"

test-docs: $(READY)
	@echo "pytest: the examples of docstrings, README.md and docs/, under a minute"
	@$(BIN)/pytest tests/meta/test_api.py tests/meta/test_doctests.py tests/meta/test_documentation.py

test-all: $(READY)
	@echo "pytest: all tests, rare cases too, about 15 minutes on two cores"
	@GQ_TRITON_EVERY_CASE=1 $(BIN)/pytest $(SHARED)

test-oldest: $(OLDEST)/.ready
	@echo "pytest: all tests on the oldest versions promised"
	@$(OLDEST)/bin/pytest $(SHARED)

test-slurm: $(READY)
	@echo "SLURM: installs slurm-wlm, starts one node, runs launch/study_slurm.sh and launch/slurm.sh"
	@tests/slurm/setup.sh start; tests/slurm/check.sh $(BIN)/python; failed=$$?; \
	tests/slurm/setup.sh stop; exit $$failed

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	@command -v $(OLDEST_PYTHON) > /dev/null \
	  || { echo "The oldest versions run on Python 3.10, and '$(OLDEST_PYTHON)' is not on the PATH: make test-oldest OLDEST_PYTHON=/path/to/python3.10"; exit 1; }
	@$(OLDEST_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' \
	  || { echo "The oldest versions run on Python 3.10; '$(OLDEST_PYTHON)' is $$($(OLDEST_PYTHON) -V 2>&1): make test-oldest OLDEST_PYTHON=/path/to/python3.10"; exit 1; }
	@echo "Setting up $(OLDEST): downloads 3 GB, 3 to 15 minutes the first time"
	@test -x $(OLDEST)/bin/python || $(OLDEST_PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check -c constraints-oldest.txt pip setuptools
	@$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check --no-build-isolation -c constraints-oldest.txt -e ".[test]"
	@touch $@

lint: $(READY)
	@$(RUFF)
	@echo "pyright: types, up to a minute"
	@$(PYRIGHT)

format: $(READY)
	@echo "ruff: rewrites imports and layout, a second"
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

# Zensical fails at a broken link. What griffe says of a docstring is no failure to it, but one here.
docs: $(VENV)/.docs
	@echo "Building the site in site/ from docs/ and the docstrings, about 15 seconds"
	@said=$$($(BIN)/zensical build --strict --clean 2>&1); failed=$$?; \
	echo "$$said"; \
	! echo "$$said" | grep -q "^griffe:" && exit $$failed

$(VENV)/.docs: $(READY)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "The site is built with Python 3.11 or newer, and $(VENV) has $$($(BIN)/python -V): rm -r $(VENV), then make docs PYTHON=python3.12"; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[docs]"
	@touch $@

# --no-isolation: with the pinned setuptools of .venv.
build: $(READY)
	@echo "Building the source archive and the wheel in out/, a few seconds"
	@rm -rf out
	@$(BIN)/python -m build --no-isolation --outdir out > /dev/null
	@ls out

# As a user would: newest versions, no checkout on the path. The wheel first, then the source archive.
check-build: build
	@echo "Installing the wheel with all it needs into out/empty, 1 to 10 minutes"
	@$(BIN)/python -m venv out/empty && mkdir out/elsewhere && cp examples/optimizer.py out/elsewhere
	@out/empty/bin/python -m pip install -qq --disable-pip-version-check out/*.whl
	@cd out/elsewhere && ../empty/bin/gq-triton --version && ../empty/bin/python optimizer.py
	@echo "Installing the source archive in its place"
	@out/empty/bin/python -m pip install -qq --disable-pip-version-check --force-reinstall --no-deps out/*.tar.gz
	@cd out/elsewhere && ../empty/bin/gq-triton --version && ../empty/bin/python optimizer.py
	@rm -rf out/empty out/elsewhere
	@echo "Both archives install and train"

# dist/ holds sources: only files that a build without --outdir left there are removed.
clean:
	@echo "Removing caches and build results, a second"
	@rm -rf build out site .cache gq_triton.egg-info .pytest_cache .ruff_cache .hypothesis
	@rm -f dist/*.whl dist/*.tar.gz
	@find . -name __pycache__ -type d -not -path "./$(VENV)*" -prune -exec rm -rf {} +
