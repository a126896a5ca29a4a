"""From the fused projection to attention's inputs in one pass: rotate, and write the KV cache.

Queries and keys are rotated by their positions (RoFormer, Su et al., 2021), after a normalisation
of each head where the model has one. Keys and values go to their slots in the paged cache: a slot
is the place of one token, `block_id * block_size + offset in the block`, computed on the host.
"""

import torch
import torch.nn.functional as F

from kernels.checks import check_tensor
from kernels.runtime import tl, triton


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `[num_tokens, num_heads, head_dim]`; dimension i pairs with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_and_cache_reference(
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
    """The PyTorch expression of `rope_and_cache`, with the same arguments."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    qk, v = heads.split([num_heads + num_kv_heads, num_kv_heads], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = qk.split([num_heads, num_kv_heads], dim=1)
        size = (head_dim,)
        qk = torch.cat((F.rms_norm(q, size, q_norm, eps), F.rms_norm(k, size, k_norm, eps)), dim=1)
    cos, sin = rope[positions].to(qkv.dtype)[:, None].unbind(dim=2)
    q, k = apply_rope(qk, cos, sin).split([num_heads, num_kv_heads], dim=1)
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)
    return q


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
    """Rotated queries; rotated keys and the values are stored in the cache.

    Args:
        qkv: `[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`, queries, keys, values.
        positions: `[num_tokens]` int64, each token's place in its own sequence.
        rope: `[max_len, 2, head_dim / 2]` float32, cosine and sine of each position's angles.
        k_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`; `v_cache` likewise.
        v_cache: the cached values.
        slot_mapping: `[num_tokens]` int64, the slot of each token.
        q_norm: `[head_dim]`, weight of the RMS norm over each query head; with `k_norm`, or none.
        k_norm: the same for key heads.
        eps: of these norms.

    Returns:
        `[num_tokens, num_heads, head_dim]`. The arithmetic is in float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a tensor is not contiguous. Positions
            and slots are not looked at: they come from the host, which checks them.
    """
    check_tensor("qkv", qkv, (None, None), qkv)
    check_tensor("k_cache", k_cache, (None, None, None, None), qkv)
    check_tensor("v_cache", v_cache, tuple(k_cache.shape), qkv)
    num_kv_heads, head_dim = k_cache.shape[2:]
    num_tokens = qkv.shape[0]
    check_tensor("positions", positions, (num_tokens,), qkv, torch.int64)
    check_tensor("slot_mapping", slot_mapping, (num_tokens,), qkv, torch.int64)
    check_tensor("rope", rope, (None, 2, head_dim // 2), qkv, torch.float32)
    num_heads, rest = divmod(qkv.shape[1] - 2 * num_kv_heads * head_dim, head_dim)
    if head_dim % 2 or rest or num_heads < 1:
        raise ValueError(
            f"qkv has {qkv.shape[1]} columns; expected num_heads + 2 x {num_kv_heads} heads of "
            f"head_dim {head_dim}, which must be even"
        )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("give both q_norm and k_norm, or neither")
    if q_norm is not None and k_norm is not None:
        check_tensor("q_norm", q_norm, (head_dim,), qkv)
        check_tensor("k_norm", k_norm, (head_dim,), qkv)
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens == 0:
        return q
    total_heads = num_heads + 2 * num_kv_heads
    half = max(8, triton.next_power_of_2(head_dim // 2))
    block_heads = max(1, min(2048 // (2 * half), triton.next_power_of_2(total_heads)))
    _rope_and_cache_kernel[(num_tokens, triton.cdiv(total_heads, block_heads))](
        qkv,
        positions,
        rope,
        q,
        k_cache,
        v_cache,
        slot_mapping,
        qkv if q_norm is None else q_norm,  # not read without NORM
        qkv if k_norm is None else k_norm,
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF_DIM=head_dim // 2,
        PADDED_HALF=half,
        BLOCK_HEADS=block_heads,
        NORM=q_norm is not None,
        num_warps=4,
    )
    return q


@triton.jit
def _rope_and_cache_kernel(
    qkv,  # [num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, 2 * HALF_DIM]
    positions,  # [num_tokens]
    rope,  # [max_len, 2, HALF_DIM]
    q_out,  # [num_tokens, NUM_HEADS, 2 * HALF_DIM]
    k_cache,  # [num_slots, NUM_KV_HEADS, 2 * HALF_DIM]
    v_cache,
    slot_mapping,  # [num_tokens]
    q_norm,  # [2 * HALF_DIM]
    k_norm,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    NORM: tl.constexpr,
):
    """`BLOCK_HEADS` heads of one token, whichever of queries, keys and values they are."""
    HEAD_DIM: tl.constexpr = 2 * HALF_DIM
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    is_q = heads < NUM_HEADS
    is_k = (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS)
    is_v = (heads >= NUM_HEADS + NUM_KV_HEADS) & (heads < NUM_HEADS + 2 * NUM_KV_HEADS)
    dims = tl.arange(0, PADDED_HALF)
    dim_exists = (dims < HALF_DIM)[None, :]
    mask = (is_q | is_k | is_v)[:, None] & dim_exists

    rows = token * (NUM_HEADS + 2 * NUM_KV_HEADS) + heads
    source = qkv + rows[:, None] * HEAD_DIM + dims[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF_DIM, mask=mask, other=0.0).to(tl.float32)
    kept_first, kept_second = first, second  # values stay as they are
    if NORM:
        mean_square = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HEAD_DIM
        scale = tl.rsqrt(mean_square + eps)[:, None]
        weight = tl.where(is_q[:, None], q_norm + dims[None, :], k_norm + dims[None, :])
        first *= scale * tl.load(weight, mask=mask, other=0.0).to(tl.float32)
        second *= scale * tl.load(weight + HALF_DIM, mask=mask, other=0.0).to(tl.float32)
    angles = rope + tl.load(positions + token) * HEAD_DIM + dims
    cos = tl.load(angles, mask=dims < HALF_DIM, other=0.0)[None, :]
    sin = tl.load(angles + HALF_DIM, mask=dims < HALF_DIM, other=0.0)[None, :]
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin

    q_rows = (token * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    q_mask = is_q[:, None] & dim_exists
    tl.store(q_out + q_rows, turned_first, mask=q_mask)
    tl.store(q_out + q_rows + HALF_DIM, turned_second, mask=q_mask)
    slot = tl.load(slot_mapping + token) * NUM_KV_HEADS
    k_rows = (slot + heads - NUM_HEADS)[:, None] * HEAD_DIM + dims[None, :]
    k_mask = is_k[:, None] & dim_exists
    tl.store(k_cache + k_rows, turned_first, mask=k_mask)
    tl.store(k_cache + k_rows + HALF_DIM, turned_second, mask=k_mask)
    v_rows = (slot + heads - NUM_HEADS - NUM_KV_HEADS)[:, None] * HEAD_DIM + dims[None, :]
    v_mask = is_v[:, None] & dim_exists
    tl.store(v_cache + v_rows, kept_first, mask=v_mask)
    tl.store(v_cache + v_rows + HALF_DIM, kept_second, mask=v_mask)
