# study      run every notebook at its default parameters into reports/runs/<notebook>/, with index.html
#            PROFILE=full: the long runs instead, into reports/<notebook>/; hours, but resumable
# sweep      one run for each point of a grid: GRID=notebooks/sweeps/pruning.yaml
# test       lint, unit and parity tests, notebooks compared with their committed outputs; in WORKERS=2
#            processes of one thread each
# test-slow  the tests that take minutes
# lab        JupyterLab
# goldens    execute the notebooks in place, after a change that is meant to change their outputs, and show
#            the difference
#
# Each sets up .venv first, when pyproject.toml or constraints.txt is newer than it.
# PYTHON=...    makes .venv with another interpreter
# PIP_ARGS=...  passes options to pip, such as an index that has a CPU-only torch

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
PIP_ARGS ?=
WORKERS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9][0-9]_*.ipynb))

# The notebooks' kernel, `python3`, is .venv's, whatever the user has registered under that name.
export JUPYTER_PREFER_ENV_PATH = 1

# PROFILE=full: the runs in reports/.
ifeq ($(PROFILE),full)
OUT := reports
PARAMETERS = -f notebooks/profiles/$$study.yaml
else
OUT := reports/runs
PARAMETERS = -p out $(OUT)/$$study
endif

# Processes beside each other should not share the cores' threads; the committed outputs are of one thread.
test goldens: export OMP_NUM_THREADS = 1

.PHONY: study sweep test test-slow lab goldens

study: $(READY)
	set -e; for nb in $(NOTEBOOKS); do \
	    study=$$(basename $$nb .ipynb); \
	    run=$(OUT)/$$study/$$study; \
	    mkdir -p $(OUT)/$$study; \
	    $(PY) -m papermill $$nb $$run.partial.ipynb $(PARAMETERS); \
	    mv $$run.partial.ipynb $$run.ipynb; \
	done
	$(PY) -m sdcomp.study.pages $(OUT)

# Without a lock, which a killed sweep would leave behind: every point replaces its files as a whole.
sweep: $(READY)
	@test -f "$(GRID)" || { echo "GRID=$(GRID) is not a file; give one such as" \
	    "GRID=notebooks/sweeps/pruning.yaml" >&2; exit 1; }
	$(PY) -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[sweep]'
	$(PY) -m snakemake --snakefile notebooks/sweeps/Snakefile --configfile $(GRID) --cores all --rerun-incomplete --nolock

test: $(READY)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pytest -n $(WORKERS) --dist loadfile
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --nbval --nbval-current-env $(NOTEBOOKS)

test-slow: $(READY)
	$(PY) -m pytest -m slow

lab: $(READY)
	$(PY) -m jupyterlab

goldens: $(READY)
	$(PY) tools/goldens.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(PIP_ARGS) -c constraints.txt -e '.[test]'
	touch $@
