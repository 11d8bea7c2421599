# Every target sets up what it needs; a second call skips that. `make help` lists the targets and the variables.
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
BIN := $(VENV)/bin
# This file marks a finished set-up. With TORCH=... its name has a checksum of TORCH, so another TORCH sets up again.
# Without TORCH any finished set-up will do.
READY := $(VENV)/ready$(if $(TORCH),-$(shell printf %s "$(TORCH)" | cksum | cut -d ' ' -f 1))

.PHONY: help demo test test-slow sanitize lint typecheck format docs wheel bench gpu clean

help:
	@echo "make demo      two-stage CW-DPO on handwritten digits; plot and metrics go to runs/digits"
	@echo "make test      run the test suite; WORKERS=2 files at a time"
	@echo "make test-slow run the tests that take minutes each"
	@echo "make sanitize  run the op tests on a C++ backend built with ASan and UBSan"
	@echo "make lint      ruff (check and format) and mypy"
	@echo "make format    ruff: apply fixes"
	@echo "make typecheck mypy alone"
	@echo "make docs      build the documentation site in build/site; any warning is an error"
	@echo "make wheel     build sdist and wheel in dist/, test the wheel in the environments of WHEEL_ENVS"
	@echo "make bench     run the CPU benchmarks; results go to benchmarks/results"
	@echo "make gpu       on a machine with a GPU: tests and benchmarks into runs/gpu; installs nothing"
	@echo "make clean     remove everything that make created, runs included"
	@echo
	@echo "PYTHON=python3.12     the Python to use, 3.11 or newer (default: python3)"
	@echo "VENV=folder           the virtual environment (default: .venv)"
	@echo "TORCH=torch==2.15.0   another torch than the one in constraints.txt, for example beside the default one:"
	@echo "                      make test TORCH=torch==2.15.0 VENV=.venv-2.15"
	@echo "WHEEL_ENVS=3.12:2.15.0   a list of PYTHON:TORCH for make wheel"

# Any Python can run this; the set-up scripts need 3.11.
define CHECK_PYTHON
	@command -v "$(PYTHON)" > /dev/null || { \
		echo "set-up: $(PYTHON) was not found. Install Python 3.11 or newer, or name yours: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "set-up: expected Python 3.11 or newer,\
 got %d.%d. Name another one: make PYTHON=python3.12" % sys.version_info[:2])'
endef

$(READY): pyproject.toml setup.py constraints.txt tools/set_up.py $(shell find csrc -name "*.cpp" -o -name "*.h")
	$(CHECK_PYTHON)
	@rm -f $(VENV)/ready*
	@"$(PYTHON)" tools/set_up.py --venv "$(VENV)" --torch "$(TORCH)"
	@touch $(VENV)/ready $@

demo: $(READY)
	$(BIN)/cwdpo demo

# A file stays with one worker, which shares its fixtures. pytest-benchmark refuses to run beside other workers.
WORKERS ?= 2
test: $(READY)
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(WORKERS) --dist loadfile -p no:benchmark

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# Builds in a copy, so that the library of the source tree stays as it is. Only the C++ is instrumented, so leaks in
# Python are not reported.
SANITIZED := build/sanitized
sanitize: $(READY)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r cwdpo_kernels csrc tests benchmarks setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	rm -f $(SANITIZED)/cwdpo_kernels/*.so
	cd $(SANITIZED) && CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
		LDFLAGS="-fsanitize=address,undefined" $(abspath $(BIN))/python setup.py --quiet build_ext --inplace --force
	nm -D $(SANITIZED)/cwdpo_kernels/libcwdpo_cpu.so | grep -q __asan_report  # without ASan the tests would prove nothing
	cd $(SANITIZED) && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(abspath $(BIN))/python -m pytest tests/ops tests/test_library.py \
		-k "csrc or (test_library and not compiler)"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

typecheck: $(READY)
	$(BIN)/mypy

# Each PYTHON:TORCH is an environment that the wheel is installed into and tested in.
WHEEL_ENVS ?= 3.11:2.11.0 3.11:2.13.0 3.13:2.15.0
wheel: $(READY)
	$(BIN)/python tools/wheel.py $(WHEEL_ENVS)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Reads the docstrings without importing the packages, so neither torch nor a compiler is needed.
DOCS := build/docs
$(DOCS)/ready: pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	@echo "set-up: mkdocs and its theme in $(DOCS) (about 40 MB to download)"
	@"$(PYTHON)" -m venv $(DOCS)
	@"$(PYTHON)" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]\
["optional-dependencies"]["docs"], sep="\n")' > $(DOCS)/requirements.txt
	@$(DOCS)/bin/pip install --quiet --constraint constraints.txt --requirement $(DOCS)/requirements.txt
	@touch $@

docs: $(DOCS)/ready
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "docs: build/site/index.html"

bench: $(READY)
	$(BIN)/python -m benchmarks.run

gpu:
	$(PYTHON) -m benchmarks.gpu --out runs/gpu

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
