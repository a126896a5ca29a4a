#!/bin/sh
# Makes the virtual environment that `make lab` and `make test` use, and installs this package
# into it with the versions of constraints.txt. Without an NVIDIA GPU it takes PyTorch's CPU build,
# which spares a laptop gigabytes of CUDA. Usage: sh scripts/setup.sh [.venv]
# PYTHON=python3.12 chooses the interpreter; otherwise the first suitable one is taken.
set -eu

venv=${1:-.venv}
cpu_index=https://download.pytorch.org/whl/cpu
candidates=${PYTHON:-python3 python3.13 python3.12 python3.11}

say() { printf '%s\n' "$*" >&2; }

supported() { # is Python 3.11 to 3.13
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() { # prints the first supported interpreter that can make a virtual environment
    without_venv=
    for python in $candidates; do
        supported "$python" || continue
        if "$python" -c 'import venv, ensurepip' 2>/dev/null; then
            echo "$python"
            return
        fi
        without_venv=${without_venv:-$python}
    done
    if [ -n "$without_venv" ]; then
        say "$without_venv has no venv module, which holds the course's packages apart from the system's."
        say "Install it, then run the same command again:"
        say "    sudo apt install $(basename "$without_venv")-venv"
    else
        found=$(python3 --version 2>/dev/null || echo "no python3")
        say "This course needs Python 3.11, 3.12 or 3.13; tried $candidates, found $found."
        say "Install one, then run the same command again:"
        say "    sudo apt install python3 python3-venv"
        say "or, where the system's own Python has another version: https://docs.astral.sh/uv, then"
        say "    uv python install 3.12 && make PYTHON=\$(uv python find 3.12) lab"
    fi
    return 1
}

has_nvidia_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU
}

reachable() { # answers within five seconds
    "$venv/bin/python" - "$1" 2>/dev/null <<'PYTHON'
import sys
import urllib.request

urllib.request.urlopen(sys.argv[1], timeout=5)
PYTHON
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# An environment that does not run, or was made in another folder, is made afresh.
if ! supported "$venv/bin/python" || ! grep -qsF "$(pwd -P)/$venv" "$venv/pyvenv.cfg"; then
    python=$(find_python)
    say "Making $venv with $("$python" --version)."
    "$python" -m venv --clear "$venv"
fi

say "Installing the packages of pyproject.toml at the versions of constraints.txt."
say "The first time this takes some minutes."
if [ "$(uname)" = Linux ] && ! has_nvidia_gpu; then
    torch=$(grep '^torch==' constraints.txt)
    if reachable "$cpu_index/torch/"; then
        say "No NVIDIA GPU here: PyTorch's CPU build."
        # --no-deps: what torch itself needs comes with the rest, from the usual index.
        pip install --no-deps --index-url "$cpu_index" "$torch" ||
            say "That did not work; going on with the usual package index."
    else
        say "No NVIDIA GPU here, and $cpu_index does not answer:"
        say "taking $torch from the usual package index, which may bring the large CUDA build."
    fi
fi
pip install --quiet -c constraints.txt -e '.[dev]'
