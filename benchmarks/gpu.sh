#!/usr/bin/env bash
# Check and time the Triton kernels and whole training steps on a CUDA card: one call, under nine minutes.
# Needs python3 with torch, triton and numpy. Results go to $OUT, or to benchmarks/results.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
