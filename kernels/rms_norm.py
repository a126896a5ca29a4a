"""Root mean square normalisation, with the addition to the residual stream in the same pass.

A layer adds its output to the residual stream and the next one normalises the sum. Done in one
kernel, the sum is read from registers and not from memory again.
"""

import torch
import torch.nn.functional as F

from kernels.checks import check_tensor
from kernels.runtime import tl, triton


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The PyTorch expression of `rms_norm`."""
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(x + residual) / rms(x + residual) * weight`, and `x + residual` (Zhang & Sennrich, 2019).

    Args:
        x: `[num_tokens, hidden_size]`.
        weight: `[hidden_size]`.
        eps: added to the mean square.
        residual: like `x`; nothing is added if absent.

    Returns:
        The normalised rows and the residual stream after the addition, both like `x`. The mean
        square is computed in float32.

    Raises:
        ValueError: shapes, dtypes or devices differ, or a tensor is not contiguous.
    """
    check_tensor("x", x, (None, None), x)
    check_tensor("weight", weight, (x.shape[1],), x)
    out = torch.empty_like(x)
    total = x
    if residual is not None:
        check_tensor("residual", residual, tuple(x.shape), x)
        total = torch.empty_like(x)
    if x.numel() == 0:
        return out, total
    padded = triton.next_power_of_2(x.shape[1])
    _rms_norm_kernel[(x.shape[0],)](
        x,
        x if residual is None else residual,
        weight,
        out,
        total,
        eps,
        SIZE=x.shape[1],
        PADDED=padded,
        ADD=residual is not None,
        num_warps=max(1, min(16, padded // 512)),
    )
    return out, total


@triton.jit
def _rms_norm_kernel(
    x,  # [num_tokens, SIZE]
    residual,
    weight,  # [SIZE]
    out,
    total_out,
    eps,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ADD: tl.constexpr,
):
    """One row."""
    columns = tl.arange(0, PADDED)
    mask = columns < SIZE
    offsets = tl.program_id(0).to(tl.int64) * SIZE + columns
    total = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        # Rounded to the dtype of the stream before it is normalised, as the expression does.
        rounded = total.to(total_out.dtype.element_ty)
        tl.store(total_out + offsets, rounded, mask=mask)
        total = rounded.to(tl.float32)
    mean_square = tl.sum(total * total, 0) / SIZE
    scale = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, total * tl.rsqrt(mean_square + eps) * scale, mask=mask)
