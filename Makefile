# `make demo` and `make test` set up what they need, once, in .venv.

PYTHON ?= python3
BIN := .venv/bin
OUT ?= outputs
# Models of this size do not gain from more threads, and two busy test workers lose much.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint notebooks test-colab map lab freeze-notebooks clean

help:  ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

# Installs anew when the dependencies change. With the clone on Python's path, a script beside the
# clone finds the package, not the clone's folder, which is named engm as well.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "engm needs Python 3.11 or newer; say which: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up .venv: torch, jupyterlab and others (once, a few minutes, and pip is silent meanwhile)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@echo '$(CURDIR)' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/clone.pth"
	@touch $@

demo: .venv/ready  ## run every notebook on the digits, and build one HTML report
	@$(BIN)/engm demo --out $(OUT)

test: .venv/ready lint  ## ruff, mypy, pytest, nbval
	$(BIN)/pytest -n 2 --dist worksteal --durations 25 --durations-min 1
	$(MAKE) --no-print-directory notebooks

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: .venv/ready
	$(BIN)/nbstripout --verify $(STRIP) notebooks/*.ipynb
	$(BIN)/pytest --nbval-lax --nbval-cell-timeout=300 -n 2 --dist loadfile notebooks

# Outputs and counts stay (nbval compares them); what differs from run to run goes.
STRIP := --keep-output --keep-count --keep-id \
  --extra-keys "metadata.widgets metadata.papermill cell.metadata.papermill cell.metadata.execution"

freeze-notebooks: .venv/ready  ## run the notebooks in place and normalise them, before a commit
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb
	$(BIN)/nbstripout $(STRIP) notebooks/*.ipynb

# Colab's Python and its versions; the kit is installed as Colab's first cell does.
PYTHON_COLAB ?= python3.13

.venv-colab/ready: pyproject.toml constraints-colab.txt
	@$(PYTHON_COLAB) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' 2>/dev/null || \
	  { echo "Colab has Python 3.13, and $(PYTHON_COLAB) is not; say which is:" \
	    "make test-colab PYTHON_COLAB=/path/to/python3.13"; exit 1; }
	@echo "setting up .venv-colab (once; with torch's build for CUDA, several GB)"
	@$(PYTHON_COLAB) -m venv .venv-colab
	@.venv-colab/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints-colab.txt '.[batch]' ipywidgets
	@touch $@

test-colab: .venv-colab/ready  ## install and run the notebooks as Colab does, away from here
	@rm -rf build $(OUT)/colab
	@.venv-colab/bin/python -m pip install --quiet --disable-pip-version-check \
	  --force-reinstall --no-deps .
	@mkdir -p $(OUT)/colab
	cd $(OUT)/colab && PYDEVD_DISABLE_FILE_VALIDATION=1 $(CURDIR)/.venv-colab/bin/engm demo --out .

map: demo  ## measure the times in notebooks/README.md, and renew its pictures
	$(BIN)/python notebooks/pictures/notebook_map.py $(OUT)
	$(BIN)/python notebooks/pictures/opening.py notebooks/pictures/opening.png

lab: .venv/ready  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

clean:  ## remove .venv, outputs and caches; runs and datasets stay
	rm -rf .venv .venv-colab outputs build .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
