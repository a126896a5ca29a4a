"""Attention over a paged KV cache (PagedAttention, Kwon et al., SOSP 2023) in one Triton kernel.

Each request's keys and values lie in fixed-size blocks scattered over the cache; its block table
says where. One call serves prefill chunks, decode and mixes of both: a request brings any number
of query tokens, and they are the last tokens of its context.

How it works. The query tokens are cut into tiles that never cross from one request to the next.
A program takes one tile and one KV head. All query heads that share the KV head are rows of the
same tile, so each key and value is read once a tile (grouped-query attention, Ainslie et al.,
2023). It walks over the request's keys `block_n` at a time, finds each key's place by the block
table, and keeps for every row the largest score so far, the sum of the exponentials and the
weighted sum of the values; when the largest score grows, the two sums are scaled down (online
softmax, Milakov & Gimelshein, 2018; FlashAttention, Dao et al., 2022). Scores are never stored.

Where that gives fewer programs than the GPU can run, as in a small decode batch over long contexts,
the keys of a tile are split among several programs. Each leaves its own weighted mean and the
logarithm of its sum, and a second kernel combines them (FlashDecoding, Dao et al., 2023).

Read `paged_attention_reference` for what is computed, `_attention_kernel` for how.
"""

import math
from dataclasses import dataclass

import torch

from kernels.checks import check_tensor
from kernels.runtime import INTERPRETED, tl, triton

#: Multiprocessors that the choice of splits assumes where there is no GPU: an H100's.
DEFAULT_NUM_SMS = 132


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
    """The PyTorch expression of `paged_attention`, with the same arguments.

    The arithmetic runs in the dtype of `q`. Nothing is checked. To read and to compare with.
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
    """Causal attention of each request's query tokens over its own blocks.

    Args:
        q: `[num_tokens, num_heads, head_dim]`, the requests' query tokens one after another;
            float16, bfloat16 or float32, head_dim 16 to 256.
        k_cache: `[num_blocks, block_size, num_kv_heads, head_dim]`; `v_cache` has the same shape.
        v_cache: the values.
        block_tables: `[num_requests, max_blocks]` int32, the blocks of each request in order.
        context_lens: `[num_requests]` int32, tokens in each context, this step's included.
        query_start_loc: `[num_requests + 1]` int32; request `r` owns the rows
            `query_start_loc[r]` to `query_start_loc[r + 1]` of `q`. It may own none.
        scale: positive factor on the scores, usually `head_dim ** -0.5`.
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it.
        out: where to write the result; made if absent.

    Returns:
        `[num_tokens, num_heads, head_dim]` in the dtype of `q`. Sums are in float32, and float32
        products are not rounded to TF32.

    Raises:
        ValueError: dtypes, shapes, devices or lengths do not fit together, a tensor is not
            contiguous, or a block table names a block that the cache does not have. Looking at
            the tables waits for the GPU; the engine, which builds them, calls
            `launch_paged_attention`.
    """
    _check_tensors(q, k_cache, v_cache, block_tables, context_lens, query_start_loc, out)
    _check_scalars(scale, sliding_window)
    _check_tables(q, k_cache, block_tables, context_lens, query_start_loc)
    return launch_paged_attention(
        q,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        query_start_loc,
        scale=scale,
        sliding_window=sliding_window,
        out=out,
    )


@dataclass(frozen=True)
class Tiles:
    """How a launch cuts the work: rows and keys of a tile, and what Triton makes of a program."""

    block_m: int  # rows: query tokens times the query heads of a KV head
    block_n: int  # keys
    num_warps: int
    num_stages: int  # tiles of keys in flight


def choose_tiles(
    rows_per_request: int, head_dim: int, dtype: torch.dtype, capability: tuple[int, int]
) -> Tiles:
    """Tiles that suit the work, fit the GPU's shared memory and spill no registers.

    Chosen by what the compiler reports for compute capabilities 7.5, 8.0 and 9.0.

    Args:
        rows_per_request: typical number of query tokens times query heads of a KV head.
        head_dim: elements of a head.
        dtype: of the tensors.
        capability: the GPU's compute capability, such as (9, 0).
    """
    rows = max(16, min(128, triton.next_power_of_2(rows_per_request)))
    if dtype == torch.float32 or capability < (8, 0):
        # Products from registers: Triton has no tensor core code for exact float32 or for a T4.
        return Tiles(min(rows, 32), 16, 8, 2 if capability >= (8, 0) else 1)
    wide = head_dim > 128
    if rows == 16:  # decode, bound by memory: two tiles of keys and two of values in flight
        return Tiles(16, 32 if wide else 64, 4, 5)
    if wide:
        return Tiles(min(rows, 64 if capability >= (9, 0) else 32), 32, 4, 3)
    narrow_keys = capability < (9, 0) and head_dim > 64
    return Tiles(rows, 32 if narrow_keys else 64, 8 if rows == 128 else 4, 3)


def choose_num_splits(num_programs: int, max_context_len: int, num_sms: int) -> int:
    """Programs among which the keys of a tile are split; a power of two, 1 for no split.

    As many as fill every multiprocessor twice, none with fewer than 256 keys of the longest
    context there could be. It depends on shapes only, so that a captured graph can be replayed
    whatever the contexts have grown to.
    """
    wanted = min(2 * num_sms // max(1, num_programs), max_context_len // 256, 64)
    return 1 << (max(1, wanted).bit_length() - 1)


def launch_paged_attention(
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
    tiles: Tiles | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """`paged_attention` without its checks: nothing waits for the GPU.

    Args:
        tiles: in place of those that `choose_tiles` finds.
        num_splits: a power of two, in place of what `choose_num_splits` finds.
    """
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    num_requests, max_blocks = block_tables.shape
    out = torch.empty_like(q) if out is None else out
    if num_tokens == 0 or num_requests == 0:
        return out
    capability, num_sms = _gpu(q.device)
    group = num_heads // num_kv_heads
    if tiles is None:
        rows = -(-num_tokens // num_requests) * group
        tiles = choose_tiles(rows, head_dim, q.dtype, capability)
    # A tile holds whole tokens: at least one, with all heads of its group.
    block_m = max(tiles.block_m, triton.next_power_of_2(group))
    block_q = block_m // group
    # Enough tiles however the tokens are spread over the requests, found without reading how.
    num_tiles = num_tokens // block_q + num_requests
    if num_splits is None:
        num_programs = -(-num_tokens // block_q) * num_kv_heads
        num_splits = choose_num_splits(num_programs, max_blocks * block_size, num_sms)
    if num_splits == 1:
        partial_out, partial_lse = out, context_lens  # not touched
    else:
        shape = (num_splits, num_tokens, num_heads)
        partial_out = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    _attention_kernel[(num_tiles, num_kv_heads, num_splits)](
        q,
        k_cache,
        v_cache,
        block_tables,
        context_lens,
        query_start_loc,
        out,
        partial_out,
        partial_lse,
        num_requests,
        num_tokens,
        max_blocks,
        scale * math.log2(math.e),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded_dim,
        BLOCK_SIZE=block_size,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        SLIDING_WINDOW=sliding_window or 0,
        BLOCK_M=block_m,
        BLOCK_Q=block_q,
        BLOCK_N=tiles.block_n,
        NUM_SPLITS=num_splits,
        # The interpreter has no 16-bit products.
        DOT_IN_FLOAT32=INTERPRETED,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if num_splits > 1:
        _combine_kernel[(num_tokens, num_heads)](
            partial_out,
            partial_lse,
            out,
            num_tokens,
            num_heads,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            NUM_SPLITS=num_splits,
            num_warps=4,
        )
    return out


# Sizes that change from step to step are not compiled in.
@triton.jit(do_not_specialize=["num_requests", "num_tokens", "max_blocks"])
def _attention_kernel(
    q,  # [num_tokens, NUM_KV_HEADS * GROUP, HEAD_DIM]
    k_cache,  # [num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM]
    v_cache,
    block_tables,  # [num_requests, max_blocks]
    context_lens,  # [num_requests]
    query_start_loc,  # [num_requests + 1]
    out,  # like q
    partial_out,  # [NUM_SPLITS, num_tokens, NUM_KV_HEADS * GROUP, HEAD_DIM] float32
    partial_lse,  # [NUM_SPLITS, num_tokens, NUM_KV_HEADS * GROUP] float32, in base 2
    num_requests,
    num_tokens,
    max_blocks,
    scale,  # times log2(e), so that exponentials are powers of two
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,  # 0 for none
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    DOT_IN_FLOAT32: tl.constexpr,
):
    """One tile of queries, one KV head, one share of the keys."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request = _request_of_tile(query_start_loc, num_requests, tile, BLOCK_Q)
    query_start = tl.load(query_start_loc + request)
    num_queries = tl.load(query_start_loc + request + 1) - query_start
    first_query = (tile - query_start // BLOCK_Q - request) * BLOCK_Q
    if first_query >= num_queries:
        return
    num_computed = tl.load(context_lens + request) - num_queries

    # Rows of the tile: a query token of the request and one of the heads that share the KV head.
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    query = first_query + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    row_exists = (rows < BLOCK_Q * GROUP) & (query < num_queries)
    q_rows = (query_start + query).to(tl.int64) * (NUM_KV_HEADS * GROUP) + head
    q_mask = row_exists[:, None] & (dims < HEAD_DIM)[None, :]
    q_tile = tl.load(q + q_rows[:, None] * HEAD_DIM + dims[None, :], mask=q_mask, other=0.0)
    positions = num_computed + query  # in the request's context

    # Keys that some row of the tile sees, and this program's share of them in whole tiles.
    first_position = num_computed + first_query
    end = num_computed + tl.minimum(first_query + BLOCK_Q, num_queries)
    begin = 0
    if SLIDING_WINDOW > 0:
        begin = tl.maximum(0, first_position - SLIDING_WINDOW + 1) // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), NUM_SPLITS) * BLOCK_N
    begin += split * share
    end = tl.minimum(end, begin + share)
    # Up to here every row sees every key, so nothing needs a mask.
    full_end = begin
    if SLIDING_WINDOW == 0:
        full_end += tl.maximum(tl.minimum(end, first_position + 1) - begin, 0) // BLOCK_N * BLOCK_N

    block_table = block_tables + request.to(tl.int64) * max_blocks
    head_offset = kv_head * HEAD_DIM
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    mean, total, largest = _walk_keys(
        mean, total, largest, q_tile, k_cache + head_offset, v_cache + head_offset, block_table,
        positions, begin, full_end, scale, HEAD_DIM, PADDED_DIM, BLOCK_SIZE,
        NUM_KV_HEADS * HEAD_DIM, BLOCK_N, SLIDING_WINDOW, False, DOT_IN_FLOAT32,
    )  # fmt: skip
    mean, total, largest = _walk_keys(
        mean, total, largest, q_tile, k_cache + head_offset, v_cache + head_offset, block_table,
        positions, full_end, end, scale, HEAD_DIM, PADDED_DIM, BLOCK_SIZE,
        NUM_KV_HEADS * HEAD_DIM, BLOCK_N, SLIDING_WINDOW, True, DOT_IN_FLOAT32,
    )  # fmt: skip
    # A row that saw no key has a total of 0 and gets zeros.
    mean = mean / tl.where(total > 0, total, 1.0)[:, None]

    if NUM_SPLITS == 1:
        tl.store(out + q_rows[:, None] * HEAD_DIM + dims[None, :], mean, mask=q_mask)
    else:
        rows_out = split.to(tl.int64) * num_tokens * (NUM_KV_HEADS * GROUP) + q_rows
        tl.store(partial_out + rows_out[:, None] * HEAD_DIM + dims[None, :], mean, mask=q_mask)
        lse = tl.where(total > 0, largest + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(partial_lse + rows_out, lse, mask=row_exists)


@triton.jit
def _request_of_tile(query_start_loc, num_requests, tile, BLOCK_Q: tl.constexpr):
    """The last request whose first tile is not after this one, by binary search.

    Request r gets the tiles from `query_start_loc[r] // BLOCK_Q + r` on: room for all of its
    tokens, and a tile to spare where they end within one.
    """
    low = 0
    high = num_requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _walk_keys(
    mean, total, largest, q_tile, k_cache, v_cache, block_table, positions, begin, end, scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, SLIDING_WINDOW: tl.constexpr,
    MASKED: tl.constexpr, DOT_IN_FLOAT32: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys `begin` to `end` of a request, a tile at a time.

    `mean` is the weighted sum of values so far, to be divided by `total` at the end. Without
    `MASKED` every row sees all of these keys, which come in whole tiles.
    """
    dims = tl.arange(0, PADDED_DIM)
    dim_exists = dims < HEAD_DIM
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        exists = (keys < end) if MASKED else tl.full([BLOCK_N], True, tl.int1)
        blocks = tl.load(block_table + keys // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        offsets = (blocks * BLOCK_SIZE + keys % BLOCK_SIZE) * TOKEN_STRIDE
        mask = exists[:, None] & dim_exists[None, :]
        k_tile = tl.load(k_cache + offsets[:, None] + dims[None, :], mask=mask, other=0.0)
        if DOT_IN_FLOAT32:
            scores = tl.dot(
                q_tile.to(tl.float32), tl.trans(k_tile.to(tl.float32)), input_precision="ieee"
            )
        else:
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if MASKED:
            distance = positions[:, None] - keys[None, :]
            visible = (distance >= 0) & exists[None, :]
            if SLIDING_WINDOW > 0:
                visible &= distance < SLIDING_WINDOW
            scores = tl.where(visible, scores, float("-inf"))
        # Scaled within the exponent, where it is part of one multiply-add.
        new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
        # A row that has seen no key yet stays at -inf; 0 keeps inf - inf out of its exponents.
        pivot = tl.where(new_largest == float("-inf"), 0.0, new_largest) if MASKED else new_largest
        weights = tl.exp2(scores * scale - pivot[:, None])
        shrink = tl.exp2(largest - pivot)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = tl.load(v_cache + offsets[:, None] + dims[None, :], mask=mask, other=0.0)
        if DOT_IN_FLOAT32:
            products = tl.dot(
                weights.to(v_tile.dtype).to(tl.float32),
                v_tile.to(tl.float32),
                input_precision="ieee",
            )
            mean = mean * shrink[:, None] + products
        else:
            mean = tl.dot(
                weights.to(v_tile.dtype), v_tile, mean * shrink[:, None], input_precision="ieee"
            )
        largest = new_largest
    return mean, total, largest


@triton.jit(do_not_specialize=["num_tokens"])
def _combine_kernel(
    partial_out,  # [NUM_SPLITS, num_tokens, num_heads, HEAD_DIM]
    partial_lse,  # [NUM_SPLITS, num_tokens, num_heads]
    out,  # [num_tokens, num_heads, HEAD_DIM]
    num_tokens,
    num_heads,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """The shares of one token and head as one: each mean weighted by its sum of exponentials."""
    row = tl.program_id(0).to(tl.int64) * num_heads + tl.program_id(1)
    splits = tl.arange(0, NUM_SPLITS)
    dims = tl.arange(0, PADDED_DIM)
    rows = splits.to(tl.int64) * num_tokens * num_heads + row
    lse = tl.load(partial_lse + rows)
    largest = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))
    mask = (weights > 0)[:, None] & (dims < HEAD_DIM)[None, :]
    means = tl.load(partial_out + rows[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    total = tl.sum(weights, 0)
    mean = tl.sum(means * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * HEAD_DIM + dims, mean, mask=dims < HEAD_DIM)


def _gpu(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors; an H100's under the interpreter."""
    if device.type != "cuda":
        return (9, 0), DEFAULT_NUM_SMS
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def _check_tensors(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    out: torch.Tensor | None,
) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q must be float16, bfloat16 or float32, got {q.dtype}")
    check_tensor("q", q, (None, None, None), q)
    num_heads, head_dim = q.shape[1:]
    check_tensor("k_cache", k_cache, (None, None, None, head_dim), q)
    check_tensor("v_cache", v_cache, tuple(k_cache.shape), q)
    check_tensor("block_tables", block_tables, (None, None), q, torch.int32)
    num_requests = block_tables.shape[0]
    check_tensor("context_lens", context_lens, (num_requests,), q, torch.int32)
    check_tensor("query_start_loc", query_start_loc, (num_requests + 1,), q, torch.int32)
    if out is not None:
        check_tensor("out", out, tuple(q.shape), q)
    if not 16 <= head_dim <= 256:
        raise ValueError(f"head_dim must be 16 to 256, got {head_dim}")
    _, block_size, num_kv_heads, _ = k_cache.shape
    if not 8 <= block_size <= 256:
        raise ValueError(f"block_size must be 8 to 256 tokens, got {block_size}")
    if num_kv_heads == 0 or num_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"the {num_heads} heads of q must be a multiple of the {num_kv_heads} KV heads of the "
            "cache, at least one each"
        )


def _check_scalars(scale: float, sliding_window: int | None) -> None:
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ValueError(f"scale must be a finite number above 0, got {scale!r}")
    if sliding_window is not None and (type(sliding_window) is not int or sliding_window < 1):
        raise ValueError(f"sliding_window must be at least 1 token or None, got {sliding_window!r}")


def _check_tables(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
) -> None:
    """Checks that read the tables' contents."""
    num_blocks, block_size = k_cache.shape[:2]
    starts, lens = query_start_loc.tolist(), context_lens.tolist()
    if starts[0] != 0 or starts[-1] != len(q) or sorted(starts) != starts:
        raise ValueError(
            f"query_start_loc must rise from 0 to the {len(q)} tokens of q, got {starts}"
        )
    capacity = block_tables.shape[1] * block_size
    for r, (start, end, context_len) in enumerate(zip(starts[:-1], starts[1:], lens, strict=True)):
        if not end - start <= context_len <= capacity:
            raise ValueError(
                f"context_lens[{r}] is {context_len}; it must be at least the request's "
                f"{end - start} query tokens and at most the {capacity} tokens that its block "
                "table has room for"
            )
        used = block_tables[r, : -(-context_len // block_size)].tolist()
        wrong = [block for block in used if not 0 <= block < num_blocks]
        if wrong:
            raise ValueError(
                f"block_tables[{r}] names block {wrong[0]}; the cache has blocks 0 to "
                f"{num_blocks - 1}"
            )
