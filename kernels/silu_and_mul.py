"""The gate of the feed-forward layer, SwiGLU (Shazeer, 2020), in one pass over its input."""

import torch
import torch.nn.functional as F

from kernels.checks import check_tensor
from kernels.runtime import tl, triton


def silu_and_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The PyTorch expression of `silu_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of the two halves of each row, where `silu(x) = x * sigmoid(x)`.

    Args:
        gate_up: `[num_tokens, 2 * size]`, the gate first.

    Returns:
        `[num_tokens, size]`.

    Raises:
        ValueError: the rows cannot be halved, or the tensor is not contiguous.
    """
    check_tensor("gate_up", gate_up, (None, None), gate_up)
    num_tokens, width = gate_up.shape
    if width % 2:
        raise ValueError(f"gate_up must have an even number of columns, got {width}")
    out = gate_up.new_empty(num_tokens, width // 2)
    if out.numel():
        block = min(1024, triton.next_power_of_2(width // 2))
        grid = (num_tokens, triton.cdiv(width // 2, block))
        _silu_and_mul_kernel[grid](gate_up, out, SIZE=width // 2, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _silu_and_mul_kernel(
    gate_up,  # [num_tokens, 2 * SIZE]
    out,  # [num_tokens, SIZE]
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`BLOCK` columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + columns, gate / (1 + tl.exp(-gate)) * up, mask=mask)
