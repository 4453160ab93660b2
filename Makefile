# make demo    a real contrastive training run on real images, then fastcl against plain PyTorch
# make test    the tests
# make bench   the benchmarks, as a table and a picture under bench/results/
# make lint    formatting, lint and types
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo test bench lint format clean

demo: $(VENV)/.installed
	$(BIN)/fastcl train simclr --data digits --out runs/digits
	$(BIN)/python -m bench.demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto tests

bench: $(VENV)/.installed
	$(BIN)/python -m bench.run

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(NATIVE)

clean:
	rm -rf $(VENV) build *.egg-info fastcl/*.so

# torch goes first: the build links against it; and stays, or torchvision would bring another
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" ninja numpy
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	FASTCL_BUILD=cpu $(BIN)/pip install --quiet --no-build-isolation '$(TORCH)' -e '.[train,bench,test,lint]'
	touch $@
