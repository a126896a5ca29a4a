#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: test the compiled kernels, then measure and record.
# Needs the core dependencies, transformers, pytest and hypothesis. Takes about 15 minutes.
# PYTHON names another interpreter than the environment's own.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONPATH=. PYTHONUNBUFFERED=1
"$PYTHON" -m pytest -q -m gpu tests/kernels tests/model tests/engine
"$PYTHON" benchmarks/kernels.py --record
"$PYTHON" benchmarks/cold_start.py --starts 0 --record
for shape in qwen3-0.6b llama-3-8b; do
    "$PYTHON" benchmarks/engine.py --device cuda --shape "$shape" --record
    "$PYTHON" benchmarks/steps.py --device cuda --shape "$shape" --record
done
