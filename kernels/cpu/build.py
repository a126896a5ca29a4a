"""Compiles the C++ files beside it for this machine's CPU when they are first wanted; loads them.

All it takes is a C++ compiler with OpenMP, and a few seconds once: the result is kept in the user's
cache. Where there is no compiler, or it fails, `kernels` says why and callers go on with PyTorch's
operations.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))

#: Threads come from the OpenMP library that PyTorch has loaded already.
FLAGS = ["-O3", "-std=c++17", "-march=native", "-fPIC", "-fopenmp"]

#: Each kernel is there for these, under its name and the dtype's.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "paged_attention": [_POINTER] * 7 + [_INT] * 6 + [_FLOAT, _INT],
    "rms_norm": [_POINTER] * 5 + [_INT] * 2 + [_FLOAT],
    "silu_and_mul": [_POINTER] * 2 + [_INT] * 2,
    "rope_and_cache": [_POINTER] * 9 + [_FLOAT] + [_INT] * 4,
    "embedding": [_POINTER] * 3 + [_INT] * 2,
    "pack": [_POINTER] * 2 + [_INT] * 2,
    "linear": [_POINTER] * 4 + [_INT] * 3,
    "gated_linear": [_POINTER] * 4 + [_INT] * 3,
}


class NotAvailableError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        NotAvailableError: there are no sources or no C++ compiler, or it fails.
    """
    if not SOURCES:
        raise NotAvailableError(f"there are no C++ files in {Path(__file__).parent}")
    compiler = find_compiler()
    path = cache_dir() / f"kernels-{_fingerprint(compiler)}.so"
    if not path.exists():
        compile_to(path, compiler)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NotAvailableError(f"{path} cannot be loaded: {error}; remove it") from None


@lru_cache(maxsize=1)
def kernels() -> Mapping[tuple[str, torch.dtype], Callable[..., None]]:
    """Each kernel by its name and dtype.

    Raises:
        NotAvailableError: as `load_library`.
    """
    found = {}
    for name, arguments in _ARGUMENTS.items():
        for dtype, suffix in DTYPES.items():
            function = getattr(load_library(), f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
            found[name, dtype] = function
    return found


def find_compiler() -> str:
    """The path of $CXX, c++, g++ or clang++, the first that there is."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        found = shutil.which(name)
        if found:
            return found
    raise NotAvailableError("there is no C++ compiler: install g++ or clang++")


def cache_dir() -> Path:
    """Where compiled kernels are kept: `$XDG_CACHE_HOME/gpu-serving-labs`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "gpu-serving-labs"


def compile_to(path: Path, compiler: str) -> None:
    """Compile the kernels. Two processes may do so at once; each moves a complete file there.

    Raises:
        NotAvailableError: with the compiler's last words.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            objects = [Path(scratch) / f"{source.stem}.o" for source in SOURCES]
            running = [
                _start([compiler, *FLAGS, "-c", str(source), "-o", str(target)])
                for source, target in zip(SOURCES, objects, strict=True)
            ]
            # All of them end, also if one fails: the folder that they write to is removed then.
            progress = tqdm(running, "compiling the CPU kernels, once", disable=None)
            failures = [_last_words(process) for process in progress]
            made = Path(scratch) / path.name
            if not any(failures):
                link = [compiler, *FLAGS, "-shared", *map(str, objects), "-o", str(made)]
                failures = [_last_words(_start(link))]
            if any(failures):
                words = next(filter(None, failures))
                raise NotAvailableError(f"the compiler fails on the kernels: {words}")
            made.replace(path)
    except OSError as error:
        raise NotAvailableError(f"the kernels cannot be compiled to {path}: {error}") from None


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def _last_words(process: subprocess.Popen[str]) -> str:
    """Of a compiler that failed; empty if it did not."""
    _, words = process.communicate()
    return (words[-500:] or f"exit status {process.returncode}") if process.returncode else ""


def _fingerprint(compiler: str) -> str:
    """Changes when the result would: with the sources, the flags, the compiler and the CPU."""
    stat = Path(compiler).resolve().stat()
    cpu = platform.processor() + platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    sources = [path.read_text() for path in (*SOURCES, *HEADERS)]
    parts = (*sources, str(FLAGS), f"{stat.st_size} {stat.st_mtime_ns}", cpu)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
