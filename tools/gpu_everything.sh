#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on a machine with python3 (3.10 or newer), torch (2.10 or newer), numpy
# and pytest; with transformers 5 its blocks are timed too. About 10 minutes on an H200, most of it the calibration at
# the sizes of DeepSeek-V3, Mixtral 8x7B and Qwen3-30B-A3B. Writes into $OUT (default: out/gpu):
#   machine.txt    what it ran on
#   tests.txt      the GPU tests: bits, no waits, memory after a forward against the formula (2 %), training on a GPU
#   memory.txt     peaks of a step, layer and transformers, for each way of recomputing: the allocator's against the
#                  formulas' (goal: 2 %)
#   layers.txt     layer forward against its grouped products (goal: 1.25x at 16k tokens, 1.6x at 4k) and transformers'
#                  eager and grouped_mm blocks (goal: 3x and 1.15x as long); layers.jsonl the same for programs
#   profile.json   the calibration profile with its raw points; calibrate.txt its held-out errors (goal: 5 %)
#   goals.txt      grouped products against the dense rate and the roofline of the same run (goal: 80 % from 512 tokens
#                  an expert on, 60 % below), and the held-out errors again
# Eight files at most. Afterwards, anywhere with the extras measured and parquet:
#   python tools/compare_profile.py OUT/profile.json --gpu h200     predictions against another's measurement
# Short parts come first. A run that was killed goes on where it stopped when $OUT is kept.
# PROFILE_NAME names the profile (default: gpu). DEVICE=cpu tries the script itself, at the sizes of cpu-small.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
PYTHON=${PYTHON:-python3}
NAME=${PROFILE_NAME:-gpu}
DEVICE=${DEVICE:-cuda}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"
status=0
if [ "$DEVICE" = cuda ]; then
  models=(--model mixtral-8x7b --model qwen3-30b-a3b --model deepseek-v3); tokens=(4096 16384); effort=(); sizes=()
else
  models=(--model cpu-small); tokens=(64 256); effort=(--quick); sizes=(--small)
fi

{
  "$PYTHON" -c 'import platform, torch; print("python", platform.python_version(), "torch", torch.__version__)'
  if [ "$DEVICE" = cuda ]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv &&
      "$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())'
  fi
} > "$OUT/machine.txt" 2>&1 || { cat "$OUT/machine.txt"; echo "no GPU that torch can use"; exit 1; }
cat "$OUT/machine.txt"

echo "== tests"
"$PYTHON" -m pytest -p no:cacheprovider -m gpu -rs tests/test_reference_layer.py tests/test_reference_on_gpu.py \
  tests/test_reference_training.py tests/test_calibrate.py tests/test_reference_expert_parallel.py 2>&1 | tee "$OUT/tests.txt" || status=1

echo "== peaks of memory against the formulas"
"$PYTHON" tools/check_memory.py --device "$DEVICE" "${sizes[@]}" 2>&1 | tee "$OUT/memory.txt" || status=1

echo "== layers against their products, and transformers' blocks"
rm -f "$OUT/layers.jsonl"
"$PYTHON" tools/time_layers.py --device "$DEVICE" "${models[@]}" --tokens "${tokens[@]}" --out "$OUT/layers.jsonl" \
  2>&1 | tee "$OUT/layers.txt" || status=1

echo "== calibration"
"$PYTHON" -m reference_model.calibrate --device "$DEVICE" --name "$NAME" --out "$OUT/profile.json" \
  "${models[@]}" "${effort[@]}" 2>&1 | tee "$OUT/calibrate.txt" || status=1

echo "== grouped products against the dense rate and the roofline of the same run"
[ -f "$OUT/profile.json" ] && "$PYTHON" tools/show_profile.py "$OUT/profile.json" 2>&1 | tee "$OUT/goals.txt" || status=1
exit $status
