"""How attention reads the paged KV cache: one interface, one backend a kind of device.

A backend plans once a step and then serves every layer from that plan. `TritonAttention` runs the
course's kernel and is the default on a GPU, `CpuAttention` the one in C++ and is the default on a
CPU that has a compiler; `TorchAttention` runs anywhere. `FunctionAttention` runs any function with
the contract of `kernels.paged_attention`, a student's own among them. `choose_backend` finds the
one for a device or a name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from course_lib.model.ops import CPU_OPS, TORCH_OPS, TRITON_OPS, Ops, ops_for
from kernels import cpu
from kernels.paged_attention import launch_paged_attention


@dataclass(frozen=True)
class AttentionMetadata:
    """Where each request's tokens are, in host memory. See the contract of `paged_attention`."""

    block_tables: np.ndarray  # [num_requests, max_blocks] int32
    context_lens: np.ndarray  # [num_requests] int32, this step's tokens included
    query_start_loc: np.ndarray  # [num_requests + 1] int32
    block_size: int


class AttentionBackend(ABC):
    """What the decoder needs of a backend: a plan a step, and attention by that plan."""

    name: str
    ops: Ops  # the decoder's other operations that go with it
    graph_safe = False  # whether `attend` may be recorded and replayed, with any plan's values

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def plan(self, metadata: AttentionMetadata) -> Any:
        """Prepare what all layers of a step share."""

    @abstractmethod
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

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


@dataclass
class _Group:
    """Requests of one step with a similar number of query tokens, padded to a rectangle."""

    query_rows: torch.Tensor | None  # [num_requests * query_len] rows of q; None for all in order
    blocks: torch.Tensor  # [num_requests * num_blocks]
    num_requests: int
    query_len: int
    positions: torch.Tensor  # [num_requests, query_len] of each query token in its sequence
    biases: dict[int | None, torch.Tensor]  # sliding window -> additive mask


@dataclass
class _TorchPlan:
    groups: list[_Group]
    #: [num_tokens] where each token's output lies among the groups' rows; None if already in order
    result_rows: torch.Tensor | None


class TorchAttention(AttentionBackend):
    """Paged attention in PyTorch operations, batched across requests.

    Requests of similar lengths form groups, which are padded to rectangles. Each group gathers its
    blocks and runs one `scaled_dot_product_attention`, in which the query heads that share a KV
    head are packed as further query rows.
    """

    name = "TORCH_SDPA"
    ops = TORCH_OPS

    def plan(self, metadata: AttentionMetadata) -> _TorchPlan:
        """Group the requests and build their gather indices."""
        query_lens = np.diff(metadata.query_start_loc)
        members = _similar_requests(query_lens, metadata.context_lens)
        if len(members) == 1 and (query_lens == query_lens[0]).all():  # above all: only decodes
            return _TorchPlan([self._group(metadata, members[0], None)], None)
        rows = [_padded_rows(metadata.query_start_loc, requests) for requests in members]
        groups = [self._group(metadata, m, r) for m, r in zip(members, rows, strict=True)]
        result_rows = np.empty(metadata.query_start_loc[-1], dtype=np.int64)
        all_rows = np.concatenate([r.ravel() for r in rows])
        result_rows[all_rows] = np.arange(len(all_rows))  # padding equals what it repeats
        return _TorchPlan(groups, self._to_device(result_rows))

    def _group(
        self, metadata: AttentionMetadata, requests: np.ndarray, rows: np.ndarray | None
    ) -> _Group:
        context_lens = metadata.context_lens[requests]
        starts = metadata.query_start_loc[requests]
        query_lens = metadata.query_start_loc[requests + 1] - starts
        query_len = int(query_lens.max())
        num_blocks = -(-int(context_lens.max()) // metadata.block_size)
        offsets = np.arange(query_len)[None] if rows is None else rows - starts[:, None]
        positions = (context_lens - query_lens)[:, None] + offsets
        return _Group(
            query_rows=None if rows is None else self._to_device(rows.ravel()),
            blocks=self._to_device(metadata.block_tables[requests, :num_blocks]).flatten(),
            num_requests=len(requests),
            query_len=query_len,
            positions=self._to_device(positions),
            biases={},
        )

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
        results = [
            self._attend_group(q, k_cache, v_cache, group, scale, sliding_window)
            for group in plan.groups
        ]
        if plan.result_rows is None:
            return results[0]
        return torch.cat(results).index_select(0, plan.result_rows)

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
        rows = q if group.query_rows is None else q.index_select(0, group.query_rows)
        queries = rows.view(*packed, head_dim).permute(0, 2, 3, 1, 4)
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


#: Requests in a group at most. Measured on 2 CPU cores with the shipped model, 64 decodes of mixed
#: context lengths: fewer pay more for starting operations, more pay for padding.
GROUP_SIZE = 16


def _similar_requests(query_lens: np.ndarray, context_lens: np.ndarray) -> list[np.ndarray]:
    """Indices of the requests of each group.

    The query lengths of a group lie within a factor of two, so a decode is never padded to a chunk;
    within that, requests are cut into groups in the order of their context lengths.
    """
    groups: list[np.ndarray] = []
    size_class = np.ceil(np.log2(query_lens)).astype(np.int64)
    for value in np.unique(size_class):
        members = np.flatnonzero(size_class == value)
        if len(members) > GROUP_SIZE:
            members = members[np.argsort(context_lens[members], kind="stable")]
        groups += np.split(members, range(GROUP_SIZE, len(members), GROUP_SIZE))
    return groups


def _padded_rows(query_start_loc: np.ndarray, requests: np.ndarray) -> np.ndarray:
    """Rows of q of each request, `[num_requests, longest]`.

    Padding repeats a request's last row, so that every row has a key to look at.
    """
    starts = query_start_loc[requests]
    lens = query_start_loc[requests + 1] - starts
    columns = np.arange(lens.max())[None]
    return starts[:, None] + np.minimum(columns, lens[:, None] - 1)


@dataclass
class PagedTables:
    """The plan of a `FunctionAttention`: the metadata on the device."""

    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_start_loc: torch.Tensor


class FunctionAttention(AttentionBackend):
    """Runs a function with the contract of `kernels.paged_attention` as a backend.

    Args:
        function: called once a layer.
        device: where its tensors lie.
        name: of the backend; the function's own if absent.
        ops: those of the device if absent.
    """

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        device: torch.device,
        name: str | None = None,
        ops: Ops | None = None,
    ) -> None:
        super().__init__(device)
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        self.ops = ops or ops_for(device)

    def plan(self, metadata: AttentionMetadata) -> PagedTables:
        """Copy the metadata to the device."""
        return PagedTables(
            block_tables=self._to_device(metadata.block_tables),
            context_lens=self._to_device(metadata.context_lens),
            query_start_loc=self._to_device(metadata.query_start_loc),
        )

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: PagedTables,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Call the function with the contract's arguments."""
        return self.function(
            q.contiguous(),
            k_cache,
            v_cache,
            plan.block_tables,
            plan.context_lens,
            plan.query_start_loc,
            scale=scale,
            sliding_window=sliding_window,
        )


class TritonAttention(FunctionAttention):
    """The course's kernels; without a GPU they run under Triton's interpreter."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(launch_paged_attention, device, "TRITON_ATTN", TRITON_OPS)
        self.graph_safe = device.type == "cuda"


class CpuAttention(FunctionAttention):
    """The course's kernels for a CPU, compiled when they are first wanted."""

    graph_safe = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(cpu.paged_attention, device, "CPU_ATTN", CPU_OPS)


#: Backends by the names that vLLM gives to theirs.
BACKENDS: dict[str, Callable[[torch.device], AttentionBackend]] = {
    "CPU_ATTN": CpuAttention,
    "TORCH_SDPA": TorchAttention,
    "TRITON_ATTN": TritonAttention,
}


def choose_backend(name: str | None, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend of that name, or the one that suits the device and the dtype.

    Raises:
        ValueError: there is none of that name, or it cannot run here.
    """
    if name is None:
        if device.type == "cuda":
            name = "TRITON_ATTN"
        else:
            name = "CPU_ATTN" if cpu.why_not(dtype) is None else "TORCH_SDPA"
    if name not in BACKENDS:
        raise ValueError(f"attention_backend must be one of {sorted(BACKENDS)}, got {name!r}")
    if name == "CPU_ATTN":
        reason = cpu.why_not(dtype) if device.type == "cpu" else f"the model runs on {device}"
        if reason is not None:
            raise ValueError(f"attention_backend CPU_ATTN cannot run here: {reason}")
    return BACKENDS[name](device)
