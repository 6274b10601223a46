#!/usr/bin/env bash
# Everything that needs a GPU, in the order of its worth: build, one call of each op, the kernels' tests,
# timings, sanitizers, timings of more models. Results are written as they come, so a run that is cut off
# keeps what it has; a step that fails or takes too long is named, and the next one begins.
#
#   bash bench/gpu.sh               on a machine with a GPU, nvcc and a CUDA torch (not timed yet)
#   DEVICE=cpu bash bench/gpu.sh    the same steps without one, shortened: 2 minutes and a half on two cores
#
# Needs no network: it builds for PYTHON's own torch, without isolation and without dependencies (pytest,
# pytest-xdist, pytest-benchmark, hypothesis, torchvision, setuptools and pybind11 have to be there).
#
#   PYTHON   python3                         the interpreter whose torch is used
#   OUT      bench/results; on the CPU build/gpu/results
#            gpu.log      each step's seconds and end, and what the tests and sanitizers said
#            rows.jsonl   each timing as it comes; gpu.json, gpu.md: the same as a file and as tables
#            end_to_end.md    whole training steps
#   ARCHS    90                              the compute capability to compile for
#   STEPS    all                             some of: build smoke tests ops step check end_to_end sanitize
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
STEPS=${STEPS:-build smoke tests ops step check end_to_end sanitize}
export OCSFAST_CUDA_ARCHS=${ARCHS:-90} PYTHONUNBUFFERED=1
if [ "$DEVICE" = cuda ]; then
  OUT=${OUT:-bench/results} WORKERS=8
  FIRST=(ResNet50 ViT-B/16) MORE=(ResNet56 "Llama 1.1B") SIZE=(--device cuda --rounds 51)
  END_TO_END=(--device cuda)
  export OCSFAST_CUDA=1
else
  OUT=${OUT:-build/gpu/results} WORKERS=2
  FIRST=(ResNet56) MORE=() SIZE=(--device cpu --threads 1 --rounds 1)
  END_TO_END=(--device cpu --threads 1 --batch 4 --rounds 1)
fi
mkdir -p "$OUT" || exit
LOG=$OUT/gpu.log
: > "$LOG"
rm -f "$OUT/rows.jsonl"
FAILED=()

# step NAME SECONDS COMMAND...: run it, keep what it says, never stop the rest.
step() {
  local name=$1 seconds=$2 begun=$SECONDS code
  shift 2
  echo "== $name" >> "$LOG"
  timeout -k 10 "$seconds" "$@" >> "$LOG" 2>&1
  code=$?
  case $code in
    0) code=ok ;;
    124 | 137) code="FAILED: cut off after $seconds s" ;;
    *) code="FAILED: exit $code" ;;
  esac
  [ "$code" = ok ] || { FAILED+=("$name"); tail -n 15 "$LOG"; }
  echo "== $name: $code, $((SECONDS - begun)) s" | tee -a "$LOG"
}

# bench NAME SECONDS FILE MODEL [MORE...]: times some rows, and puts all that there are so far into tables.
bench() {
  local name=$1 seconds=$2 file=$3 model=$4
  shift 4
  step "$name" "$seconds" "$PYTHON" -m pytest "bench/$file" -q -p no:cacheprovider \
    -o python_files='bench_*.py' -o python_functions='bench_*' --benchmark-quiet "${SIZE[@]}" \
    --models "$model" --rows "$OUT/rows.jsonl" "$@"
  local tables
  tables=$("$PYTHON" bench/table.py "$OUT/rows.jsonl" --merged "$OUT/gpu.json" 2>> "$LOG") &&
    echo "$tables" > "$OUT/gpu.md"
}

# measure MODEL...: what the kernels and an optimizer's step take.
measure() {
  local model
  for model in "$@"; do
    # Compiling takes minutes, and neither peer is in doubt.
    wants ops && bench "ops $model" 100 bench_ops.py "$model" -k "not compile and not eager"
    wants step && bench "step $model" 60 bench_step.py "$model"
    wants check && bench "check $model" 45 bench_check.py "$model" -k "not copies"
  done
}

wants() { [[ " $STEPS " == *" $1 "* ]]; }

{
  date -u +%FT%TZ
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv,noheader 2> /dev/null ||
    echo "no GPU"
  "$PYTHON" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
  git rev-parse HEAD 2> /dev/null
} | tee -a "$LOG"

wants build && step build 240 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --editable .
wants smoke && step smoke 60 "$PYTHON" tests/smoke.py --device "$DEVICE"
OPS=(tests/test_{group_saliency,shrink,lasso_grad,sgd_step,adamw_step,partition,jaccard,cuda}.py)
wants tests && step tests 150 env OMP_NUM_THREADS=1 "$PYTHON" -m pytest "${OPS[@]}" -n "$WORKERS" -q \
  -k "$DEVICE" -p no:cacheprovider
measure "${FIRST[@]}"
wants end_to_end && step end_to_end 90 bash -o pipefail -c '"$@" | tee "$0"' "$OUT/end_to_end.md" \
  "$PYTHON" bench/end_to_end.py "${END_TO_END[@]}"
# torch's caching allocator hides where one tensor ends and the next begins.
for tool in memcheck racecheck initcheck synccheck; do
  wants sanitize || break
  checked=(compute-sanitizer --tool "$tool" --error-exitcode 9)
  [ "$DEVICE" = cuda ] || checked=() # on the CPU only to see that the step runs
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 60 "${checked[@]}" "$PYTHON" tests/smoke.py --device "$DEVICE"
done
measure "${MORE[@]}"

if [ ${#FAILED[@]} -gt 0 ]; then
  echo "FAILED: ${FAILED[*]}" | tee -a "$LOG"
  exit 1
fi
echo "all steps ok, $SECONDS s" | tee -a "$LOG"
