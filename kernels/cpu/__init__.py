"""The kernels for a CPU, in C++, with the arguments of those in Triton.

    if why_not(torch.float32) is None:  # otherwise it says what they lack; use the references
        rms_norm(x, weight, eps, residual)

The `.cpp` files hold them, by the names of the Triton kernels, and `build` compiles them; `linear`
has no Triton counterpart, since a GPU's own library is as fast. The tensors must be on the CPU,
contiguous, and all float32 or all bfloat16; shapes are those of `kernels.paged_attention` and its
neighbours. Nothing is checked here: the engine builds its tensors right, and `tests/kernels`
compare. `recording` makes the same calls again without Python's work between them.
"""

import torch
import torch.nn.functional as F

from kernels.cpu.build import DTYPES, NotAvailableError, kernels, load_library
from kernels.cpu.recording import call


def why_not(dtype: torch.dtype) -> str | None:
    """Why there are no kernels for this dtype here, or None. The first call may compile them."""
    if dtype not in DTYPES:
        return f"there are kernels for {', '.join(DTYPES.values())}, not for {dtype}"
    try:
        kernels()
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
    call(
        "paged_attention",
        (q, k_cache, v_cache, block_tables, context_lens, query_start_loc, out),
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
    call("rms_norm", (x, residual, weight, out, total), *x.shape, eps)
    return out, total


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `kernels.silu_and_mul.silu_and_mul`."""
    num_tokens, width = gate_up.shape
    out = gate_up.new_empty(num_tokens, width // 2)
    call("silu_and_mul", (gate_up, out), *out.shape)
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
    call(
        "rope_and_cache",
        (qkv, positions, rope, q, k_cache, v_cache, slot_mapping, q_norm, k_norm),
        eps,
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
    )
    return q


def embedding(token_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix.

    Args:
        token_ids: `[num_tokens]` int64; not checked, a wrong one reads what is not the matrix.
        weight: `[vocab_size, hidden_size]`.
    """
    out = weight.new_empty(len(token_ids), weight.shape[1])
    call("embedding", (weight, token_ids, out), *out.shape)
    return out


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The weights of a linear layer in the order in which `linear` reads them.

    Args:
        weight: `[out_features, in_features]`; for bfloat16 `in_features` is even.
    """
    out_features, in_features = weight.shape
    columns = load_library().panel_columns()
    panels = weight.new_empty(-(-out_features // columns), in_features, columns)
    call("pack", (weight, panels), in_features, out_features)
    return panels


def linear(
    x: torch.Tensor, panels: torch.Tensor, out_features: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ weight.T + bias` by the weights that `pack` has packed.

    Args:
        x: `[num_tokens, in_features]`.
        panels: from `pack`.
        out_features: rows of the weight.
        bias: `[out_features]`.
    """
    return _product("linear", x, panels, out_features, bias)


def gates_beside(gate_up: torch.Tensor) -> torch.Tensor:
    """The rows of a gated layer in the order in which `gated_linear` wants them packed.

    Args:
        gate_up: weights `[2 * out_features, in_features]` or biases `[2 * out_features]`, the gates
            first.
    """
    half = load_library().panel_columns() // 2
    padding = [0, 0] * (gate_up.ndim - 1) + [0, -len(gate_up) // 2 % half]
    parts = [F.pad(part, padding).unflatten(0, (-1, half)) for part in gate_up.chunk(2)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def gated_linear(
    x: torch.Tensor, panels: torch.Tensor, out_features: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`silu(gate) * up` of a linear layer's two halves, without writing them to memory.

    Args:
        x: `[num_tokens, in_features]`.
        panels: from `pack` of `gates_beside`.
        out_features: rows of the gate.
        bias: from `gates_beside`.
    """
    return _product("gated_linear", x, panels, out_features, bias)


def _product(
    name: str, x: torch.Tensor, panels: torch.Tensor, out_features: int, bias: torch.Tensor | None
) -> torch.Tensor:
    num_tokens, in_features = x.shape
    out = x.new_empty(num_tokens, out_features)
    call(name, (x, panels, bias, out), num_tokens, in_features, out_features)
    return out
