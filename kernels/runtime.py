"""Triton, compiled for the GPU where there is one and run by its interpreter elsewhere.

Kernels import `triton` and `tl` from here. The interpreter executes a kernel program by program
in NumPy: slow, but it needs no GPU, and `print` works in it. It must be switched on before Triton
is first imported, since Triton's own library of functions is bound to one of the two ways.

Triton is published for Linux only. Elsewhere a stand-in lets the modules import, so that the
PyTorch expressions in them still work; launching a kernel then says what is missing.
"""

import os
import sys
from typing import Any

import torch


class _NotUsable:
    """Takes Triton's place while kernels are defined; launching one raises the reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __getattr__(self, name: str) -> "_NotUsable":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_NotUsable":
        if args and not callable(args[0]):  # not a decorator: somebody wants to launch a kernel
            raise RuntimeError(self.reason)
        return self

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError(self.reason)


triton: Any
tl: Any

# "0" compiles without a GPU, to look at the code; such a kernel cannot be launched here.
if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
try:
    import triton as _triton
    import triton.language as _tl
    from triton.runtime import JITFunction
except ImportError:
    triton = tl = _NotUsable(
        "this needs Triton, which is published for Linux only; use Linux, WSL or Colab, or the "
        "PyTorch backend: LLM(..., attention_backend='TORCH_SDPA')"
    )
    INTERPRETED = False
else:
    triton, tl = _triton, _tl
    INTERPRETED = not isinstance(tl.sum, JITFunction)
    if not INTERPRETED and not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        triton = tl = _NotUsable(
            "there is no GPU, and Triton was imported before its interpreter could be switched "
            "on; run `from course_lib import LLM` before that import, or set TRITON_INTERPRET=1"
        )
