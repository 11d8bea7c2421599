# Every target sets up what it needs; a second call skips that. `make help` lists the targets and the variables.
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
BIN := $(VENV)/bin
quoted = '$(subst ','\'',$(1))'# one word for the shell, whatever it contains

# Make splits its targets at spaces and gives other characters a meaning, so these are refused.
ODD := $(if $(VENV),,empty)$(filter -%,$(VENV))$(filter-out 0,$(shell \
	printf %s $(call quoted,$(VENV)) | LC_ALL=C tr -d 'A-Za-z0-9_./+@,\200-\377-' | wc -c))
ifneq ($(ODD),)
$(error VENV: expected a path without spaces and special characters, got '$(VENV)')
endif

# This file marks a finished set-up. With TORCH=... its name has a checksum of TORCH, so another TORCH sets up again.
# Without TORCH any finished set-up will do.
READY := $(VENV)/ready$(if $(TORCH),-$(shell printf %s $(call quoted,$(TORCH)) | cksum | cut -d ' ' -f 1))

.PHONY: help demo test test-slow tritons sanitize sanitize-threads lint typecheck format docs wheel bench gpu rebuild clean

help:
	@echo "make demo      two-stage CW-DPO on handwritten digits; plot and metrics go to runs/digits"
	@echo "make test      run the test suite; WORKERS=2 files at a time"
	@echo "make test-slow run the tests that take minutes each"
	@echo "make tritons   compile and test the kernels with other versions of Triton: TRITONS=\"3.6.0 3.9.0\""
	@echo "make sanitize  run the op tests on a C++ backend built with ASan and UBSan"
	@echo "make sanitize-threads  the same with ThreadSanitizer, for races between the threads of a parallel loop"
	@echo "make lint      ruff (check and format) and mypy"
	@echo "make format    ruff: apply fixes"
	@echo "make typecheck mypy alone"
	@echo "make docs      build the documentation site in build/site; any warning is an error"
	@echo "make wheel     build sdist and wheel in dist/, test the wheel in the environments of WHEEL_ENVS"
	@echo "make bench     run the CPU benchmarks; results go to benchmarks/results"
	@echo "make gpu       on a machine with a GPU: tests and benchmarks into runs/gpu; installs nothing"
	@echo "make rebuild   build the C++ library again, for example after installing a compiler"
	@echo "make clean     remove the environment that make created, the C++ library, build, dist and caches; runs stays"
	@echo
	@echo "PYTHON=python3.12     the Python to use, 3.11 to 3.13 (default: python3)"
	@echo "VENV=folder           the virtual environment (default: .venv)"
	@echo "TORCH=torch==2.15.0   another torch than the one in constraints.txt, for example beside the default one:"
	@echo "                      make test TORCH=torch==2.15.0 VENV=.venv-2.15"
	@echo "WHEEL_ENVS=3.12:2.15.0   a list of PYTHON:TORCH for make wheel"

# Any Python can run this; the set-up scripts need 3.11.
define CHECK_PYTHON
	@command -v "$(PYTHON)" > /dev/null || { \
		echo "set-up: $(PYTHON) was not found. Install Python 3.11 to 3.13, or name yours: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "set-up: expected Python 3.11 to 3.13,\
 got %d.%d. Name another one: make PYTHON=python3.12" % sys.version_info[:2])'
endef

$(READY): pyproject.toml setup.py constraints.txt tools/set_up.py $(shell find csrc -name "*.cpp" -o -name "*.h")
	$(CHECK_PYTHON)
	@"$(PYTHON)" tools/set_up.py --venv $(VENV) --torch=$(call quoted,$(TORCH))
	@touch $(VENV)/ready $@

demo: $(READY)
	$(BIN)/cwdpo demo

# A file stays with one worker, which shares its fixtures. By default those with the fewest tests come last: the slowest
# here. pytest-benchmark refuses to run beside other workers.
WORKERS ?= 2
test: $(READY)
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(call quoted,$(WORKERS)) --dist loadfile --no-loadscope-reorder \
		-p no:benchmark

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# Kernels also have to compile with the Tritons of other torch versions, and to be right on their interpreters. Each is
# installed into a folder of its own.
TRITONS ?= 3.6.0 3.9.0
NUMPY_FOR_3.6.0 := numpy==2.3.5# its interpreter needs numpy before 2.4
OTHER_TRITON = build/triton-$(1)
define TRY_TRITON
	[ -e $(OTHER_TRITON)/complete ] || { rm -rf $(OTHER_TRITON) && $(BIN)/python -m pip install --quiet --no-deps \
		--target $(OTHER_TRITON) $(call quoted,triton==$(1)) $(NUMPY_FOR_$(1)) && touch $(OTHER_TRITON)/complete; }
	rm -f $(OTHER_TRITON)/compiled.json
	PYTHONPATH=$(OTHER_TRITON) TRITON_CACHE_DIR=$(OTHER_TRITON)/cache $(BIN)/python -m benchmarks.compiled \
		--out $(OTHER_TRITON)/compiled.json
	PYTHONPATH=$(OTHER_TRITON) $(BIN)/python -m pytest -k triton --numprocesses $(call quoted,$(WORKERS)) -p no:benchmark \
		tests/ops/test_linear_logprob.py tests/ops/test_softmax_sums.py tests/ops/test_logits_logprob.py \
		tests/ops/test_token_divergence.py tests/ops/test_sequence_logprob.py tests/ops/test_cwdpo_loss.py \
		tests/ops/test_constrained_sft_loss.py tests/ops/test_token_stats.py

endef
tritons: $(READY)
	$(foreach version,$(TRITONS),$(call TRY_TRITON,$(version)))

# `make sanitize` and `make sanitize-threads` build a copy, so that the library of the source tree stays as it is. Only
# the C++ is instrumented, so leaks in Python are not reported. The functions that are compiled for several processors
# are compiled for this one only, because the loader selects among them before a sanitizer has started.
SANITIZED := build/sanitized
ADDRESS := address,undefined
preload = $$(g++ -print-file-name=lib$(1).so) $$(g++ -print-file-name=libstdc++.so)
define BUILD_SANITIZED
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r cwdpo_kernels csrc tests benchmarks tools setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	rm -f $(SANITIZED)/cwdpo_kernels/*.so
	cd $(SANITIZED) && CXXFLAGS="-O1 -g -march=native -fno-omit-frame-pointer -fsanitize=$(1) -fno-sanitize-recover=all" \
		LDFLAGS="-fsanitize=$(1)" "$(abspath $(BIN))/python" setup.py --quiet build_ext --inplace --force
	nm -D $(SANITIZED)/cwdpo_kernels/libcwdpo_cpu.so | grep -q $(2)  # without it the tests would prove nothing
endef

# Compiled graphs call the same library: tests/test_registration.py has them.
sanitize: $(READY)
	$(call BUILD_SANITIZED,$(ADDRESS),__asan_report)
	cd $(SANITIZED) && LD_PRELOAD="$(call preload,asan)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		"$(abspath $(BIN))/python" -m pytest tests/ops tests/test_library.py tests/test_registration.py \
		-k "csrc or (test_library and not compiler)"

# torch's parallel_for is replaced by one whose threads ThreadSanitizer sees. setarch turns off address randomization,
# which ThreadSanitizer's memory layout does not allow. Because the replacement splits even the loops that torch runs on
# one thread, the tests that count parallel regions are left out.
sanitize-threads: $(READY)
	$(call BUILD_SANITIZED,thread,__tsan_read)
	g++ -std=c++20 -O1 -g -fsanitize=thread -shared -fPIC -o $(SANITIZED)/parallel_for.so tools/threads/parallel_for.cpp
	cd $(SANITIZED) && LD_PRELOAD="$(call preload,tsan) $(abspath $(SANITIZED))/parallel_for.so" \
		TSAN_OPTIONS=ignore_noninstrumented_modules=1:allocator_may_return_null=1:halt_on_error=1:exitcode=66 \
		setarch -R "$(abspath $(BIN))/python" -m pytest tests/ops -k "csrc and not regions" -p no:xdist

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

typecheck: $(READY)
	$(BIN)/mypy

# Each PYTHON:TORCH is an environment that the wheel is installed into and tested in.
WHEEL_ENVS ?= 3.11:2.11.0 3.11:2.13.0 3.13:2.15.0
wheel: $(READY)
	$(BIN)/python tools/wheel.py $(foreach each,$(WHEEL_ENVS),$(call quoted,$(each)))

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Reads the docstrings without importing the packages, so neither torch nor a compiler is needed.
DOCS := build/docs
$(DOCS)/ready: pyproject.toml constraints.txt tools/set_up.py
	$(CHECK_PYTHON)
	@"$(PYTHON)" tools/set_up.py --venv $(DOCS) --docs
	@touch $@

docs: $(DOCS)/ready
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "docs: build/site/index.html"

bench: $(READY)
	$(BIN)/python -m benchmarks.run

gpu:
	$(CHECK_PYTHON)
	@"$(PYTHON)" -c 'import importlib.util as u, sys; missing = [m for m in ("torch", "pytest") if not u.find_spec(m)];\
 sys.exit("gpu: this Python has no %s, and make gpu installs nothing: install the package with its extras bench and\
 dev, or name another Python (make gpu PYTHON=...)" % " and no ".join(missing) if missing else 0)'
	"$(PYTHON)" -m benchmarks.gpu --out runs/gpu

rebuild:
	@rm -f $(VENV)/ready* cwdpo_kernels/*.so
	@$(MAKE) --no-print-directory $(READY)

# Other environments (.venv-2.15) use the same library, so their set-up has to run again.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
	rm -f cwdpo_kernels/*.so $(VENV)/ready* .venv*/ready*
	@if [ -e $(VENV)/made-by-make ]; then echo "rm -rf $(VENV)"; rm -rf $(VENV); \
	elif [ -e $(VENV) ]; then echo "clean: $(VENV) stays, because make did not create it"; fi
	@if [ -e runs ]; then echo "clean: runs stays, because it has your results"; fi
