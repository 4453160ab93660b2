#!/usr/bin/env bash
# Builds, tests and measures fastcl on this machine's GPU within nine minutes: bench/gpu.sh [FOLDER]
#
# Works from a bare checkout with what is installed (torch, triton, pytest, hypothesis, matplotlib); nothing is
# downloaded. FOLDER (default: $OUT, else runs/gpu) receives gpu.json, gpu.md, gpu.png and steps.log. Wheels of other
# libraries in .whl/ (memeff, inf-cl, siglip-kernel, cut-cross-entropy) are measured too. A step that fails or
# runs out of its time stops no other; the last lines say what passed. DEVICE=cpu rehearses it without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-runs/gpu}}
device=${DEVICE:-cuda}
mkdir -p "$out"
log=$out/steps.log
: >"$log"
summary=()

# step SECONDS NAME COMMAND...: run it, keep its output, remember how it ended
step() {
  local limit=$1 name=$2 start=$SECONDS
  shift 2
  echo "== $name: $*" | tee -a "$log"
  if timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1; then verdict=passed; else verdict="FAILED ($?)"; fi
  tail -n 4 "$log"
  summary+=("$name: $verdict, $((SECONDS - start)) of $limit s")
}

# python3 may be of a virtual environment itself, whose packages a new one would not see
packages='import sys
for path in sys.path:
    if path.endswith("-packages"):
        print(f"import site; site.addsitedir({path!r})")'
python3 -m venv --clear --without-pip build/gpu
python=$PWD/build/gpu/bin/python
python3 -c "$packages" >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/of_python3.pth"
workers=()
if "$python" -c "import xdist" 2>/dev/null; then workers=(-n 8); fi
step 150 build env FASTCL_BUILD=auto "$python" -m pip install --quiet --no-deps --no-index --no-build-isolation -e .
step 15 config "$python" -c "import fastcl; fastcl.show_config()"
if compgen -G ".whl/*.whl" >/dev/null; then step 15 rivals "$python" -m pip install --quiet --no-deps --no-index .whl/*.whl; fi
FASTCL_TEST_DEVICE=$device step 170 tests "$python" -m pytest "${workers[@]}" --continue-on-collection-errors \
  tests/losses tests/memory tests/similarity/test_stats.py tests/similarity/test_topk.py tests/ops/test_ops.py \
  tests/backends/test_triton.py tests/backends/test_cuda.py
step 160 bench "$python" -m bench.gpu "$out" --device "$device" --seconds 120
FASTCL_TEST_DEVICE=$device step 45 memcheck compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m pytest \
  -p no:cacheprovider tests/losses/test_losses.py -k "triton and negative_temperature and (nt_xent or clip_loss)"

printf '%s\n' "${summary[@]}"
[[ "${summary[*]}" != *FAILED* ]]
