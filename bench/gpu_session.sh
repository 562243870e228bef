#!/usr/bin/env bash
# Everything this project can do on a machine with a GPU, in one call of at most ten minutes:
# the tests that need one, then the benches. Results go to $OUT (default: bench/results).
#
#   bash bench/gpu_session.sh
#
# Needs torch with CUDA, transformers and the packages of pyproject.toml; no network. fxlm is
# made importable from the checkout through links, as nothing can be installed there.
set -u
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
mkdir -p "$out" build/typing/fxlm
for path in compiler passes models runtime server fxlm/__init__.py fxlm/__main__.py; do
  ln -sfn "../../../$path" "build/typing/fxlm/$(basename "$path")"
done
export PYTHONPATH="$PWD/build/typing${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
status=0
# Runs a step for at most so many seconds (all of them: under ten minutes); keeps what it prints.
step() {
  local seconds=$1 name=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" 2>&1 | tee "$out/gpu_$name.log"
  [ "${PIPESTATUS[0]}" -eq 0 ] || { status=1; echo "== $name failed"; }
}
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$out/gpu.txt"
step 200 tests python3 -m pytest tests/e2e/test_cuda.py -q -p no:cacheprovider
step 90 offline python3 bench/offline.py bundled --device cuda --output "$out/offline_cuda.json"
model=$(mktemp -d)
step 40 checkpoint python3 bench/make_checkpoint.py llama-1b "$model"
step 120 offline_1b python3 bench/offline.py "$model" --device cuda --batch 1 8 32 \
  --prompt-decode 128 --tokens 16 --repeats 2 --output "$out/offline_llama_1b_cuda.json"
step 120 offline_1b_int8 python3 bench/offline.py "$model" --device cuda --quantization int8 \
  --batch 1 8 --prompt-decode 128 --tokens 16 --repeats 2 \
  --output "$out/offline_llama_1b_int8_cuda.json"
rm -rf "$model"
exit "$status"
