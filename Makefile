# make help says what there is.  Everything happens in .venv; nothing outside this directory is touched.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# CPU users may name PyTorch's CPU index here: TORCH_INDEX=https://... make demo
TORCH_INDEX ?=
# pip's cache lies in the home folder: PIP_FLAGS= make demo uses it all the same.
PIP_FLAGS ?= --no-cache-dir
# Files of tests side by side.  Most of them wait for processes and timers; more than two at once on two cores only makes
# deadlines late.
JOBS ?= 2

.PHONY: help demo test test-slow check house wheels bench format models clean

help:
	@echo "make demo        three nodes on this machine answer a question, plain decoding against trees"
	@echo "make test        the tests (half an hour on two cores)"
	@echo "make test-slow   the long ones"
	@echo "make check       lint, types, import rules, generated code"
	@echo "make house       figures of the code's structure: files, folders, classes, functions, docstrings"
	@echo "make wheels      dist/treeswarm-*.whl, and what measures it: dist/treeswarm_bench-*.whl"
	@echo "make bench       the figures of docs/benchmarks.md (an hour and a half)"
	@echo "make format      let ruff rewrite"
	@echo "make models      train the bundled pair again (hours)"
	@echo "make clean       remove .venv and caches"

demo: $(VENV)/demo.stamp
	@$(VENV)/bin/swarm demo

test: $(VENV)/dev.stamp
	@OMP_NUM_THREADS=1 $(VENV)/bin/pytest -m "not slow" -n $(JOBS) --dist loadfile

test-slow: $(VENV)/dev.stamp
	@OMP_NUM_THREADS=1 $(VENV)/bin/pytest -m slow

check: $(VENV)/dev.stamp
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports
	@$(PY) proto/generate.py --check
	@echo "all checks passed"

house: $(VENV)/dev.stamp
	@$(PY) scripts/house.py

wheels: $(VENV)/demo.stamp
	@$(PY) -m pip wheel -q --disable-pip-version-check --no-deps -w dist . ./bench
	@ls dist/*.whl

bench: $(VENV)/demo.stamp
	@mkdir -p build
	@for which in exact trees overhead wan batch flips tls fuzz load faults; do \
		echo "swarm bench $$which -> build/bench-$$which.json"; \
		$(VENV)/bin/swarm bench $$which --json > build/bench-$$which.json || exit 1; \
	done

format: $(VENV)/dev.stamp
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

models: $(VENV)/dev.stamp
	@$(PY) deploy/demo_models/recipe.py tokenizer target draft report --out swarm/treeswarm/models

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# The stamps are made again when what is to be installed changes, so a second run starts at once.
$(VENV)/demo.stamp: pyproject.toml bench/pyproject.toml constraints.txt
	@echo "This installs treeswarm with PyTorch and transformers into $(CURDIR)/$(VENV):"
	@echo "about 0.3 GB of packages to download and 1.4 GB on disk with PyTorch's CPU build, the one pinned here where"
	@echo "the index has it.  Where the index serves a CUDA build instead, several GB: name a CPU index in TORCH_INDEX."
	@$(MAKE) --no-print-directory install EXTRAS=node,draft,serve
	@touch $@

$(VENV)/dev.stamp: pyproject.toml bench/pyproject.toml constraints.txt
	@echo "This installs treeswarm with PyTorch, transformers and the development tools into $(CURDIR)/$(VENV):"
	@echo "about 0.45 GB of packages to download and 1.7 GB on disk with PyTorch's CPU build."
	@$(MAKE) --no-print-directory install EXTRAS=node,draft,serve,dev
	@touch $@ $(VENV)/demo.stamp

.PHONY: install
install:
	@$(PYTHON) scripts/install.py $(EXTRAS) --environment "$(CURDIR)/$(VENV)" --torch-index="$(TORCH_INDEX)" --pip-flags="$(PIP_FLAGS)"
