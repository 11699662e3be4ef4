# make demo    train on a fresh machine, from nothing: environment, data, LUFFY and GRPO, evaluation, plot
# make test    the same for every test
# make lint    ruff;   make clean   removes the environment, the demo's runs and caches
#
# The environment is .venv here; the system's Python is never touched. Use another interpreter with
# `make PYTHON=python3.12 demo`, another torch with `make TORCH="torch==2.13.0 --index-url URL" demo`.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint clean

# torch comes first and pinned, so that no other package pulls a build of its own
$(VENV)/.run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed, $(PYTHON) is older: make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.test: $(VENV)/.run requirements-test.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

demo: $(VENV)/.run
	$(BIN)/python benchmarks/demo.py

test: $(VENV)/.test
	$(BIN)/python -m pytest tests

lint: $(VENV)/.test
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) runs/demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
