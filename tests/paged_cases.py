"""Random batches over a paged KV cache, and attention by a plain dense expression for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

#: Large and finite: shows where a masked, unused or foreign place is read with a weight above 0.
POISON = 1e4


@dataclass
class PagedCase:
    """A step's inputs by the contract of `kernels.paged_attention`, and the same contiguous."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_start_loc: torch.Tensor
    keys: list[torch.Tensor]  # a request's [context_len, num_kv_heads, head_dim]
    values: list[torch.Tensor]
    slot_mapping: torch.Tensor  # of this step's tokens
    block_size: int
    sliding_window: int | None

    @property
    def scale(self) -> float:
        """Not the usual one, so that ignoring it shows."""
        return 0.7 * self.q.shape[-1] ** -0.5

    @property
    def contract(self) -> tuple[torch.Tensor, ...]:
        """The positional arguments of `kernels.paged_attention`."""
        tables = (self.block_tables, self.context_lens, self.query_start_loc)
        return (self.q, self.k_cache, self.v_cache, *tables)


def make_case(
    lens: list[tuple[int, int]],
    *,
    block_size: int = 8,
    num_kv_heads: int = 2,
    queries_per_kv: int = 2,
    head_dim: int = 16,
    sliding_window: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    poison: float = POISON,
) -> PagedCase:
    """A batch of requests with these (query tokens, tokens before them).

    Pages lie in random order. Everything that is no token of a request is `poison`: unused pages,
    the end of a last page, the null block that padding of the block tables points to. A request
    without query tokens is an empty slot: it has a context, but nothing of it is asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    num_heads = num_kv_heads * queries_per_kv
    query_lens = [query for query, _ in lens]
    context_lens = [query + before for query, before in lens]
    pages = [-(-length // block_size) for length in context_lens]
    order = (torch.randperm(sum(pages) + 2, generator=generator) + 1).tolist()
    tables = np.zeros((len(lens), max(pages) + seed % 2), dtype=np.int32)
    cache_shape = (len(order) + 1, block_size, num_kv_heads, head_dim)
    k_cache = torch.full(cache_shape, poison, dtype=dtype)
    v_cache = torch.full(cache_shape, poison, dtype=dtype)
    keys, values, slots = [], [], []
    for row, length in enumerate(context_lens):
        blocks = [order.pop() for _ in range(pages[row])]
        tables[row, : len(blocks)] = blocks
        k, v = torch.randn(2, length, num_kv_heads, head_dim, generator=generator, dtype=dtype)
        for position in range(length):
            place = (blocks[position // block_size], position % block_size)
            k_cache[place], v_cache[place] = k[position], v[position]
            if position >= length - query_lens[row]:
                slots.append(place[0] * block_size + place[1])
        keys.append(k)
        values.append(v)
    q = torch.randn(sum(query_lens), num_heads, head_dim, generator=generator, dtype=dtype)
    return PagedCase(
        q=q.to(device),
        k_cache=k_cache.to(device),
        v_cache=v_cache.to(device),
        block_tables=torch.from_numpy(tables).to(device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        query_start_loc=torch.tensor(np.cumsum([0, *query_lens]), dtype=torch.int32, device=device),
        keys=keys,
        values=values,
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        block_size=block_size,
        sliding_window=sliding_window,
    )


@st.composite
def paged_cases(
    draw: st.DrawFn,
    *,
    block_sizes: Sequence[int] = (1, 4, 5, 8, 16),
    head_dims: Sequence[int] = (8, 20, 24, 40, 56, 64),
    empty_slots: bool = False,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
    device: str = "cpu",
    poison: float = POISON,
) -> PagedCase:
    """Mixed prefills, chunks and decodes; contexts at and around block boundaries."""
    block_size = draw(st.sampled_from(block_sizes))
    before = st.integers(0, 20) | st.builds(
        lambda blocks, shift: max(0, blocks * block_size + shift),
        st.integers(0, 64 // block_size),
        st.integers(-1, 1),
    )
    query = st.just(1) | st.integers(1, 40)
    if empty_slots:
        query |= st.just(0)
    return make_case(
        draw(st.lists(st.tuples(query, before), min_size=1, max_size=6)),
        block_size=block_size,
        num_kv_heads=draw(st.integers(1, 3)),
        queries_per_kv=draw(st.integers(1, 8)),
        head_dim=draw(st.sampled_from(head_dims)),
        sliding_window=draw(st.none() | st.integers(1, 50)),
        seed=draw(st.integers(0, 1000)),
        dtype=draw(st.sampled_from(dtypes)),
        device=device,
        poison=poison,
    )


def dense_attention(case: PagedCase) -> torch.Tensor:
    """softmax(q k^T * scale) v for every query token and head by itself, on contiguous keys.

    In float64, on the CPU.
    """
    q = case.q.double().cpu()
    out = torch.empty_like(q)
    queries_per_kv = q.shape[1] // case.k_cache.shape[2]
    row = 0
    for keys, values, (start, end) in zip(
        case.keys, case.values, case.query_start_loc.unfold(0, 2, 1).tolist(), strict=True
    ):
        for last in range(len(keys) - (end - start), len(keys)):
            first = 0 if case.sliding_window is None else max(0, last + 1 - case.sliding_window)
            for head in range(q.shape[1]):
                seen = slice(first, last + 1), head // queries_per_kv
                probs = (keys[seen].double() @ q[row, head] * case.scale).softmax(-1)
                out[row, head] = probs @ values[seen].double()
            row += 1
    return out
