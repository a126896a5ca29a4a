"""A scheduled batch on real hardware: flat tensors in, sampled tokens out.

`ModelRunner` is the `Executor` that owns the decoder and the KV cache tensors. All requests' tokens
of a step, chunks of prompts and single decode tokens alike, go through the decoder as one flat
sequence; the block tables tell attention what belongs together. A step of nothing but decodes is
replayed where steps are recorded. The host waits for the device only to read sampled tokens.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from course_lib.engine.batch import ScheduledBatch, ScheduledRequest, StepResult
from course_lib.engine.block_pool import NULL_BLOCK
from course_lib.engine.decode_graphs import DecodeGraphs
from course_lib.engine.outputs import LogprobsAtPosition
from course_lib.engine.sampler import gather_logprobs, sample
from course_lib.engine.startup import phase
from course_lib.model.attention import AttentionBackend, AttentionMetadata
from course_lib.model.decoder import Decoder, LayerCache, StepInputs


@dataclass(frozen=True)
class HostInputs:
    """A step in host memory: the requests' tokens one after another."""

    token_ids: np.ndarray  # [num_tokens] int64, like the next two
    positions: np.ndarray  # each token's place in its own sequence
    slot_mapping: np.ndarray  # its place in the KV cache: block * block_size + offset
    metadata: AttentionMetadata


class ModelRunner:
    """Runs steps of a decoder over a paged KV cache.

    Args:
        decoder: with its weights loaded.
        attention: the backend.
        kv_cache: keys and values of each layer.
    """

    def __init__(
        self, decoder: Decoder, attention: AttentionBackend, kv_cache: list[LayerCache]
    ) -> None:
        self.decoder = decoder
        self.attention = attention
        self.kv_cache = kv_cache
        self.num_blocks, self.block_size = kv_cache[0][0].shape[:2]
        self.device = decoder.rope.device
        self.graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def record_decode_steps(self, max_num_seqs: int) -> None:
        """Decode steps are replayed from now on, on a GPU as CUDA graphs, which are made here."""
        max_blocks = -(-len(self.decoder.rope) // self.block_size)
        if self.device.type == "cuda":
            with phase("cuda_graphs"):
                self.graphs = DecodeGraphs.on_gpu(
                    self._forward, max_num_seqs, max_blocks, self.device
                )
        else:
            self.graphs = DecodeGraphs.on_cpu(self._forward, max_num_seqs, max_blocks)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Compute the batch's tokens and sample where a request has reached its last one.

        Raises:
            ValueError: a block table names a block that the cache does not have.
        """
        entries = batch.scheduled
        if not entries:
            return StepResult([])
        inputs = build_inputs(entries, self.block_size)
        _check_block_ids(inputs.metadata.block_tables, entries, self.num_blocks)
        sampling = [index for index, entry in enumerate(entries) if entry.samples]
        last_rows = inputs.metadata.query_start_loc[1:][sampling] - 1
        every_row = not sampling or any(_wants_prompt_logprobs(entry) for entry in entries)
        hidden = self._hidden(entries, inputs, None if every_row else last_rows)
        result = StepResult(
            sampled_token_ids=[[] for _ in entries],
            logprobs=[[] for _ in entries],
            prompt_logprobs=self._prompt_logprobs(entries, hidden, inputs),
        )
        if sampling:
            if every_row:
                hidden = hidden[self._to_device(last_rows)]
            logits = self.decoder.logits(hidden)
            tokens, logprobs = sample(logits, [entries[index].request for index in sampling])
            for index, token, token_logprobs in zip(sampling, tokens, logprobs, strict=True):
                result.sampled_token_ids[index] = [token]
                result.logprobs[index] = token_logprobs
        return result

    def _hidden(
        self, entries: list[ScheduledRequest], inputs: HostInputs, rows: np.ndarray | None
    ) -> torch.Tensor:
        """Hidden states of the step's tokens, `[num_tokens, hidden_size]`, or of some `rows`."""
        graphs = self.graphs
        if (
            graphs is not None
            and len(entries) <= graphs.max_size
            and all(e.num_tokens == 1 and e.samples for e in entries)
        ):
            return graphs.run(
                inputs.token_ids,
                inputs.positions,
                inputs.slot_mapping,
                inputs.metadata.block_tables,
            )
        if rows is not None and len(rows) == len(inputs.token_ids):
            rows = None
        return self._forward(
            StepInputs(
                token_ids=self._to_device(inputs.token_ids),
                positions=self._to_device(inputs.positions),
                slot_mapping=self._to_device(inputs.slot_mapping),
                plan=self.attention.plan(inputs.metadata),
                output_rows=None if rows is None else self._to_device(rows),
            )
        )

    def _forward(self, step: StepInputs) -> torch.Tensor:
        return self.decoder(step, self.kv_cache, self.attention)

    def _prompt_logprobs(
        self, entries: list[ScheduledRequest], hidden: torch.Tensor, inputs: HostInputs
    ) -> list[list[LogprobsAtPosition]]:
        """Of the prompt tokens that follow this step's; empty for requests that did not ask."""
        result: list[list[LogprobsAtPosition]] = [[] for _ in entries]
        for index, entry in enumerate(entries):
            request = entry.request
            num_top = request.sampling_params.prompt_logprobs
            if num_top is None:
                continue
            following = request.prompt_token_ids[entry.start + 1 : entry.end + 1]
            if following:
                first = int(inputs.metadata.query_start_loc[index])
                logits = self.decoder.logits(hidden[first : first + len(following)])
                chosen = torch.tensor(following, device=self.device)
                result[index] = gather_logprobs(logits.log_softmax(dim=-1), chosen, num_top)
        return result

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _wants_prompt_logprobs(entry: ScheduledRequest) -> bool:
    return entry.request.sampling_params.prompt_logprobs is not None


def build_inputs(entries: list[ScheduledRequest], block_size: int) -> HostInputs:
    """The flat tokens of a step, their places, and what attention needs to know."""
    num_tokens = np.array([entry.num_tokens for entry in entries])
    starts = np.array([entry.start for entry in entries])
    query_start_loc = np.zeros(len(entries) + 1, dtype=np.int32)
    np.cumsum(num_tokens, out=query_start_loc[1:])
    total = int(query_start_loc[-1])
    token_ids = np.fromiter(
        chain.from_iterable(entry.token_ids for entry in entries), np.int64, count=total
    )
    positions = np.arange(total) + np.repeat(starts - query_start_loc[:-1], num_tokens)

    tables = [entry.request.block_ids for entry in entries]
    widths = np.array([len(table) for table in tables])
    block_tables = np.full((len(entries), widths.max()), NULL_BLOCK, dtype=np.int32)
    block_ids = np.fromiter(chain.from_iterable(tables), np.int64, count=widths.sum())
    block_tables[np.arange(block_tables.shape[1]) < widths[:, None]] = block_ids

    rows = np.repeat(np.arange(len(entries)), num_tokens)
    # Not by multiplying with a np.int64: outside the main thread, numpy before 2.2 keeps int32.
    slot_mapping = block_tables[rows, positions // block_size].astype(np.int64) * block_size
    slot_mapping += positions % block_size
    metadata = AttentionMetadata(
        block_tables=block_tables,
        context_lens=(starts + num_tokens).astype(np.int32),
        query_start_loc=query_start_loc,
        block_size=block_size,
    )
    return HostInputs(token_ids, positions, slot_mapping, metadata)


def _check_block_ids(
    block_tables: np.ndarray, entries: list[ScheduledRequest], num_blocks: int
) -> None:
    """A wrong id would make the device read and write memory that is not the cache's."""
    if block_tables.min() < 0 or block_tables.max() >= num_blocks:
        wrong = (block_tables < 0) | (block_tables >= num_blocks)
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"the block table of request {entries[row].request.request_id!r} names block "
            f"{block_tables[row, column]}, but the cache has blocks 0 to {num_blocks - 1}; the "
            "block pool handed out one that does not exist"
        )
