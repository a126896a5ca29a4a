"""Writing keys and values into the pages of the KV cache.

A slot is the place of one token: `block_id * block_size + offset in the block`. The engine computes
the slots of a step on the host; this stores the step's keys and values there.
"""

import torch


def write_kv_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Store `k` and `v` in place.

    Args:
        k: `[num_tokens, num_kv_heads, head_dim]`; `v` has the same shape.
        v: the values.
        k_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`; `v_cache` likewise.
        v_cache: the cached values.
        slot_mapping: `[num_tokens]` int64, the slot of each token.
    """
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)
