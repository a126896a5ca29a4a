"""Attention over a paged KV cache: what every attention backend of the engine must compute.

Each request's keys and values lie in fixed-size blocks scattered over the cache; its block table
says where (PagedAttention, Kwon et al., SOSP 2023). One call serves prefill chunks, decode and
mixes of both: a request brings any number of query tokens, and they are the last tokens of its
context. `paged_attention_reference` is the readable PyTorch expression, used to check the others.
"""

import torch


def paged_attention_reference(
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
    """Causal attention of each request's query tokens over its own blocks.

    Args:
        q: `[num_tokens, num_heads, head_dim]`, the requests' query tokens one after another.
        k_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`; `v_cache` has the same shape.
        v_cache: the values.
        block_tables: `[num_requests, max_blocks]` int32, the blocks of each request in order.
        context_lens: `[num_requests]` int32, tokens in each context, this step's included.
        query_start_loc: `[num_requests + 1]` int32; request `r` owns the rows
            `query_start_loc[r]` to `query_start_loc[r + 1]` of `q`.
        scale: factor on the scores, usually `head_dim ** -0.5`.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        out: where to write the result; made if absent.

    Returns:
        `[num_tokens, num_heads, head_dim]`. The arithmetic runs in the dtype of `q`.
    """
    out = torch.empty_like(q) if out is None else out
    num_heads, num_kv_heads = q.shape[1], k_cache.shape[2]
    for r, context_len in enumerate(context_lens.tolist()):
        start, end = query_start_loc[r : r + 2].tolist()
        keys = k_cache[block_tables[r].long()].flatten(0, 1)[:context_len].to(q.dtype)
        values = v_cache[block_tables[r].long()].flatten(0, 1)[:context_len].to(q.dtype)
        keys = keys.repeat_interleave(num_heads // num_kv_heads, dim=1)
        values = values.repeat_interleave(num_heads // num_kv_heads, dim=1)
        query_positions = torch.arange(context_len - (end - start), context_len, device=q.device)
        distance = query_positions[:, None] - torch.arange(context_len, device=q.device)
        visible = distance >= 0
        if sliding_window is not None:
            visible &= distance < sliding_window
        scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * scale
        probs = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        out[start:end] = torch.einsum("hqk,khd->qhd", probs, values)
    return out
