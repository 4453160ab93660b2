#!/usr/bin/env bash
# Builds, tests and measures fastcl on this machine's GPU: bench/gpu.sh [FOLDER]
#
# Works from a bare checkout with what is installed (torch, triton, pytest, pytest-benchmark, hypothesis);
# nothing is downloaded. FOLDER (default: $OUT, else runs/gpu) receives gpu.json and the logs. The last
# lines say what passed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-runs/gpu}}
mkdir -p "$out"
summary=()

# step NAME COMMAND...: run it, keep its output, remember how it ended
step() {
  local name=$1 start=$SECONDS
  shift
  echo "== $name: $*"
  if timeout 420 "$@" >"$out/$name.log" 2>&1; then verdict=passed; else verdict="FAILED ($?)"; fi
  tail -n 4 "$out/$name.log"
  summary+=("$name: $verdict, $((SECONDS - start)) s")
}

python3 -m venv --system-site-packages build/gpu
python=build/gpu/bin/python
step build env FASTCL_BUILD=auto "$python" -m pip install --quiet --no-deps --no-index --no-build-isolation -e .
step config "$python" -m fastcl.cli info
export FASTCL_TEST_DEVICE=cuda
step tests "$python" -m pytest -n 8 tests/losses tests/memory tests/similarity/test_stats.py \
  tests/similarity/test_topk.py tests/ops/test_ops.py tests/backends/test_triton.py tests/backends/test_cuda.py
step memcheck compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m pytest -p no:cacheprovider \
  tests/losses/test_losses.py -k "triton and test_shapes and 64 and not 252"
unset FASTCL_TEST_DEVICE
step bench "$python" -m bench.run -k cuda --out "$out/gpu.json"

printf '%s\n' "${summary[@]}"
[[ "${summary[*]}" != *FAILED* ]]
