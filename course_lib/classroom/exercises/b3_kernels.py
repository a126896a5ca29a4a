"""The course's own answers to notebook B3: attention over a paged KV cache in small Triton kernels.

A program is one query token and one query head. It keeps a single row of the softmax, so there
is no tile, no tensor core and nothing to tune: these are kernels to read. The engine's own is
`kernels.paged_attention`.
"""
# mypy: allow-untyped-defs

import torch

from kernels.runtime import tl, triton


@triton.jit
def _one_block_kernel(
    q, k_blocks, v_blocks, context_lens, out, scale,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    head = tl.program_id(1)
    slots = tl.arange(0, BLOCK_SIZE)
    dims = tl.arange(0, PADDED_DIM)
    inside = dims < HEAD_DIM
    seen = slots < tl.load(context_lens + request)
    row = (request * NUM_HEADS + head) * HEAD_DIM
    query = tl.load(q + row + dims, mask=inside, other=0.0)
    key_rows = (request * BLOCK_SIZE + slots) * NUM_HEADS + head
    offsets = key_rows[:, None] * HEAD_DIM + dims[None, :]
    there = seen[:, None] & inside[None, :]
    keys = tl.load(k_blocks + offsets, mask=there, other=0.0)
    scores = tl.where(seen, scale * tl.sum(keys * query[None, :], 1), float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 0))
    probs = weights / tl.sum(weights, 0)
    values = tl.load(v_blocks + offsets, mask=there, other=0.0)
    tl.store(out + row + dims, tl.sum(probs[:, None] * values, 0), mask=inside)


def one_block_attention(q, k_blocks, v_blocks, context_lens, scale):
    """Exercise B3.1: decode attention over one block a request.

    Args:
        q: `[num_requests, num_heads, head_dim]` float32, one query token a request.
        k_blocks: `[num_requests, block_size, num_heads, head_dim]`; `v_blocks` likewise.
        v_blocks: the values.
        context_lens: `[num_requests]` int32, 1 to block_size.
        scale: factor on the scores.
    """
    num_requests, num_heads, head_dim = q.shape
    out = torch.full_like(q, float("nan"))
    _one_block_kernel[(num_requests, num_heads)](
        q, k_blocks, v_blocks, context_lens, out, scale,
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, PADDED_DIM=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=k_blocks.shape[1],
    )  # fmt: skip
    return out


@triton.jit
def _block_table_kernel(
    q, k_cache, v_cache, block_tables, context_lens, out, scale, max_blocks,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    head = tl.program_id(1)
    slots = tl.arange(0, BLOCK_SIZE)
    dims = tl.arange(0, PADDED_DIM)
    inside = dims < HEAD_DIM
    row = (request * NUM_HEADS + head) * HEAD_DIM
    query = tl.load(q + row + dims, mask=inside, other=0.0)
    context_len = tl.load(context_lens + request)
    largest = float("-inf")
    total = 0.0
    mean = tl.zeros([PADDED_DIM], tl.float32)
    for index in range(0, tl.cdiv(context_len, BLOCK_SIZE)):
        block = tl.load(block_tables + request * max_blocks + index).to(tl.int64)
        seen = index * BLOCK_SIZE + slots < context_len
        offsets = ((block * BLOCK_SIZE + slots) * NUM_HEADS + head)[:, None] * HEAD_DIM
        offsets += dims[None, :]
        there = seen[:, None] & inside[None, :]
        keys = tl.load(k_cache + offsets, mask=there, other=0.0)
        scores = tl.where(seen, scale * tl.sum(keys * query[None, :], 1), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        shrink = tl.exp(largest - new_largest)
        weights = tl.exp(scores - new_largest)
        values = tl.load(v_cache + offsets, mask=there, other=0.0)
        mean = mean * shrink + tl.sum(weights[:, None] * values, 0)
        total = total * shrink + tl.sum(weights, 0)
        largest = new_largest
    tl.store(out + row + dims, mean / total, mask=inside)


def block_table_attention(q, k_cache, v_cache, block_tables, context_lens, scale):
    """Exercise B3.2: decode attention over the blocks of a block table, with online softmax.

    Args:
        q: `[num_requests, num_heads, head_dim]` float32, one query token a request.
        k_cache: `[num_blocks, block_size, num_heads, head_dim]`; `v_cache` likewise.
        v_cache: the values.
        block_tables: `[num_requests, max_blocks]` int32.
        context_lens: `[num_requests]` int32, at least 1.
        scale: factor on the scores.
    """
    num_requests, num_heads, head_dim = q.shape
    out = torch.full_like(q, float("nan"))
    _block_table_kernel[(num_requests, num_heads)](
        q, k_cache, v_cache, block_tables, context_lens, out, scale, block_tables.shape[1],
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, PADDED_DIM=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=k_cache.shape[1],
    )  # fmt: skip
    return out


@triton.jit
def _paged_attention_kernel(
    q, k_cache, v_cache, block_tables, request_of_token, visible_keys, out, scale, max_blocks,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    request = tl.load(request_of_token + token)
    visible = tl.load(visible_keys + token)
    slots = tl.arange(0, BLOCK_SIZE)
    dims = tl.arange(0, PADDED_DIM)
    inside = dims < HEAD_DIM
    row = (token * NUM_HEADS + head) * HEAD_DIM
    query = scale * tl.load(q + row + dims, mask=inside, other=0.0).to(tl.float32)
    largest = float("-inf")
    total = 0.0
    mean = tl.zeros([PADDED_DIM], tl.float32)
    for index in range(0, tl.cdiv(visible, BLOCK_SIZE)):
        block = tl.load(block_tables + request * max_blocks + index).to(tl.int64)
        seen = index * BLOCK_SIZE + slots < visible
        offsets = ((block * BLOCK_SIZE + slots) * NUM_KV_HEADS + kv_head)[:, None] * HEAD_DIM
        offsets += dims[None, :]
        there = seen[:, None] & inside[None, :]
        keys = tl.load(k_cache + offsets, mask=there, other=0.0).to(tl.float32)
        scores = tl.where(seen, tl.sum(keys * query[None, :], 1), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        shrink = tl.exp(largest - new_largest)
        weights = tl.exp(scores - new_largest)
        values = tl.load(v_cache + offsets, mask=there, other=0.0).to(tl.float32)
        mean = mean * shrink + tl.sum(weights[:, None] * values, 0)
        total = total * shrink + tl.sum(weights, 0)
        largest = new_largest
    tl.store(out + row + dims, mean / total, mask=inside)


def paged_attention(
    q,
    k_cache,
    v_cache,
    block_tables,
    context_lens,
    query_start_loc,
    *,
    scale,
    sliding_window=None,
    out=None,
):
    """Exercise B3.3: the contract of `kernels.paged_attention`, without a sliding window."""
    if sliding_window is not None:
        raise ValueError("this kernel has no sliding window; use the course's own for this model")
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    q = q.contiguous()  # the kernel counts on rows that lie next to each other
    out = torch.empty_like(q) if out is None else out
    # What a token sees is all of its context but the query tokens behind it.
    starts, ends = query_start_loc[:-1].long(), query_start_loc[1:].long()
    requests = torch.arange(len(context_lens), device=q.device)
    request_of_token = requests.repeat_interleave(ends - starts)
    behind = ends[request_of_token] - torch.arange(1, num_tokens + 1, device=q.device)
    _paged_attention_kernel[(num_tokens, num_heads)](
        q, k_cache, v_cache, block_tables, request_of_token,
        context_lens[request_of_token] - behind, out, scale, block_tables.shape[1],
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim), BLOCK_SIZE=block_size,
    )  # fmt: skip
    return out


@triton.jit
def _partial_kernel(
    q, k_cache, v_cache, block_tables, context_lens, partial_out, partial_lse, scale, max_blocks,
    NUM_SPLITS: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    slots = tl.arange(0, BLOCK_SIZE)
    dims = tl.arange(0, PADDED_DIM)
    inside = dims < HEAD_DIM
    row = request * NUM_HEADS + head
    query = tl.load(q + row * HEAD_DIM + dims, mask=inside, other=0.0)
    context_len = tl.load(context_lens + request)
    num_blocks = tl.cdiv(context_len, BLOCK_SIZE)
    share = tl.cdiv(num_blocks, NUM_SPLITS)
    largest = float("-inf")
    total = 0.0
    mean = tl.zeros([PADDED_DIM], tl.float32)
    for index in range(split * share, tl.minimum((split + 1) * share, num_blocks)):
        block = tl.load(block_tables + request * max_blocks + index).to(tl.int64)
        seen = index * BLOCK_SIZE + slots < context_len
        offsets = ((block * BLOCK_SIZE + slots) * NUM_HEADS + head)[:, None] * HEAD_DIM
        offsets += dims[None, :]
        there = seen[:, None] & inside[None, :]
        keys = tl.load(k_cache + offsets, mask=there, other=0.0)
        scores = tl.where(seen, scale * tl.sum(keys * query[None, :], 1), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        shrink = tl.exp(largest - new_largest)
        weights = tl.exp(scores - new_largest)
        values = tl.load(v_cache + offsets, mask=there, other=0.0)
        mean = mean * shrink + tl.sum(weights[:, None] * values, 0)
        total = total * shrink + tl.sum(weights, 0)
        largest = new_largest
    place = row * NUM_SPLITS + split
    if total > 0:
        tl.store(partial_out + place * HEAD_DIM + dims, mean / total, mask=inside)
        tl.store(partial_lse + place, largest + tl.log(total))
    else:  # no block was left for this program
        tl.store(partial_out + place * HEAD_DIM + dims, mean, mask=inside)
        tl.store(partial_lse + place, float("-inf"))


@triton.jit
def _combine_kernel(
    partial_out, partial_lse, out,
    NUM_SPLITS: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * NUM_HEADS + tl.program_id(1)
    dims = tl.arange(0, PADDED_DIM)
    inside = dims < HEAD_DIM
    largest = float("-inf")
    for split in range(NUM_SPLITS):
        largest = tl.maximum(largest, tl.load(partial_lse + row * NUM_SPLITS + split))
    total = 0.0
    mean = tl.zeros([PADDED_DIM], tl.float32)
    for split in range(NUM_SPLITS):
        place = row * NUM_SPLITS + split
        weight = tl.exp(tl.load(partial_lse + place) - largest)
        part = tl.load(partial_out + place * HEAD_DIM + dims, mask=inside, other=0.0)
        mean += weight * part
        total += weight
    tl.store(out + row * HEAD_DIM + dims, mean / total, mask=inside)


def split_attention(q, k_cache, v_cache, block_tables, context_lens, scale, num_splits):
    """Exercise B3.4: as `block_table_attention`, by `num_splits` programs for each head."""
    num_requests, num_heads, head_dim = q.shape
    out = torch.full_like(q, float("nan"))
    partial_lse = q.new_full((num_requests, num_heads, num_splits), float("nan"))
    partial_out = q.new_full((*partial_lse.shape, head_dim), float("nan"))
    sizes = {
        "NUM_SPLITS": num_splits,
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": triton.next_power_of_2(head_dim),
    }
    _partial_kernel[(num_requests, num_heads, num_splits)](
        q, k_cache, v_cache, block_tables, context_lens, partial_out, partial_lse, scale,
        block_tables.shape[1], BLOCK_SIZE=k_cache.shape[1], **sizes,
    )  # fmt: skip
    _combine_kernel[(num_requests, num_heads)](partial_out, partial_lse, out, **sizes)
    return out
