"""The kernels for a CPU, in C++, with the arguments of those in Triton.

    if why_not(torch.float32) is None:  # otherwise it says what they lack; use the references
        rms_norm(x, weight, eps, residual)

`kernels.cpp` holds them and `build` compiles them. The tensors must be on the CPU, contiguous, and
all float32 or all bfloat16; shapes are those of `kernels.paged_attention` and its neighbours.
Nothing is checked here: the engine builds its tensors right, and `tests/kernels` compare.
"""

import torch

from kernels.cpu.build import NotAvailableError, library

_SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def why_not(dtype: torch.dtype) -> str | None:
    """Why there are no kernels for this dtype here, or None. The first call may compile them."""
    if dtype not in _SUFFIX:
        return f"there are kernels for {', '.join(_SUFFIX.values())}, not for {dtype}"
    try:
        library()
    except NotAvailableError as error:
        return str(error)
    return None


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `kernels.paged_attention.paged_attention`."""
    out = torch.empty_like(q) if out is None else out
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    getattr(library(), f"attention_{_SUFFIX[q.dtype]}")(
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        block_tables.data_ptr(),
        context_lens.data_ptr(),
        query_start_loc.data_ptr(),
        out.data_ptr(),
        *block_tables.shape,
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        scale,
        sliding_window or 0,
    )
    return out


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.rms_norm.rms_norm`."""
    out = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    getattr(library(), f"rms_norm_{_SUFFIX[x.dtype]}")(
        x.data_ptr(), _pointer(residual), weight.data_ptr(), out.data_ptr(), total.data_ptr(),
        *x.shape, eps,
    )  # fmt: skip
    return out, total


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `kernels.silu_and_mul.silu_and_mul`."""
    num_tokens, width = gate_up.shape
    out = gate_up.new_empty(num_tokens, width // 2)
    function = getattr(library(), f"silu_and_mul_{_SUFFIX[gate_up.dtype]}")
    function(gate_up.data_ptr(), out.data_ptr(), *out.shape)
    return out


def rope_and_cache(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rope: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """See `kernels.rope_and_cache.rope_and_cache`."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    num_tokens = qkv.shape[0]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    getattr(library(), f"rope_and_cache_{_SUFFIX[qkv.dtype]}")(
        qkv.data_ptr(), positions.data_ptr(), rope.data_ptr(), q.data_ptr(), k_cache.data_ptr(),
        v_cache.data_ptr(), slot_mapping.data_ptr(), _pointer(q_norm), _pointer(k_norm), eps,
        num_tokens, num_heads, num_kv_heads, head_dim,
    )  # fmt: skip
    return q


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
