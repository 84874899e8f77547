# Every target sets up .venv from nothing: pinned packages, native build, editable install.
#   make demo    a real photo through a model, pictures in demo/
#   make test    the test suite
#   make check   ruff, ruff-format, clang-format, mypy
#   make bench   the benchmarks of the README
#   make wheel   one abi3 wheel and the sdist in dist/, with the CUDA kernels where nvcc is

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h')
CXX_FILES := $(shell find csrc tests/emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
WITH_CUDA := $(if $(shell command -v nvcc),1,auto)

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check bench wheel clean

demo: $(READY)
	$(BIN)/python -m xattn_ops demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

bench: $(READY)
	$(BIN)/python -m xattn_ops bench --blocks --models $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy xattn_ops models benchmarks

wheel: $(READY)
	XATTN_BUILD_NATIVE=1 XATTN_BUILD_CUDA=$(WITH_CUDA) $(BIN)/python -m build --no-isolation --outdir dist .

# Tools first, for the build runs without isolation: it must see the torch that will load it.
$(VENV)/.tools: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet setuptools wheel ninja torch numpy
	touch $@

# timm without what it depends on: its torchvision would have to match torch's build. The tests stand
# stubs in for it (tests/support/stubs).
$(READY): $(VENV)/.tools setup.py $(NATIVE)
	XATTN_BUILD_NATIVE=1 $(BIN)/python -m pip install --quiet --no-build-isolation -e '.[test,dev]'
	$(BIN)/python -m pip install --quiet --no-deps timm
	touch $@

clean:
	rm -rf build dist *.egg-info xattn_ops/*.so $(READY)
