# Each target does all of its own set-up; a second call finds it done. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# On Linux without an NVIDIA driver only a CPU build of torch will do: its local version is asked for by name, so
# that pip fails rather than fetch gigabytes of CUDA libraries where no CPU build is to be had. See CONTRIBUTING.md.
CPU_ONLY := $(if $(filter Linux,$(shell uname -s)),$(if $(shell command -v nvidia-smi),,+cpu))
TORCH ?= $(shell sed -n 's/^torch==.*/&/p' constraints.txt)$(CPU_ONLY)

.PHONY: help demo test sanitize lint format docs bench gpu clean

help:
	@echo "make demo    two-stage CW-DPO on handwritten digits; the picture and the figures land in runs/digits"
	@echo "make test    the test suite"
	@echo "make sanitize  the op tests on a C++ backend that watches its memory and its arithmetic (ASan, UBSan)"
	@echo "make lint    ruff, check and format"
	@echo "make bench   the CPU benchmarks; results land in benchmarks/results"
	@echo "make gpu     on a machine with a GPU: the tests and the benchmarks there, into runs/gpu; installs nothing"
	@echo "make format  ruff, applied"
	@echo "make docs    the documentation site, into build/site"
	@echo "make clean   remove everything that make made, runs included"

$(READY): pyproject.toml setup.py constraints.txt $(shell find csrc -name "*.cpp" -o -name "*.h")
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[trainer,bench,dev]"
	touch $@

demo: $(READY)
	$(BIN)/cwdpo demo

test: $(READY)
	$(BIN)/python -m pytest

# A copy, so that the library of the tree stays as it is. Only the C++ is instrumented: leaks are Python's own business.
SANITIZED := build/sanitized
sanitize: $(READY)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r cwdpo_kernels csrc tests benchmarks setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	rm -f $(SANITIZED)/cwdpo_kernels/*.so
	cd $(SANITIZED) && CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
		LDFLAGS="-fsanitize=address,undefined" $(abspath $(BIN))/python setup.py --quiet build_ext --inplace --force
	nm -D $(SANITIZED)/cwdpo_kernels/libcwdpo_cpu.so | grep -q __asan_report  # else the tests would prove nothing
	cd $(SANITIZED) && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(abspath $(BIN))/python -m pytest tests/ops tests/test_library.py \
		-k "csrc or (test_library and not compiler)"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Reads the docstrings without importing the packages, so neither torch nor a compiler is needed.
DOCS := build/docs
$(DOCS)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(DOCS)/requirements.txt
	$(DOCS)/bin/pip install --quiet --constraint constraints.txt --requirement $(DOCS)/requirements.txt
	touch $@

docs: $(DOCS)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

bench: $(READY)
	$(BIN)/python -m benchmarks.run

gpu:
	$(PYTHON) -m benchmarks.gpu --out runs/gpu

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
