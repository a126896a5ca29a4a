"""What is there to run on: device, Triton mode, versions, models, and what to install for more.

`course doctor` prints it and the first notebook shows it. Nothing here needs more than Python, so
that it can still say what is missing when an installation is broken.
"""

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from course_lib.data import model_directories


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    ok: bool | None = True  # None: not there, and only needed for some things
    hint: str = ""  # what to do about it


#: Package -> what it is for, how to get it. The first group must be there.
_REQUIRED = ("torch", "numpy", "tokenizers", "safetensors", "jinja2", "tqdm", "typer", "rich")
_OPTIONAL = {
    "jupyterlab": ("the notebooks", "pip install -e '.[labs]'"),
    "matplotlib": ("plots", "pip install -e '.[labs]'"),
    "fastapi": ("the OpenAI server", "pip install -e '.[serve]'"),
    "ray": ("real replicas", "pip install -e '.[fleet]'"),
    "vllm": ("comparisons with vLLM, on a GPU machine", "see environment.yml"),
}


def examine() -> list[Finding]:
    """Look at this machine."""
    findings = [
        Finding("Python", f"{platform.python_version()} on {platform.system()}", _python_ok()),
        _device(),
        _triton(),
        _cpu_kernels(),
    ]
    for package in _REQUIRED:
        found = _version(package)
        hint = "" if found else "run `make setup`, or `pip install -e .`"
        findings.append(Finding(package, found or "missing", bool(found), hint))
    for package, (purpose, command) in _OPTIONAL.items():
        found = _version(package)
        hint = "" if found else f"for {purpose}: {command}"
        findings.append(Finding(package, found or "not installed", True if found else None, hint))
    models = model_directories()
    findings.append(
        Finding(
            "models",
            ", ".join(path.name for path in models) or "none",
            bool(models),
            "" if models else "data/models is empty: run from a clone of the repository",
        )
    )
    return findings


def _python_ok() -> bool:
    return (3, 11) <= sys.version_info[:2] <= (3, 13)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("device", "unknown, PyTorch is missing", False, "run `make setup`")
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = f"{properties.major}.{properties.minor}"
        memory_gib = properties.total_memory / 2**30
        return Finding(
            "device", f"{properties.name}, {memory_gib:.0f} GiB, compute capability {capability}"
        )
    cores = os.cpu_count() or 1
    return Finding(
        "device",
        f"CPU with {cores} cores, {torch.get_num_threads()} threads",
        hint="fine for every lab; a GPU only makes it fast",
    )


def _triton() -> Finding:
    found = _version("triton")
    if found is None:
        on_linux = sys.platform == "linux"
        hint = "pip install triton" if on_linux else "Triton exists for Linux only"
        return Finding("triton", "not installed", not on_linux, hint)
    import torch

    mode = "compiled" if torch.cuda.is_available() else "interpreter (no GPU)"
    return Finding("triton", f"{found}, {mode}")


def _cpu_kernels() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("CPU kernels", "unknown, PyTorch is missing", None)
    import torch

    from kernels import cpu

    reason = cpu.why_not(torch.float32)
    if reason is None:
        return Finding("CPU kernels", "compiled for this CPU")
    return Finding("CPU kernels", "not there", None, f"PyTorch's serve, more slowly; {reason}")
