"""Decode steps, recorded once: the host says "again" where it would start hundreds of kernels.

A decode step of a given batch size starts the same kernels on the same tensors every time, so it is
recorded and replayed: on a GPU as a CUDA graph, on a CPU as a list of calls. The input tensors are
therefore kept, and each step overwrites their contents. A batch that is smaller than the next size
there is gets padded with requests of one token in the null block, whose results nobody reads.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from tqdm.auto import tqdm

from course_lib.model.attention import PagedTables
from course_lib.model.decoder import StepInputs
from kernels.cpu.recording import record

#: Computes the hidden states of a step.
Forward = Callable[[StepInputs], torch.Tensor]

#: Runs a function at least once, and makes of it one that does the same work again and returns the
#: same tensor.
Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]

#: Largest batch that is recorded on a CPU. Python's work between the kernels counts less with each
#: further request, while a recording keeps the memory of all that the step computes.
MAX_CPU_SIZE = 8


def cuda_graph_sizes(max_num_seqs: int) -> list[int]:
    """The ladder of batch sizes: 1, 2, 4, 8, then steps of 16 up to `max_num_seqs`."""
    ladder = [1, 2, 4, 8, *range(16, max_num_seqs, 16), max_num_seqs]
    return sorted({size for size in ladder if size <= max_num_seqs})


class CudaGraphs:
    """Captures CUDA graphs, which share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Record what `run` launches. The result launches it again and returns the same tensor."""
        run()  # compiles kernels and lets libraries allocate, which must not happen while recording
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


class DecodeGraphs:
    """Decode steps over kept input tensors.

    Args:
        forward: the eager step; it must start the same work whatever the tensors hold.
        sizes: of the batches, ascending.
        max_blocks: width of the block tables, in blocks.
        device: of the tensors.
        capture: makes a replayable step of a function.
    """

    def __init__(
        self,
        forward: Forward,
        sizes: Sequence[int],
        max_blocks: int,
        device: torch.device,
        capture: Capture,
    ) -> None:
        def kept(*shape: int, dtype: torch.dtype) -> "_Kept":
            return _Kept(shape, dtype, device)

        self.sizes = sizes
        self.max_size = largest = sizes[-1]
        # Token ids, positions and slots share a tensor, so that one copy brings all three.
        self._tokens = kept(3, largest, dtype=torch.int64)
        self._context_lens = kept(largest, dtype=torch.int32)
        self._block_tables = kept(largest, max_blocks, dtype=torch.int32)
        self._query_start_loc = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._forward, self._capture = forward, capture
        self._replays: dict[int, Callable[[], torch.Tensor]] = {}

    @classmethod
    def on_gpu(
        cls, forward: Forward, max_num_seqs: int, max_blocks: int, device: torch.device
    ) -> "DecodeGraphs":
        """CUDA graphs of all sizes, captured now."""
        graphs = cls(forward, cuda_graph_sizes(max_num_seqs), max_blocks, device, CudaGraphs())
        # The largest first, so that the smaller ones fit into the memory it has taken.
        for size in tqdm(graphs.sizes[::-1], desc="Capturing CUDA graphs", leave=False):
            graphs.capture(size)
        return graphs

    @classmethod
    def on_cpu(cls, forward: Forward, max_num_seqs: int, max_blocks: int) -> "DecodeGraphs":
        """Lists of calls, of small batches, each recorded when it first occurs."""
        sizes = range(1, min(MAX_CPU_SIZE, max_num_seqs) + 1)
        return cls(forward, sizes, max_blocks, torch.device("cpu"), record)

    def capture(self, size: int) -> None:
        """Record the step of a batch size."""
        self._replays[size] = self._capture(partial(self._forward, self._step(size)))

    def _step(self, size: int) -> StepInputs:
        token_ids, positions, slot_mapping = self._tokens.device[:, :size]
        plan = PagedTables(
            block_tables=self._block_tables.device[:size],
            context_lens=self._context_lens.device[:size],
            query_start_loc=self._query_start_loc[: size + 1],
        )
        return StepInputs(token_ids, positions, slot_mapping, plan)

    def run(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        slot_mapping: np.ndarray,
        block_tables: np.ndarray,
    ) -> torch.Tensor:
        """Hidden states of one token of each request, `[num_requests, hidden_size]`.

        They are overwritten by the next call.

        Args:
            token_ids: `[num_requests]`, like `positions` and `slot_mapping`.
            positions: the last one of each request.
            slot_mapping: where their keys and values go.
            block_tables: `[num_requests, up to max_blocks]`.
        """
        num, width = block_tables.shape
        size = next(size for size in self.sizes if size >= num)
        tokens = self._tokens.host
        tokens[:, :num] = token_ids, positions, slot_mapping
        tokens[:, num:size] = 0
        self._context_lens.host[:size] = 1
        self._context_lens.host[:num] = positions + 1
        self._block_tables.host[:num, :width] = block_tables
        self._block_tables.host[num:size, 0] = 0
        self._tokens.upload(3)
        self._context_lens.upload(size)
        self._block_tables.upload(size)
        if size not in self._replays:
            self.capture(size)
        return self._replays[size]()[:num]


class _Kept:
    """A tensor that stays where it is, and its image in host memory: on a CPU, itself."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        # Pinned, so that a copy goes on while the host does other things.
        self._host = torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
        self.host = self._host.numpy()
        self.device = self._host.to(device)

    def upload(self, num_rows: int) -> None:
        """Send the first rows. The host may change them once the step's result has been read."""
        if self.device is not self._host:
            self.device[:num_rows].copy_(self._host[:num_rows], non_blocking=True)
