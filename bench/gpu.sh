#!/usr/bin/env bash
# Everything that needs a GPU, in the order of its worth, in 12 minutes at most. Each result is written as it
# comes, so a run that is cut off keeps what it has; a stage that fails or takes too long is named, and the
# next one begins. The card's settings are left as they are.
#
#   bash bench/gpu.sh                 on a machine with a GPU, nvcc and a CUDA torch
#   bash bench/gpu.sh --device cpu    the same stages without one, on the smallest sizes, without the build
#
# Needs no network: it builds for PYTHON's own torch, without isolation and without dependencies (pytest,
# hypothesis, torchvision, setuptools, pybind11 and ninja have to be there, for `quality` scipy and pyyaml
# too; pytest-xdist and pytest-timeout help).
#
#   PYTHON    python3       the interpreter whose torch is used
#   OUT       bench/results; on the CPU build/gpu/results
#             results.jsonl   each result, a line of JSON
#             gpu.log         what every stage printed
#             tables.md       results.jsonl as tables, after each stage (bench/table.py)
#             ncu.csv         ncu's report as it came
#   STAGES    all           some of the names below, in quotes
#   CIFAR10                 an archive of train/CLASS/*.jpg and test/CLASS/*.jpg; without it, scikit-learn's
#                           digits are trained on
#   ARCHS     90            the compute capability to compile for
#   LIMIT     720           seconds for all
#
# Stages, with the seconds that each takes on an H200; * estimated:
#   build 40*       compiles the extension
#   machine 9       versions; copy, read, and read-modify-write of a gigabyte: the roof
#   smoke 6         every op once, launches one by one; if it fails, under memcheck
#   tests 45        the tests of the ops, and what only a GPU can show
#   times 106       every op, the check, and optimizers' steps on four models, beside roof and peers
#   launches 22     launches and waits of each op, of a step, of a check
#   steps 30        whole training steps, launched one by one and from a graph
#   training 150*   unpacks the images; ResNet56 dense and in one cycle, through the cut; takes what is left
#   throughput 51   ResNet50 at 224 pixels, dense and cut, in a graph and eager
#   latency 110*    ResNet50's latency, predicted and measured, cut for it
#   rounding 30*    ResNet50 cut to the same MACs with several multiples of kept counts, in bfloat16
#   library 40      tests of what goes around the ops
#   ncu 14          eight ops under ncu, a launch each
#   memcheck 7, racecheck 9, initcheck 10*   the smoke under compute-sanitizer
#
# And one that has to be named, as it takes all that is left: accuracy, run by run, until the time is over. Of
# LIMIT 240, 480 or 720 seconds, some 5, 15 or 25 runs come to their end*; the next call goes on where this
# one ended, from the file of results that it left, as bench/quality/results/PLAN.jsonl.
#   STAGES="build quality" LIMIT=480 CIFAR10=... bash bench/gpu.sh
#   quality         the PLANS of bench/quality/plans, into OUT/quality-PLAN.jsonl
#
#   PLANS         cifar gpu   in this order
#   RUNS_AT_ONCE  5           runs on the card at once, which share it: their times are no measure
#   RUN_SECONDS   140         none is begun with less than this left; a run of cifar takes 70 to 130
cd "$(dirname "$0")/.." || exit
DEVICE=cuda
[ "${1:-}" = --device ] && DEVICE=$2
PYTHON=${PYTHON:-python3} LIMIT=${LIMIT:-720} CIFAR10=${CIFAR10:-}
PLANS=${PLANS:-cifar gpu} RUNS_AT_ONCE=${RUNS_AT_ONCE:-5} RUN_SECONDS=${RUN_SECONDS:-140}
ALL="machine smoke tests times launches steps training throughput latency rounding library ncu memcheck racecheck initcheck"
export OCSFAST_CUDA_ARCHS=${ARCHS:-90} PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
OPS=(group_saliency shrink lasso_grad sgd_step adamw_step partition compare walk)
if [ "$DEVICE" = cuda ]; then
  OUT=${OUT:-bench/results} STAGES=${STAGES:-build $ALL} WORKERS=8 QUICK=() SLACK=1
  MODELS=("Llama 1.1B" "Llama 1.1B:bfloat16" ResNet50 ViT-B/16) ROUNDS=(--rounds 21)
  export OCSFAST_CUDA=1 MAX_JOBS=16
else
  OUT=${OUT:-build/gpu/results} STAGES=${STAGES:-$ALL} WORKERS=1 QUICK=(--quick) SLACK=3
  MODELS=("Llama tiny:bfloat16") ROUNDS=(--rounds 1 --threads 1) OPS=(compare) CIFAR10= PLANS=small
fi
mkdir -p "$OUT" build/gpu || exit
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/gpu.log ROWS=$OUT/results.jsonl IMAGES=build/gpu/images.pt
: > "$LOG"
: > "$ROWS"
FAILED=()

wants() { [[ " $STAGES " == *" $1 "* ]]; }

has() { "$PYTHON" -c "import $1" 2> /dev/null; }

# note STAGE SECONDS END SAID: a row about a stage.
note() {
  local said
  said=$(printf %s "$4" | tr -cd '[:print:]' | tr -d '"\\' | cut -c -120)
  printf '{"kind": "stage", "stage": "%s", "seconds": %d, "end": "%s", "said": "%s"}\n' \
    "$1" "$2" "$3" "$said" >> "$ROWS"
  echo "== $1: $3, $2 s${said:+ ($said)}" | tee -a "$LOG"
  "$PYTHON" bench/table.py "$ROWS" > "$OUT/tables.md" 2>> "$LOG"
}

# stage NAME SECONDS COMMAND...: run it for so long, or for what is left; its status says how it ended.
stage() {
  local name=$1 seconds=$(($2 * SLACK)) begun=$SECONDS from code end said error
  shift 2
  wants "${name%% *}" || return 0
  [ "$seconds" -gt $((LIMIT - begun - 5)) ] && seconds=$((LIMIT - begun - 5))
  if [ "$seconds" -lt 5 ]; then
    note "$name" 0 "skipped: no time left" ""
    return 0
  fi
  echo "== $name" >> "$LOG"
  from=$(wc -l < "$LOG")
  timeout -k 5 "$seconds" "$@" >> "$LOG" 2>&1
  code=$?
  case $code in
    0) end=ok ;;
    124 | 137) end="FAILED: cut off after $seconds s" ;;
    *) end="FAILED: exit $code" ;;
  esac
  said=$(tail -n +$((from + 1)) "$LOG" | grep -v '^ *$')
  # Where torch finds no GPU all tests of it are skipped, which pytest calls a success.
  [[ $code = 0 && " $* " == *" pytest "* ]] && ! grep -q ' passed' <<< "$said" &&
    code=1 end="FAILED: no test ran"
  if [ $code = 0 ]; then
    said=$(grep -E ' (passed|ops on|images after)' <<< "$said" | tail -n 1)
  else
    FAILED+=("$name")
    tail -n 15 <<< "$said"
    error=$(grep -E '^[[:alnum:]_.]+(Error|Exception)(:|$)| (failed|errors?)[, ].* in ' <<< "$said" | tail -n 1)
    said=${error:-$(tail -n 1 <<< "$said")}
  fi
  note "$name" $((SECONDS - begun)) "$end" "$said"
  return $code
}

bench() { # NAME SECONDS FILE ARGUMENTS...
  local name=$1 seconds=$2 file=$3
  shift 3
  stage "$name" "$seconds" "$PYTHON" "bench/$file" --device "$DEVICE" --rows "$ROWS" "${QUICK[@]}" "$@"
}

# tests NAME SECONDS FILES...
tests() {
  local name=$1 seconds=$2 more=()
  shift 2
  wants "$name" || return 0
  has xdist && more+=(-n "$WORKERS")
  has pytest_timeout && more+=(--timeout 60)
  stage "$name" "$seconds" "$PYTHON" -m pytest "$@" -p no:cacheprovider --disable-warnings "${more[@]}"
}

# sanitized NAME TOOL: the smoke under compute-sanitizer, which looks at our kernels alone. torch's caching
# allocator would hide where one tensor ends and the next begins.
sanitized() {
  wants "${1%% *}" || return 0
  if [ "$DEVICE" != cuda ]; then
    note "$1" 0 "skipped: no GPU" ""
    return 0
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$1" 45 compute-sanitizer --tool "$2" --kernel-name kns=ocsfast \
    --report-api-errors no --print-limit 20 --error-exitcode 9 "$PYTHON" tests/smoke.py --device cuda
}

ncu_kernels() {
  wants ncu || return 0
  if [ "$DEVICE" != cuda ]; then
    bench ncu 30 kernels.py && note "ncu report" 0 "skipped: no GPU" ""
    return 0
  fi
  rm -f "$OUT/ncu.csv"
  stage ncu 60 ncu --clock-control none --profile-from-start off --csv --print-units base --launch-count 8 \
    --kernel-name-base demangled --kernel-name "regex:saliency_kernel|shrink_kernel|step_kernel" \
    --metrics "$("$PYTHON" bench/kernels.py --metrics)" \
    --log-file "$OUT/ncu.csv" "$PYTHON" bench/kernels.py --device cuda
  bench "ncu report" 20 kernels.py --read "$OUT/ncu.csv"
}

{
  date -u +%FT%TZ
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv,noheader 2> /dev/null ||
    echo "no GPU"
  git rev-parse HEAD 2> /dev/null
} | tee -a "$LOG"

stage build 120 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --editable .
bench machine 30 machine.py
CUDA_LAUNCH_BLOCKING=1 stage smoke 40 "$PYTHON" tests/smoke.py --device "$DEVICE" ||
  STAGES="$STAGES smoke-memcheck" sanitized smoke-memcheck memcheck
FILES=()
OP_TESTS=("${OPS[@]/%/.py}") && OP_TESTS=("${OP_TESTS[@]/#/tests/ops/test_}")
for file in tests/ops/test_cuda*.py; do
  [ "$file" = tests/ops/test_cuda_library.py ] || FILES+=("$file")
done
tests tests 70 "${OP_TESTS[@]}" "${FILES[@]}" -k "$DEVICE"
TIMES=(-o python_files='bench_*.py' -o python_functions='bench_*' -p no:cacheprovider -p no:benchmark)
TIMES+=(--disable-warnings)
# A process for each model: pytest would go from one to the next and back, and make each anew every time.
for model in "${MODELS[@]}"; do
  # Compiling takes minutes; the eager peer is not in doubt, and copies and grouping are the CPU's.
  stage "times $model" 45 "$PYTHON" -m pytest bench/bench_{step,ops,check}.py "${TIMES[@]}" \
    -k "not compile and not eager and not copies and not grouping and not Torch-Pruning" \
    --device "$DEVICE" --models "$model" --rows "$ROWS" "${ROUNDS[@]}"
done
bench launches 40 launches.py
bench steps 45 end_to_end.py
if { wants training || wants quality; } && [ -n "$CIFAR10" ]; then
  STAGES="$STAGES images" stage images 60 "$PYTHON" bench/images.py "$CIFAR10" "$IMAGES"
fi
# Of what is left, five minutes are for the stages after it; but two and a half minutes are the least to learn
# anything from.
left=$((LIMIT - SECONDS - 290))
[ "$left" -lt 150 ] && left=150
[ "$left" -gt $((LIMIT - SECONDS - 10)) ] && left=$((LIMIT - SECONDS - 10))
bench training $((left + 5)) training.py --images "$IMAGES" --seconds $((left - 10))
if wants quality && [ "$DEVICE" = cuda ] && [ ! -f "$IMAGES" ]; then
  note quality 0 "skipped: CIFAR10 names no archive" ""
elif wants quality; then
  for plan in $PLANS; do
    FOUND=$OUT/quality-$plan.jsonl RUNS=(--minutes 0.2)
    if [ "$DEVICE" = cuda ]; then
      # No run is begun that would not end.
      left=$((LIMIT - SECONDS - RUN_SECONDS))
      [ "$left" -lt 10 ] && note "quality $plan" 0 "skipped: no time left" "" && continue
      RUNS=(--minutes "$((left / 6))e-1" --images "$IMAGES" --workers "$RUNS_AT_ONCE" --device cuda)
      [ -f "$FOUND" ] || cp "bench/quality/results/$plan.jsonl" "$FOUND" 2> /dev/null
    fi
    stage "quality $plan" "$LIMIT" "$PYTHON" bench/quality/run.py "bench/quality/plans/$plan.yaml" \
      "${RUNS[@]}" --out "$FOUND"
    "$PYTHON" bench/quality/page.py --results "$FOUND" | tee "$OUT/quality-$plan.md"
  done
fi
bench throughput 90 throughput.py
# Of smaller batches the host would be what takes its time.
bench latency 180 latency.py --models ResNet50 --batch 2048 --rounds 3 --grid 4
bench rounding 60 rounding.py --models ResNet50 --batch 128 --channels-last --dtype bfloat16
tests library 80 tests/ops/test_cuda_library.py "tests/project/test_docs.py::test_every_page_runs[cuda-graphs]"
ncu_kernels
for tool in memcheck racecheck initcheck; do
  sanitized $tool $tool
done

"$PYTHON" bench/table.py "$ROWS" > "$OUT/tables.md" || FAILED+=(tables)
if [ ${#FAILED[@]} -gt 0 ]; then
  echo "FAILED: ${FAILED[*]}" | tee -a "$LOG"
  exit 1
fi
echo "all stages ok, $SECONDS s" | tee -a "$LOG"
