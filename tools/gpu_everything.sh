#!/usr/bin/env bash
# Everything that needs a GPU, in one command, on a machine with python3, torch (2.10 or newer), numpy and pytest:
# the GPU tests, and the calibration at the sizes of DeepSeek-V3, Mixtral 8x7B and Qwen3-30B-A3B. About 5 minutes.
# Writes into $OUT (default: out/gpu): machine.txt, tests.txt, calibrate.txt, grouped.txt, profile.json.
# A run that was killed goes on where it stopped when $OUT is kept. PROFILE_NAME names the profile (default: gpu).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
PYTHON=${PYTHON:-python3}
NAME=${PROFILE_NAME:-gpu}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"
status=0

{
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv
  "$PYTHON" -c 'import platform, torch; print("python", platform.python_version(), "torch", torch.__version__, torch.cuda.get_device_name())'
} > "$OUT/machine.txt" 2>&1 || { cat "$OUT/machine.txt"; echo "no GPU that torch can use"; exit 1; }
cat "$OUT/machine.txt"

echo "== tests"
"$PYTHON" -m pytest -p no:cacheprovider -m gpu -rs tests/test_reference_layer.py tests/test_calibrate.py 2>&1 | tee "$OUT/tests.txt" || status=1

echo "== calibration"
"$PYTHON" -m reference_model.calibrate --device cuda --name "$NAME" --out "$OUT/profile.json" \
  --model deepseek-v3 --model mixtral-8x7b --model qwen3-30b-a3b 2>&1 | tee "$OUT/calibrate.txt" || status=1

echo "== grouped products against the dense rate and the roofline of the same run; layers against their products"
[ -f "$OUT/profile.json" ] && "$PYTHON" tools/show_profile.py "$OUT/profile.json" 2>&1 | tee "$OUT/grouped.txt" || status=1
exit $status
