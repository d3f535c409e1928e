# make demo   three models on a laptop's CPU, and prints a table and a plot
# make test   the test suite               make test-slow   the training checks, minutes each
# make test-faults  kills and damages hundreds of runs, and compares each with an uninterrupted one
# make check  ruff check and format, mypy  make docs        the documentation, as a site in docs/_build
# make paper  the paper's tables and claims, about a day on two CPU cores
# make bench  time and memory of a step    make clean       remove what these made
# make audit  known vulnerabilities of the pinned packages, as pip-audit knows them
#
# The torch build (CPU or CUDA) is yours to choose: install it into .venv, or beside the python below, and setup takes it.

PYTHON ?= python3
BIN = .venv/bin
SUITABLE = import torch; v = torch.__version__.split("+")[0].split(".")[:2]; raise SystemExit((int(v[0]), int(v[1])) < (2, 11))

.PHONY: setup demo paper test test-slow test-faults check docs bench clean audit

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || if $(PYTHON) -c '$(SUITABLE)' 2>/dev/null; \
	  then echo "using the torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages .venv; \
	  else $(PYTHON) -m venv .venv; fi
	@$(BIN)/python -c '$(SUITABLE)' 2>/dev/null || { echo "installing torch into .venv"; \
	  $(BIN)/python -m pip install -q -c constraints.txt torch; }
	@grep -v '^torch==' constraints.txt > .venv/constraints.txt
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> .venv/constraints.txt
	@echo "installing into .venv, which takes a minute or two"
	@$(BIN)/python -m pip install -q -c .venv/constraints.txt -e '.[dev]'
	@touch $@

bench: setup
	$(BIN)/python scripts/bench.py --preset cpu --folder results/bench
	$(BIN)/python scripts/bench.py --preset span --repeats 5 --folder results/bench

# All tables, figures and claims, every model tuned alike: make paper SIZE=mini TEXT=FILE. It may be stopped, and goes on.
SIZE ?= mini
paper: setup
	$(BIN)/expire-span-paper all size=$(SIZE) --tune hydra.launcher.n_jobs=2 run.num_threads=1 run.progress_bar=false \
	  $(if $(TEXT),task.path=$(TEXT))

demo: setup
	$(BIN)/python scripts/demo.py

test: setup .venv/triton
	$(BIN)/pytest -n auto --dist worksteal

# CUDA builds of torch bring Triton along. Beside a CPU build it is for the tests of the kernels, in its interpreter.
.venv/triton: .venv/ready
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install -q triton==3.6.0 \
	  || echo "no Triton here: the tests of its kernels are skipped"
	@touch $@

test-slow: setup
	$(BIN)/pytest -n auto --dist worksteal -m slow --durations=0

test-faults: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m faults tests/faults

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .venv/typed/expire_span  # the package as it is installed, with tasks/ and conf/ inside it
	@ln -sfn $(CURDIR)/expire_span/* $(CURDIR)/tasks $(CURDIR)/conf .venv/typed/expire_span
	$(BIN)/mypy

docs: setup .venv/docs
	@$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo "the documentation is in docs/_build/html/index.html"

.venv/docs: .venv/ready
	@$(BIN)/python -c 'import sphinx, myst_parser, furo, latex2mathml' 2>/dev/null \
	  || $(BIN)/python -m pip install -q -c .venv/constraints.txt -e '.[docs]'
	@touch $@

audit: setup
	@$(BIN)/python -m venv .venv/audit && .venv/audit/bin/pip install -q pip-audit
	.venv/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip

clean:
	rm -rf .venv build dist demo docs/_build docs/_generated *.egg-info .pytest_cache .mypy_cache .ruff_cache
