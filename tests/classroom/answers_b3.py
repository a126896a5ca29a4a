"""Answers to the exercises of B3: right ones in several styles, and wrong ones of typical kinds.

The wrong ones are right kernels with one thing changed, which `BUG` names.
"""

import torch

from kernels.runtime import tl, triton


@triton.jit
def _one_block(
    q, k, v, lens, out, scale,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BUG: tl.constexpr,
):  # fmt: skip
    """Keys as columns: [dims, slots]."""
    r, h = tl.program_id(0), tl.program_id(1)
    d, n = tl.arange(0, P), tl.arange(0, N)
    q_at = q + (r * H + h) * D + d
    query = tl.load(q_at, mask=d < D, other=0.0)
    length = tl.load(lens + r)
    if BUG == "one slot too many":
        length += 1
    if BUG == "one slot too few":
        length -= 1
    if BUG == "no mask":
        length += 1000
    owner = r
    if BUG == "block of request 0":
        owner = 0
    row = (owner * N + n) * H + h
    if BUG == "layout":
        row = (owner * H + h) * N + n
    at = row[None, :] * D + d[:, None]
    there = (n < length)[None, :] & (d < D)[:, None]
    if BUG == "padded dims":
        there = (n < length)[None, :] & (d < P)[:, None]
        query = tl.load(q_at)
    scores = tl.sum(tl.load(k + at, mask=there, other=0.0) * query[:, None], 0)
    if BUG != "no scale":
        scores = scores * scale
    if BUG != "free slots count":
        scores = tl.where(n < length, scores, -1e30)
    top = tl.max(scores, 0)
    if BUG == "no largest":
        top = 0.0
    weights = tl.exp(scores - top)
    total = tl.sum(weights, 0)
    if BUG == "not divided":
        total = 1.0
    values = tl.load(v + at, mask=there, other=0.0)
    if BUG == "values are keys":
        values = tl.load(k + at, mask=there, other=0.0)
    result = tl.sum(values * (weights / total)[None, :], 1)
    if BUG != "half is stored":
        tl.store(out + (r * H + h) * D + d, result, mask=d < D)
    if BUG == "half is stored":
        tl.store(out + (r * H + h) * D + d, result, mask=d < D // 2)


def _one_block_launch(q, k_blocks, v_blocks, context_lens, scale, bug):
    num_requests, heads, head_dim = q.shape
    out = torch.full_like(q, float("nan"))
    _one_block[(num_requests, heads)](
        q, k_blocks, v_blocks, context_lens, out, scale, heads, head_dim,
        triton.next_power_of_2(head_dim), k_blocks.shape[1], bug,
    )  # fmt: skip
    return out


def one_block_columns(q, k_blocks, v_blocks, context_lens, scale):
    """Right: keys as columns, a large negative number for -inf."""
    return _one_block_launch(q, k_blocks, v_blocks, context_lens, scale, "")


@triton.jit
def _key_by_key(q, k, v, lens, out, scale, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, N):
    r = tl.program_id(0)
    h = tl.program_id(1)
    d = tl.arange(0, P)
    query = tl.load(q + (r * H + h) * D + d, mask=d < D, other=0.0) * scale
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([P], tl.float32)
    for slot in range(0, tl.load(lens + r)):
        at = ((r * N + slot) * H + h) * D + d
        score = tl.sum(query * tl.load(k + at, mask=d < D, other=0.0), 0)
        higher = tl.maximum(top, score)
        total = total * tl.exp(top - higher) + tl.exp(score - higher)
        acc = acc * tl.exp(top - higher)
        acc += tl.exp(score - higher) * tl.load(v + at, mask=d < D, other=0.0)
        top = higher
    tl.store(out + (r * H + h) * D + d, acc / total, mask=d < D)


def one_block_key_by_key(q, k_blocks, v_blocks, context_lens, scale):
    """Right: one key after another, and a grid of its own form."""
    out = torch.empty_like(q)
    heads, head_dim = q.shape[1:]
    grid = lambda meta: (len(q), meta["H"])  # noqa: E731
    padded = triton.next_power_of_2(head_dim)
    _key_by_key[grid](
        q, k_blocks, v_blocks, context_lens, out, scale,
        H=heads, D=head_dim, P=padded, N=k_blocks.shape[1],
    )  # fmt: skip
    return out


@triton.jit
def _walk(
    query, k, v, table, first, last, length, kv_head, scale,
    KV: tl.constexpr, D: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BUG: tl.constexpr,
):  # fmt: skip
    """Blocks `first` to `last` of a table: mean (not divided), total, largest score."""
    d = tl.arange(0, P)
    slots = tl.arange(0, N)
    top = -float("inf")
    total = 0.0
    acc = tl.zeros([P], tl.float32)
    for i in range(first, last):
        entry = i
        if BUG == "table one too far":
            entry = i + 1
        block = tl.load(table + entry)
        if BUG == "no table":
            block = i
        keys_at = ((block * N + slots) * KV + kv_head)[:, None] * D + d[None, :]
        tokens = i * N + slots
        seen = tokens < length
        if BUG == "one slot too many":
            seen = tokens <= length
        if BUG == "one slot too few":
            seen = tokens < length - 1
        if BUG == "no mask":
            seen = tokens >= 0
        if BUG == "mask in the block":
            seen = slots < length
        here = seen[:, None] & (d < D)[None, :]
        keys = tl.load(k + keys_at, mask=here, other=0.0).to(tl.float32)
        scores = tl.sum(keys * query[None, :], 1)
        if BUG != "no scale":
            scores *= scale
        if BUG != "free slots count":
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        if BUG == "own largest":
            new_top = tl.max(scores, 0)
        if BUG == "no largest":
            new_top = 0.0
        shrink = tl.exp(top - new_top)
        p = tl.exp(scores - new_top)
        values = tl.load(v + keys_at, mask=here, other=0.0).to(tl.float32)
        added = tl.sum(p[:, None] * values, 0)
        mean_shrink = shrink
        if BUG == "mean not rescaled" or BUG == "not rescaled":
            mean_shrink = 1.0
        if BUG == "total not rescaled" or BUG == "not rescaled":
            shrink = 1.0
        if BUG == "no largest" or BUG == "own largest":
            mean_shrink = 1.0
            shrink = 1.0
        acc = acc * mean_shrink + added
        if BUG == "last block only":
            acc = added
        total = total * shrink + tl.sum(p, 0)
        if BUG == "last block only":
            total = tl.sum(p, 0)
        top = new_top
    return acc, total, top


@triton.jit
def _decode(
    q, k, v, tables, lens, out, scale, width,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BUG: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0)
    h = tl.program_id(1)
    d = tl.arange(0, P)
    query = tl.load(q + (r * H + h) * D + d, mask=d < D, other=0.0)
    length = tl.load(lens + r)
    blocks = (length + N - 1) // N
    if BUG == "first block only":
        blocks = 1
    if BUG == "last block missing":
        blocks = length // N
    if BUG == "padding of the table":
        blocks = width
        length = width * N
    owner = r
    if BUG == "table of request 0":
        owner = 0
    acc, total, _ = _walk(
        query, k, v, tables + owner * width, 0, blocks, length, h, scale, H, D, P, N, BUG
    )
    if BUG == "not divided":
        total = 1.0
    tl.store(out + (r * H + h) * D + d, acc / total, mask=d < D)


def _decode_launch(q, k_cache, v_cache, block_tables, context_lens, scale, bug):
    num_requests, heads, head_dim = q.shape
    out = torch.full_like(q, float("nan"))
    _decode[(num_requests, heads)](
        q, k_cache, v_cache, block_tables, context_lens, out, scale, block_tables.shape[1],
        heads, head_dim, triton.next_power_of_2(head_dim), k_cache.shape[1], bug,
    )  # fmt: skip
    return out


def block_table_with_helper(q, k_cache, v_cache, block_tables, context_lens, scale):
    """Right: the walk over the blocks is a kernel's function of its own."""
    return _decode_launch(q, k_cache, v_cache, block_tables, context_lens, scale, "")


@triton.jit
def _two_passes(
    q, k, v, tables, lens, out, scale, width,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Once over the keys for the largest score, a second time for the sums."""
    r = tl.program_id(0)
    h = tl.program_id(1)
    d = tl.arange(0, P)
    s = tl.arange(0, N)
    query = tl.load(q + (r * H + h) * D + d, mask=d < D, other=0.0) * scale
    length = tl.load(lens + r)
    top = float("-inf")
    for i in range(0, tl.cdiv(length, N)):
        at = ((tl.load(tables + r * width + i) * N + s) * H + h)[:, None] * D + d[None, :]
        seen = i * N + s < length
        keys = tl.load(k + at, mask=seen[:, None] & (d < D)[None, :], other=0.0)
        scores = tl.where(seen, tl.sum(keys * query[None, :], 1), float("-inf"))
        top = tl.maximum(top, tl.max(scores, 0))
    total = 0.0
    acc = tl.zeros([P], tl.float32)
    for i in range(0, tl.cdiv(length, N)):
        at = ((tl.load(tables + r * width + i) * N + s) * H + h)[:, None] * D + d[None, :]
        seen = i * N + s < length
        mask = seen[:, None] & (d < D)[None, :]
        scores = tl.sum(tl.load(k + at, mask=mask, other=0.0) * query[None, :], 1)
        weights = tl.where(seen, tl.exp(scores - top), 0.0)
        acc += tl.sum(weights[:, None] * tl.load(v + at, mask=mask, other=0.0), 0)
        total += tl.sum(weights, 0)
    tl.store(out + (r * H + h) * D + d, acc / total, mask=d < D)


def block_table_two_passes(q, k_cache, v_cache, block_tables, context_lens, scale):
    """Right: no online softmax, the keys are read twice."""
    num_requests, heads, head_dim = q.shape
    out = torch.empty_like(q)
    padded = triton.next_power_of_2(head_dim)
    _two_passes[(num_requests, heads)](
        q, k_cache, v_cache, block_tables, context_lens, out, scale, block_tables.shape[1],
        heads, head_dim, padded, k_cache.shape[1],
    )  # fmt: skip
    return out


@triton.jit
def _paged(
    q, k, v, tables, requests, seen, out, scale, width,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BUG: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    h = tl.program_id(1)
    d = tl.arange(0, P)
    query = tl.load(q + (t * H + h) * D + d, mask=d < D, other=0.0).to(tl.float32)
    length = tl.load(seen + t)
    blocks = tl.cdiv(length, N)
    if BUG == "first block only":
        blocks = 1
    kv = h // (H // KV)
    if BUG == "heads by remainder":
        kv = h % KV
    if BUG == "head 0":
        kv = 0
    table = tables + tl.load(requests + t) * width
    acc, total, _ = _walk(query, k, v, table, 0, blocks, length, kv, scale, KV, D, P, N, BUG)
    tl.store(out + (t * H + h) * D + d, acc / total, mask=d < D)


def _paged_launch(
    q, k_cache, v_cache, block_tables, context_lens, query_start_loc, scale, window, out, bug
):
    if window is not None and bug != "window ignored":
        raise ValueError("no sliding window here")
    if bug != "slice":
        q = q.contiguous()
    if out is None or bug == "out ignored":
        out = torch.empty_like(q)
    num_tokens, heads, head_dim = q.shape
    requests, seen = [], []
    starts = query_start_loc.tolist()
    for r, context in enumerate(context_lens.tolist()):
        new = starts[r + 1] - starts[r]
        for offset in range(new):
            requests.append(0 if bug == "table of request 0" else r)
            position = context - new + offset
            if bug == "not causal":
                position = context - 1
            if bug == "computed tokens forgotten":
                position = offset
            seen.append(position + 1)
    if bug == "one token a request":
        requests = [min(t, len(context_lens) - 1) for t in range(num_tokens)]
        seen = context_lens[requests].tolist()
    ints = {"dtype": torch.int32, "device": q.device}
    _paged[(num_tokens, heads)](
        q, k_cache, v_cache, block_tables, torch.tensor(requests, **ints),
        torch.tensor(seen, **ints), out, scale, block_tables.shape[1], heads, k_cache.shape[2],
        head_dim, triton.next_power_of_2(head_dim), k_cache.shape[1], bug,
    )  # fmt: skip
    return out


def paged_with_lists(
    q, k_cache, v_cache, block_tables, context_lens, query_start_loc, *,
    scale, sliding_window=None, out=None,
):  # fmt: skip
    """Right: tokens are listed in Python, the walk is a kernel's function of its own."""
    tables = (block_tables, context_lens, query_start_loc)
    return _paged_launch(q, k_cache, v_cache, *tables, scale, sliding_window, out, "")


@triton.jit
def _groups(
    q, k, v, tables, lens, starts, out, scale, width, num_requests, WINDOW,
    KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program a token and KV head; the request is searched for; a window is kept."""
    t = tl.program_id(0)
    kv = tl.program_id(1)
    r = 0
    while tl.load(starts + r + 1) <= t:
        r += 1
    position = tl.load(lens + r) - tl.load(starts + r + 1) + t
    d = tl.arange(0, P)
    s = tl.arange(0, N)
    for g in range(G):
        row = ((t * KV + kv) * G + g) * D + d
        query = tl.load(q + row, mask=d < D, other=0.0).to(tl.float32) * scale
        top = float("-inf")
        total = 0.0
        acc = tl.zeros([P], tl.float32)
        for i in range(tl.maximum(position - WINDOW + 1, 0) // N, position // N + 1):
            token = i * N + s
            seen = (token <= position) & (token > position - WINDOW)
            at = ((tl.load(tables + r * width + i) * N + s) * KV + kv)[:, None] * D + d[None, :]
            mask = seen[:, None] & (d < D)[None, :]
            scores = tl.sum(
                tl.load(k + at, mask=mask, other=0.0).to(tl.float32) * query[None, :], 1
            )
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 0))
            p = tl.exp(scores - higher)
            keep = tl.exp(top - higher)
            values = tl.load(v + at, mask=mask, other=0.0).to(tl.float32)
            acc = keep * acc + tl.sum(p[:, None] * values, 0)
            total = keep * total + tl.sum(p, 0)
            top = higher
        tl.store(out + row, acc / total, mask=d < D)


def paged_by_groups(
    q, k_cache, v_cache, block_tables, context_lens, query_start_loc, *,
    scale, sliding_window=None, out=None,
):  # fmt: skip
    """Right: a program for each KV head, everything is found out in the kernel, with a window."""
    q = q.contiguous()
    if out is None:
        out = torch.empty_like(q)
    num_tokens, heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    _groups[(num_tokens, kv_heads)](
        q, k_cache, v_cache, block_tables, context_lens, query_start_loc, out, scale,
        block_tables.shape[1], len(context_lens), sliding_window or 10**9, KV=kv_heads,
        G=heads // kv_heads, D=head_dim, P=triton.next_power_of_2(head_dim), N=k_cache.shape[1],
    )  # fmt: skip
    return out


@triton.jit
def _parts(
    q, k, v, tables, lens, means, lses, scale, width, S,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BUG: tl.constexpr,
):  # fmt: skip
    r, h, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, P)
    query = tl.load(q + (r * H + h) * D + d, mask=d < D, other=0.0)
    length = tl.load(lens + r)
    blocks = tl.cdiv(length, N)
    share = (blocks + S - 1) // S
    if BUG == "blocks are lost":
        share = blocks // S
    end = tl.minimum(share * (s + 1), blocks)
    if BUG == "no end":
        end = share * (s + 1)
    acc, total, top = _walk(
        query, k, v, tables + r * width, share * s, end, length, h, scale, H, D, P, N, BUG
    )
    place = (r * H + h) * S + s
    if BUG != "parts not divided" and BUG != "empty parts":
        acc = acc / tl.where(total > 0, total, 1.0)
    if BUG == "empty parts":
        acc = acc / total
    lse = top + tl.log(tl.where(total > 0, total, 1.0))
    if BUG == "totals only":
        lse = tl.log(total)
    if BUG == "largest only":
        lse = top
    if BUG == "no logarithm":
        lse = top + total
    tl.store(means + place * D + d, acc, mask=d < D)
    tl.store(lses + place, lse)


@triton.jit
def _unite(
    means, lses, out, S, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    BUG: tl.constexpr,
):  # fmt: skip
    """All parts at once, as a rectangle [parts, dims]."""
    row = tl.program_id(0) * H + tl.program_id(1)
    d, s = tl.arange(0, P), tl.arange(0, Q)
    lse = tl.load(lses + row * S + s, mask=s < S, other=float("-inf"))
    weights = tl.exp(lse - tl.max(lse, 0))
    if BUG == "no largest in the combine":
        weights = tl.exp(lse)
    if BUG == "equal weights":
        weights = tl.where(lse > float("-inf"), 1.0, 0.0)
    if BUG == "first part only":
        weights = tl.where(s == 0, 1.0, 0.0)
    total = tl.sum(weights, 0)
    if BUG == "parts added up":
        total = 1.0
    mask = (s < S)[:, None] & (d < D)[None, :]
    part = tl.load(means + (row * S + s)[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(out + row * D + d, tl.sum(part * weights[:, None], 0) / total, mask=d < D)


def _split_launch(q, k_cache, v_cache, block_tables, context_lens, scale, num_splits, bug):
    num_requests, heads, head_dim = q.shape
    means = torch.full((num_requests, heads, num_splits, head_dim), float("nan"), device=q.device)
    lses = torch.full((num_requests, heads, num_splits), float("nan"), device=q.device)
    out = torch.full_like(q, float("nan"))
    padded = triton.next_power_of_2(head_dim)
    _parts[(num_requests, heads, num_splits)](
        q, k_cache, v_cache, block_tables, context_lens, means, lses, scale,
        block_tables.shape[1], num_splits, heads, head_dim, padded, k_cache.shape[1], bug,
    )  # fmt: skip
    rows = triton.next_power_of_2(num_splits)
    grid = (num_requests, heads)
    _unite[grid](means, lses, out, num_splits, heads, head_dim, padded, rows, bug)
    return out


def split_rectangle(q, k_cache, v_cache, block_tables, context_lens, scale, num_splits):
    """Right: the combine takes all parts at once."""
    return _split_launch(q, k_cache, v_cache, block_tables, context_lens, scale, num_splits, "")


@triton.jit
def _interleaved(
    q, k, v, tables, lens, sums, tops, scale, width, S,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Split s takes the blocks s, s + S, s + 2 S, ...; the mean is left undivided."""
    r, h, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d, s = tl.arange(0, P), tl.arange(0, N)
    query = tl.load(q + (r * H + h) * D + d, mask=d < D, other=0.0) * scale
    length = tl.load(lens + r)
    top = -1e30
    total = 0.0
    acc = tl.zeros([P], tl.float32)
    for i in range(split, tl.cdiv(length, N), S):
        at = ((tl.load(tables + r * width + i) * N + s) * H + h)[:, None] * D + d[None, :]
        seen = i * N + s < length
        mask = seen[:, None] & (d < D)[None, :]
        scores = tl.sum(tl.load(k + at, mask=mask, other=0.0) * query[None, :], 1)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        p = tl.exp(scores - higher)
        acc = acc * tl.exp(top - higher)
        acc += tl.sum(p[:, None] * tl.load(v + at, mask=mask, other=0.0), 0)
        total = total * tl.exp(top - higher) + tl.sum(p, 0)
        top = higher
    place = (r * H + h) * S + split
    tl.store(sums + place * (D + 1) + d, acc, mask=d < D)
    tl.store(sums + place * (D + 1) + D, total)
    tl.store(tops + place, top)


@triton.jit
def _unite_sums(sums, tops, out, S, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    row = tl.program_id(0) * H + tl.program_id(1)
    d = tl.arange(0, P)
    top = tl.load(tops + row * S)
    for s in range(1, S):
        top = tl.maximum(top, tl.load(tops + row * S + s))
    acc = tl.zeros([P], tl.float32)
    total = 0.0
    for s in range(0, S):
        weight = tl.exp(tl.load(tops + row * S + s) - top)
        acc += weight * tl.load(sums + (row * S + s) * (D + 1) + d, mask=d < D, other=0.0)
        total += weight * tl.load(sums + (row * S + s) * (D + 1) + D)
    tl.store(out + row * D + d, acc / total, mask=d < D)


def split_interleaved(q, k_cache, v_cache, block_tables, context_lens, scale, num_splits):
    """Right: undivided sums with their largest scores instead of means with their lse."""
    num_requests, heads, head_dim = q.shape
    sums = q.new_empty(num_requests, heads, num_splits, head_dim + 1)
    tops = q.new_empty(num_requests, heads, num_splits)
    out = torch.empty_like(q)
    padded = triton.next_power_of_2(head_dim)
    _interleaved[(num_requests, heads, num_splits)](
        q, k_cache, v_cache, block_tables, context_lens, sums, tops, scale,
        block_tables.shape[1], num_splits, heads, head_dim, padded, k_cache.shape[1],
    )  # fmt: skip
    _unite_sums[(num_requests, heads)](sums, tops, out, num_splits, heads, head_dim, padded)
    return out


def _wrong(bug, launch):
    """An answer with this bug; its name is the bug's."""

    def one_block(q, k_blocks, v_blocks, context_lens, scale):
        return _one_block_launch(q, k_blocks, v_blocks, context_lens, scale, bug)

    def block_table(q, k_cache, v_cache, block_tables, context_lens, scale):
        return _decode_launch(q, k_cache, v_cache, block_tables, context_lens, scale, bug)

    def paged(*tensors, scale, sliding_window=None, out=None):
        return _paged_launch(*tensors, scale, sliding_window, out, bug)

    def split(q, k_cache, v_cache, block_tables, context_lens, scale, num_splits):
        tables = (block_tables, context_lens, scale, num_splits)
        return _split_launch(q, k_cache, v_cache, *tables, bug)

    answer = {"one_block": one_block, "block_table": block_table, "paged": paged, "split": split}
    chosen = answer[launch]
    chosen.bug = bug
    return chosen


def in_pytorch(
    q, k_cache, v_cache, block_tables, context_lens, query_start_loc, *,
    scale, sliding_window=None, out=None,
):  # fmt: skip
    """Wrong: right numbers, but no kernel."""
    return torch.zeros_like(q)


def returns_nothing(q, k_blocks, v_blocks, context_lens, scale):
    """Wrong: the result stays in `out`."""
    _one_block_launch(q, k_blocks, v_blocks, context_lens, scale, "")


def error_in_the_kernel(q, k_cache, v_cache, block_tables, context_lens, scale):
    """Wrong: a name that is not there."""
    out = torch.empty_like(q)
    _broken[(1,)](q, out)
    return out


@triton.jit
def _broken(q, out):
    tl.store(out, tl.load(q) + undefined_name)  # noqa: F821


RIGHT = {
    "B3.1": [one_block_columns, one_block_key_by_key],
    "B3.2": [block_table_with_helper, block_table_two_passes],
    "B3.3": [paged_with_lists, paged_by_groups],
    "B3.4": [split_rectangle, split_interleaved],
}

#: By exercise and bug: words of the hint that fits.
_SHARED_BUGS = {
    "no scale": "not multiplied by scale",
    "one slot too many": "one slot too wide",
    "one slot too few": "sees itself",
    "free slots count": "exp(0) is not 0",
    "no largest": "subtract the largest",
    "not divided": "divide by the sum",
}
_DECODE_BUGS = {
    **_SHARED_BUGS,
    "not rescaled": "multiply total and mean",
    "mean not rescaled": "the mean is not",
    "total not rescaled": "the total is not",
    "own largest": "own largest score",
    "first block only": "Only the first block",
    "last block only": "Only the last block",
    "last block missing": "round the number of blocks up",
    "no mask": "i * BLOCK_SIZE + s",
    "mask in the block": "i * BLOCK_SIZE + s",
    "padding of the table": "padding",
    "no table": "neither block i of the cache",
    "table one too far": "nor entry i + 1",
    "table of request 0": "block table of request 0",
}
BUGS = {
    "B3.1": {
        **_SHARED_BUGS,
        "no mask": "mask slots < context_len",
        "block of request 0": "block of request 0",
        "padded dims": "mask dims < HEAD_DIM",
        "layout": "Look at the offsets",
        "values are keys": "weighted sum",
        "half is stored": "full of NaN before",
    },
    "B3.2": _DECODE_BUGS,
    "B3.3": {
        "heads by remainder": "not head % NUM_KV_HEADS",
        "head 0": "All heads read KV head 0",
        "not causal": "what comes after it",
        "computed tokens forgotten": "not the first",
        "one token a request": "what comes after it",
        "table of request 0": "block table of request 0",
        "first block only": "Only the first block",
        "not rescaled": "multiply total and mean",
        "one slot too many": "one slot too wide",
        "no scale": "not multiplied by scale",
        "slice": "q.contiguous()",
        "out ignored": "torch.empty_like(q) if out is None",
        "window ignored": "sliding_window is not None",
    },
    "B3.4": {
        "equal weights": "All parts count the same",
        "totals only": "by their totals only",
        "largest only": "by their largest scores only",
        "no logarithm": "largest + log(total)",
        "parts added up": "added up",
        "parts not divided": "divide by the sum",
        "first part only": "Only the first part",
        "blocks are lost": "shared out evenly",
        "no end": "tl.minimum",
        "empty parts": "Their lse is -inf",
        "no largest in the combine": "subtract the largest",
        "not rescaled": "multiply total and mean",
    },
}
_LAUNCH = {"B3.1": "one_block", "B3.2": "block_table", "B3.3": "paged", "B3.4": "split"}
WRONG = {e: [_wrong(bug, _LAUNCH[e]) for bug in bugs] for e, bugs in BUGS.items()}
WRONG["B3.1"].append(returns_nothing)
WRONG["B3.2"].append(error_in_the_kernel)
WRONG["B3.3"].append(in_pytorch)
