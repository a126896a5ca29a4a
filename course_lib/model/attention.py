"""How attention reads the paged KV cache: one interface, one backend a kind of device.

A backend plans once a step and then serves every layer from that plan. `TorchAttention` runs
anywhere; `FunctionAttention` runs any function with the contract of
`kernels.paged_attention`, a student's own among them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from kernels.kv_cache import write_kv_cache


@dataclass(frozen=True)
class AttentionMetadata:
    """Where each request's tokens are, in host memory. See the contract of `paged_attention`."""

    block_tables: np.ndarray  # [num_requests, max_blocks] int32
    context_lens: np.ndarray  # [num_requests] int32, this step's tokens included
    query_start_loc: np.ndarray  # [num_requests + 1] int32
    slot_mapping: np.ndarray  # [num_tokens] int64: block * block_size + offset of each token
    block_size: int


class AttentionBackend(Protocol):
    """What the decoder needs of a backend."""

    name: str

    def plan(self, metadata: AttentionMetadata) -> Any:
        """Prepare what all layers of a step share."""
        ...

    def write(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: Any,
    ) -> None:
        """Store this step's keys and values, `[num_tokens, num_kv_heads, head_dim]`, in place."""
        ...

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: Any,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Attention output, `[num_tokens, num_heads, head_dim]` like `q`."""
        ...


@dataclass
class _Group:
    """Requests of one step with a similar number of query tokens, padded to a rectangle."""

    query_rows: torch.Tensor  # [num_requests * query_len] rows of q, padding repeats the last
    blocks: torch.Tensor  # [num_requests * num_blocks]
    num_requests: int
    query_len: int
    positions: torch.Tensor  # [num_requests, query_len] of each query token in its sequence
    real: torch.Tensor  # [num_requests * query_len] bool, False for padding
    biases: dict[int | None, torch.Tensor]  # sliding window -> additive mask


@dataclass
class _TorchPlan:
    slot_mapping: torch.Tensor
    groups: list[_Group]


class TorchAttention:
    """Paged attention in PyTorch operations, batched across requests.

    Requests are grouped by the power of two that their number of query tokens falls under, so that
    padding at most doubles the work and a step has a handful of groups: the decodes, and a few of
    chunks. Each group gathers its blocks and runs one `scaled_dot_product_attention`, in which the
    query heads that share a KV head are packed as further query rows.
    """

    name = "torch"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def plan(self, metadata: AttentionMetadata) -> _TorchPlan:
        """Group the requests and build their gather indices."""
        query_lens = np.diff(metadata.query_start_loc)
        size_class = np.ceil(np.log2(query_lens)).astype(np.int64)
        groups = [
            self._group(metadata, np.flatnonzero(size_class == c)) for c in np.unique(size_class)
        ]
        return _TorchPlan(self._to_device(metadata.slot_mapping), groups)

    def _group(self, metadata: AttentionMetadata, requests: np.ndarray) -> _Group:
        starts = metadata.query_start_loc[requests]
        query_lens = metadata.query_start_loc[requests + 1] - starts
        context_lens = metadata.context_lens[requests]
        query_len = int(query_lens.max())
        num_blocks = -(-int(context_lens.max()) // metadata.block_size)
        columns = np.arange(query_len)[None, :]
        # Padding repeats a request's last query token: no row is without a key to look at.
        offsets = np.minimum(columns, query_lens[:, None] - 1)
        positions = (context_lens - query_lens)[:, None] + offsets
        return _Group(
            query_rows=self._to_device((starts[:, None] + offsets).ravel()),
            blocks=self._to_device(metadata.block_tables[requests, :num_blocks]).flatten(),
            num_requests=len(requests),
            query_len=query_len,
            positions=self._to_device(positions),
            real=self._to_device((columns < query_lens[:, None]).ravel()),
            biases={},
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def write(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: _TorchPlan,
    ) -> None:
        """Store keys and values in the slots of their tokens."""
        write_kv_cache(k, v, k_cache, v_cache, plan.slot_mapping)

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: _TorchPlan,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Attention of each group over its gathered blocks."""
        out = torch.empty_like(q)
        for group in plan.groups:
            result = self._attend_group(q, k_cache, v_cache, group, scale, sliding_window)
            out[group.query_rows[group.real]] = result[group.real]
        return out

    def _attend_group(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        group: _Group,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        num_heads, head_dim = q.shape[1:]
        num_kv_heads = k_cache.shape[2]
        packed = (group.num_requests, group.query_len, num_kv_heads, num_heads // num_kv_heads)
        queries = q[group.query_rows].view(*packed, head_dim).permute(0, 2, 3, 1, 4)
        keys, values = (
            cache.index_select(0, group.blocks)
            .view(group.num_requests, -1, num_kv_heads, head_dim)
            .transpose(1, 2)
            for cache in (k_cache, v_cache)
        )
        bias = self._bias(group, keys.shape[2], num_heads // num_kv_heads, q.dtype, sliding_window)
        result = F.scaled_dot_product_attention(
            queries.flatten(2, 3), keys, values, attn_mask=bias, scale=scale
        )
        result = result.view(group.num_requests, num_kv_heads, -1, group.query_len, head_dim)
        return result.permute(0, 3, 1, 2, 4).reshape(-1, num_heads, head_dim)

    def _bias(
        self,
        group: _Group,
        num_keys: int,
        queries_per_kv: int,
        dtype: torch.dtype,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Additive mask `[num_requests, 1, queries_per_kv * query_len, num_keys]`, made once."""
        if sliding_window not in group.biases:
            distance = group.positions[..., None] - torch.arange(num_keys, device=self.device)
            hidden = distance < 0
            if sliding_window is not None:
                hidden |= distance >= sliding_window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
            bias.masked_fill_(hidden, float("-inf"))
            bias = bias[:, None, None].expand(-1, -1, queries_per_kv, -1, -1)
            group.biases[sliding_window] = bias.flatten(2, 3)
        return group.biases[sliding_window]


@dataclass
class _FunctionPlan:
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor


class FunctionAttention:
    """Runs a function with the contract of `kernels.paged_attention` as a backend."""

    def __init__(self, function: Callable[..., torch.Tensor], device: torch.device) -> None:
        self.function = function
        self.device = device
        self.name = getattr(function, "__name__", type(function).__name__)

    def plan(self, metadata: AttentionMetadata) -> _FunctionPlan:
        """Copy the metadata to the device."""
        return _FunctionPlan(
            *(
                torch.from_numpy(array).to(self.device)
                for array in (
                    metadata.block_tables,
                    metadata.context_lens,
                    metadata.query_start_loc,
                    metadata.slot_mapping,
                )
            )
        )

    def write(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: _FunctionPlan,
    ) -> None:
        """Store keys and values in the slots of their tokens."""
        write_kv_cache(k, v, k_cache, v_cache, plan.slot_mapping)

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: _FunctionPlan,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Call the function with the contract's arguments."""
        return self.function(
            q,
            k_cache,
            v_cache,
            plan.block_tables,
            plan.context_lens,
            plan.query_start_loc,
            scale=scale,
            sliding_window=sliding_window,
        )
