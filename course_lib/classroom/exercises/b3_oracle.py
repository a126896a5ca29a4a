"""Batches over a paged cache for the checks of B3, and attention in float64 by a plain expression.

Whatever is no token of a request is poisoned: unused blocks, the end of a last block, block 0 (to
which the padding of a block table points) and the memory around the tensors. There the values are
large, and the keys like any other, so that a result tells which of them were read.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

POISON = 1e4
GUARD = 1 << 14  # elements before and behind a tensor, where a wrong offset reads poison

#: Scores `[heads, n]`, values `[n, heads, head_dim]` and the block size give `[heads, head_dim]`.
Mix = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """A step by the contract of `kernels.paged_attention`."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_start_loc: torch.Tensor
    scale: float

    @property
    def contract(self) -> tuple[torch.Tensor, ...]:
        """The positional arguments of `kernels.paged_attention`."""
        tables = (self.block_tables, self.context_lens, self.query_start_loc)
        return (self.q, self.k_cache, self.v_cache, *tables)

    def described(self) -> str:
        """What a student needs to know about it."""
        query_lens = self.query_start_loc.diff().tolist()
        queries = "" if set(query_lens) == {1} else f"query tokens {query_lens}, "
        heads, kv_heads = self.q.shape[1], self.k_cache.shape[2]
        shared = "" if heads == kv_heads else f" on {kv_heads} KV heads"
        return (
            f"{queries}contexts of {self.context_lens.tolist()} tokens, blocks of "
            f"{self.k_cache.shape[1]}, {heads} heads{shared}, head_dim {self.q.shape[2]}"
        )

    def place(self, where: torch.Tensor) -> str:
        """The first true element of a mask over the result, in words."""
        token, head, dim = (int(i) for i in torch.nonzero(where)[0])
        starts = self.query_start_loc.tolist()
        request = max(r for r, start in enumerate(starts[:-1]) if start <= token)
        query_len = starts[request + 1] - starts[request]
        name = f"query token {token - starts[request]}, " if query_len > 1 else ""
        return f"request {request}, {name}head {head}, element {dim}"


def make_batch(
    rng: random.Random,
    lens: Sequence[tuple[int, int]],
    *,
    block_size: int,
    num_kv_heads: int,
    group: int = 1,
    head_dim: int = 16,
    strength: float = 2.0,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Requests of (query tokens, context with them), their blocks in random order.

    Args:
        strength: of the queries: the larger, the larger the scores.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    num_blocks = [-(-context // block_size) for _, context in lens]
    order = rng.sample(range(1, sum(num_blocks) + 3), sum(num_blocks))
    tables = torch.zeros(len(lens), max(num_blocks) + 1, dtype=torch.int32)
    shape = (2, sum(num_blocks) + 3, block_size, num_kv_heads, head_dim)
    caches = torch.randn(shape, generator=generator)
    caches[1] *= POISON
    for request, (_, context) in enumerate(lens):
        for index in range(num_blocks[request]):
            block, filled = order.pop(), min(block_size, context - index * block_size)
            tables[request, index] = block
            caches[1, block, :filled] /= POISON
    starts = torch.tensor([0, *(query for query, _ in lens)]).cumsum(0)
    q = strength * torch.randn(int(starts[-1]), num_kv_heads * group, head_dim, generator=generator)
    return Batch(
        _guarded(q.to(dtype), POISON).to(device),
        _guarded(caches[0].to(dtype), POISON).to(device),
        _guarded(caches[1].to(dtype), POISON).to(device),
        _guarded(tables, 0).to(device),
        _guarded(torch.tensor([context for _, context in lens], dtype=torch.int32), 1).to(device),
        _guarded(starts.int(), 0).to(device),
        scale=0.7 * head_dim**-0.5,  # not the usual one, so that ignoring it shows
    )


def _guarded(tensor: torch.Tensor, around: float) -> torch.Tensor:
    memory = torch.full((GUARD + tensor.numel() + GUARD,), around, dtype=tensor.dtype)
    inner = memory[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def softmax_mean(scores: torch.Tensor, values: torch.Tensor, block_size: int) -> torch.Tensor:
    """What attention is: the mean of the values, weighted by the softmax of the scores."""
    return torch.einsum("hn,nhd->hd", scores.softmax(dim=-1), values)


def attend(
    batch: Batch,
    *,
    scale: float | None = None,
    seen: Callable[[int, int, int], int] | None = None,
    kv_head: Callable[[int, int, int], int] | None = None,
    table: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    mix: Mix = softmax_mean,
    window: int | None = None,
) -> torch.Tensor:
    """Attention in float64, or what it becomes when one of its steps is another.

    Args:
        scale: in place of the batch's.
        seen: keys that a token sees, from its position, its context and the number of its request's
            query tokens; by default all up to itself.
        kv_head: of a head, from the number of heads and KV heads.
        table: blocks of a request, from all block tables and its number.
        mix: scores and values to a result.
        window: keys that are seen at most.

    Returns:
        `[num_tokens, num_heads, head_dim]` float64, on the CPU.
    """
    q, k_cache, v_cache = (t.double().cpu() for t in (batch.q, batch.k_cache, batch.v_cache))
    heads, kv_heads, block_size = q.shape[1], k_cache.shape[2], k_cache.shape[1]
    tables, starts = batch.block_tables.long().cpu(), batch.query_start_loc.tolist()
    shared = [
        kv_head(h, heads, kv_heads) if kv_head else h // (heads // kv_heads) for h in range(heads)
    ]
    out = torch.zeros_like(q)
    for request, context in enumerate(batch.context_lens.tolist()):
        blocks = table(tables, request) if table else tables[request]
        keys = k_cache[blocks].flatten(0, 1)[:, shared]
        values = v_cache[blocks].flatten(0, 1)[:, shared]
        query_len = starts[request + 1] - starts[request]
        for offset in range(query_len):
            token, position = starts[request] + offset, context - query_len + offset
            end = seen(position, context, query_len) if seen else position + 1
            first = 0 if window is None else max(0, end - window)
            visible = slice(first, end)
            scores = torch.einsum("nhd,hd->hn", keys[visible], q[token])
            scores *= batch.scale if scale is None else scale
            out[token] = mix(scores, values[visible], block_size)
    return out
