"""Compiles `kernels.cpp` for this machine's CPU the first time it is wanted, and loads it.

All it takes is a C++ compiler, and a few seconds once: the result is kept in the user's cache.
Where there is no compiler, or it fails, `library` says why and callers go on with PyTorch's
operations.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")

#: Sums may be added up in another order, so that they become vector instructions. Not -ffast-math:
#: with it GCC changes how the whole process rounds tiny numbers.
FLAGS = [
    *("-O3", "-std=c++17", "-march=native", "-shared", "-fPIC"),
    *("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"),
    *("-freciprocal-math", "-fno-math-errno"),
]

#: Threads by OpenMP, from the library that PyTorch has loaded already; one thread without it.
THREADS: tuple[list[str], ...] = (["-fopenmp"], [])

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "attention": [_POINTER] * 7 + [_INT] * 6 + [_FLOAT, _INT],
    "rms_norm": [_POINTER] * 5 + [_INT] * 2 + [_FLOAT],
    "silu_and_mul": [_POINTER] * 2 + [_INT] * 2,
    "rope_and_cache": [_POINTER] * 9 + [_FLOAT] + [_INT] * 4,
}


class NotAvailableError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        NotAvailableError: there is no C++ compiler, or it fails.
    """
    compiler = find_compiler()
    path = cache_dir() / f"kernels-{_fingerprint(compiler)}.so"
    if not path.exists():
        compile_to(path, compiler)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NotAvailableError(f"{path} cannot be loaded: {error}; remove it") from None
    for name, arguments in _ARGUMENTS.items():
        for suffix in ("float32", "bfloat16"):
            function = getattr(loaded, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
    return loaded


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
            output = Path(scratch) / path.name
            for threads in THREADS:
                command = [compiler, *FLAGS, *threads, str(SOURCE), "-o", str(output)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode == 0:
                    output.replace(path)
                    return
    except OSError as error:
        raise NotAvailableError(f"the kernels cannot be compiled to {path}: {error}") from None
    raise NotAvailableError(f"{compiler} fails on {SOURCE.name}: {done.stderr[-500:]}")


def _fingerprint(compiler: str) -> str:
    """Changes when the result would: with the source, the flags, the compiler and the CPU."""
    stat = Path(compiler).resolve().stat()
    cpu = platform.processor() + platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    parts = (SOURCE.read_text(), str(FLAGS), f"{stat.st_size} {stat.st_mtime_ns}", cpu)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
