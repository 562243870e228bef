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
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$out/gpu.txt"
timeout 240 python3 -m pytest tests/e2e/test_cuda.py -q -p no:cacheprovider 2>&1 \
  | tee "$out/gpu_tests.log" || status=1
timeout 150 python3 bench/offline.py bundled --device cuda --name offline_cuda \
  --output "$out/offline_cuda.json" 2>&1 | tee "$out/gpu_offline.log" || status=1
exit "$status"
