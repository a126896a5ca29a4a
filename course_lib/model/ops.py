"""The decoder's operations that have a kernel of their own: three sets, one interface.

`TORCH_OPS` are the PyTorch expressions, for any device; `TRITON_OPS` are the fused kernels of a
GPU, `CPU_OPS` those of a CPU. Which set a decoder uses is settled once, when it is made.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels import cpu
from kernels.rms_norm import rms_norm, rms_norm_reference
from kernels.rope_and_cache import rope_and_cache, rope_and_cache_reference
from kernels.silu_and_mul import silu_and_mul, silu_and_mul_reference


@dataclass(frozen=True)
class Ops:
    """Functions with the arguments of those in `kernels`, and PyTorch's `embedding`."""

    embedding: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    silu_and_mul: Callable[[torch.Tensor], torch.Tensor]
    rope_and_cache: Callable[..., torch.Tensor]


TORCH_OPS = Ops(F.embedding, rms_norm_reference, silu_and_mul_reference, rope_and_cache_reference)
TRITON_OPS = Ops(F.embedding, rms_norm, silu_and_mul, rope_and_cache)
CPU_OPS = Ops(cpu.embedding, cpu.rms_norm, cpu.silu_and_mul, cpu.rope_and_cache)


def ops_for(device: torch.device) -> Ops:
    """The set that is fast on a device."""
    return TRITON_OPS if device.type == "cuda" else TORCH_OPS
