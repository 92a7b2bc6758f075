# `make demo` and `make test` do everything on a bare machine: python3 >= 3.10 and a C++ compiler are all they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(shell find csrc cmake src -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml

.PHONY: demo test bench lint format emulated interpreted sanitized clean

demo: $(VENV)/installed
	$(BIN)/shear-ops demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

# Measures for about a quarter of an hour; leave the machine alone meanwhile.
bench: $(VENV)/installed
	$(BIN)/python -m bench.run
	$(BIN)/python -m bench.report

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# torch first and pinned: the build looks for it in the environment, and a plain `torch` may be a multi-gigabyte CUDA build
$(VENV)/dependencies: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

$(VENV)/installed: $(VENV)/dependencies $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	touch $@

# Tests the AVX-512, VNNI and AMX kernels on a machine without them: 16-wide code in AVX2, their own instructions in plain C++.
emulated: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --upgrade --target build/emulated \
	  --config-settings=build-dir=build/emulated-cmake --config-settings=cmake.define.SHEAR_EMULATED=ON --config-settings=cmake.define.SHEAR_CUDA=OFF .
	PYTHONPATH=build/emulated SHEAR_ISA=avx512 $(BIN)/python -m pytest -q tests/test_backends.py
	PYTHONPATH=build/emulated $(BIN)/python -m pytest -q tests/test_rounding.py

# Runs the Triton kernels on a machine without a GPU, in Triton's interpreter.
interpreted: $(VENV)/installed
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/test_triton.py tests/test_backends.py -k triton

# The problem table under AddressSanitizer and UndefinedBehaviorSanitizer: a kernel that reads or writes beyond its memory.
sanitized: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --upgrade --target build/sanitized \
	  --config-settings=build-dir=build/sanitized-cmake --config-settings=cmake.define.SHEAR_CUDA=OFF \
	  "--config-settings=cmake.define.CMAKE_CXX_FLAGS=-fsanitize=address,undefined -fno-sanitize-recover=all" .
	PYTHONPATH=build/sanitized LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
	  $(BIN)/python -m pytest -q -s tests/test_backends.py -k against_float64

# Another torch, built against and tested on: make torch-2.10.0, the oldest. A CUDA build of about 3 GB, so not part of `make test`.
torch-%: requirements-dev.txt
	$(PYTHON) -m venv build/torch/$*
	grep -E '^(numpy|scikit|pybind11|cmake|ninja|click|rich|safetensors|matplotlib|POT|scipy|pytest=|hypothesis)' requirements-dev.txt > build/torch/$*.txt
	build/torch/$*/bin/python -m pip install --quiet torch==$* --requirement build/torch/$*.txt
	SHEAR_CUDA=OFF build/torch/$*/bin/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	build/torch/$*/bin/python -m pytest -q -p no:cacheprovider --disable-warnings $(addprefix tests/test_,$(addsuffix .py,\
	  backends torch_op api sinkhorn plan package distributed))

# A trainer in an environment of its own, since its requirements exclude those of the tests (1 to 2 GB): make trainer-verl. It is one of
# tests/trainers/environments/*.txt; those of *.no-deps.txt come without their dependencies, which want a GPU. Writes tests/trainers/records.
trainer-%: $(VENV)/installed
	$(PYTHON) -m venv build/trainers/$*
	build/trainers/$*/bin/python -m pip install --quiet --requirement tests/trainers/environments/$*.txt
	test ! -f tests/trainers/environments/$*.no-deps.txt || \
	  build/trainers/$*/bin/python -m pip install --quiet --no-deps --requirement tests/trainers/environments/$*.no-deps.txt
	SHEAR_CUDA=OFF $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/trainers .
	build/trainers/$*/bin/python -m pip install --quiet --no-deps --force-reinstall build/trainers/shear_ops-*.whl
	{ date -u +%F; build/trainers/$*/bin/python -m pip list --format=freeze; \
	  build/trainers/$*/bin/python -m pytest -v --no-header --disable-warnings -p no:cacheprovider tests/trainers/test_$(firstword $(subst -, ,$*))*.py; } \
	  > build/trainers/$*.txt || { tail -n 80 build/trainers/$*.txt; exit 1; }
	mkdir -p tests/trainers/records && cp build/trainers/$*.txt tests/trainers/records/

clean:
	rm -rf $(VENV) build dist
