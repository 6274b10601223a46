#!/usr/bin/env bash
# All that needs a GPU, in one go: `make bench-gpu`. Builds for the machine's own Python, whose torch has
# CUDA, and leaves its results in $OUT (bench/results by default).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
SANITIZED=(tests/test_group_saliency.py tests/test_shrink.py tests/test_lasso_grad.py tests/test_sgd_step.py tests/test_adamw_step.py
  tests/test_partition.py tests/test_jaccard.py)
mkdir -p "$OUT"

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv,noheader
OCSFAST_CUDA=1 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --editable .
"$PYTHON" -m pytest tests -k "cuda" || echo "FAILED: tests on the GPU"
for tool in memcheck racecheck initcheck; do
  compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$PYTHON" -m pytest -q -x "${SANITIZED[@]}" -k "cuda and not opcheck" > "$OUT/sanitizer_$tool.log" 2>&1 \
    && echo "$tool: clean" || { echo "FAILED: $tool"; tail -5 "$OUT/sanitizer_$tool.log"; }
done
"$PYTHON" -m pytest bench -o python_files='bench_*.py' -o python_functions='bench_*' --benchmark-quiet \
  --device cuda --rounds 51 --benchmark-json="$OUT/gpu.json"
"$PYTHON" bench/table.py "$OUT/gpu.json" | tee "$OUT/gpu.md"
"$PYTHON" bench/end_to_end.py --device cuda | tee -a "$OUT/gpu.md"
