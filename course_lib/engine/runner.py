"""A scheduled batch on real hardware: flat tensors in, sampled tokens out.

`ModelRunner` is the `Executor` that owns the decoder and the KV cache tensors. All requests' tokens
of a step, chunks of prompts and single decode tokens alike, go through the decoder as one flat
sequence; the block tables tell attention what belongs together.
"""

import numpy as np
import torch

from course_lib.engine.batch import ScheduledBatch, ScheduledRequest, StepResult
from course_lib.engine.block_pool import NULL_BLOCK
from course_lib.engine.outputs import LogprobsAtPosition
from course_lib.engine.sampler import gather_logprobs, sample
from course_lib.model.attention import AttentionBackend, AttentionMetadata
from course_lib.model.decoder import Decoder, LayerCache


class ModelRunner:
    """Runs steps of a decoder over a paged KV cache.

    Args:
        decoder: with its weights loaded.
        attention: the backend.
        num_blocks: blocks of the cache, the null block included.
        block_size: tokens in a block.
    """

    def __init__(
        self, decoder: Decoder, attention: AttentionBackend, num_blocks: int, block_size: int
    ) -> None:
        self.decoder = decoder
        self.attention = attention
        self.block_size = block_size
        self.device = decoder.rope.device
        self.kv_cache = make_kv_cache(decoder, num_blocks, block_size)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Compute the batch's tokens and sample where a request has reached its last one."""
        entries = batch.scheduled
        if not entries:
            return StepResult([])
        token_ids, positions, metadata = build_inputs(entries, self.block_size)
        hidden = self.decoder(
            self._to_device(token_ids),
            self._to_device(positions),
            self.kv_cache,
            self.attention,
            self.attention.plan(metadata),
        )
        result = StepResult(
            sampled_token_ids=[[] for _ in entries],
            logprobs=[[] for _ in entries],
            prompt_logprobs=self._prompt_logprobs(entries, hidden, metadata.query_start_loc),
        )
        sampling = [index for index, entry in enumerate(entries) if entry.samples]
        if sampling:
            last_rows = self._to_device(metadata.query_start_loc[1:][sampling] - 1)
            logits = self.decoder.logits(hidden[last_rows])
            tokens, logprobs = sample(logits, [entries[index].request for index in sampling])
            for index, token, token_logprobs in zip(sampling, tokens, logprobs, strict=True):
                result.sampled_token_ids[index] = [token]
                result.logprobs[index] = token_logprobs
        return result

    def _prompt_logprobs(
        self, entries: list[ScheduledRequest], hidden: torch.Tensor, query_start_loc: np.ndarray
    ) -> list[list[LogprobsAtPosition]]:
        """Of the prompt tokens that follow this step's; empty for requests that did not ask."""
        result: list[list[LogprobsAtPosition]] = [[] for _ in entries]
        for index, entry in enumerate(entries):
            request = entry.request
            num_top = request.sampling_params.prompt_logprobs
            following = request.prompt_token_ids[entry.start + 1 : entry.end + 1]
            if num_top is None or not following:
                continue
            first = int(query_start_loc[index])
            logits = self.decoder.logits(hidden[first : first + len(following)])
            chosen = torch.tensor(following, device=self.device)
            result[index] = gather_logprobs(logits.log_softmax(dim=-1), chosen, num_top)
        return result

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def build_inputs(
    entries: list[ScheduledRequest], block_size: int
) -> tuple[np.ndarray, np.ndarray, AttentionMetadata]:
    """Flat token ids and positions (`[num_tokens]` int64 each) and what attention needs."""
    token_ids = np.array([token for entry in entries for token in entry.token_ids], dtype=np.int64)
    num_tokens = np.array([entry.num_tokens for entry in entries])
    starts = np.array([entry.start for entry in entries])
    query_start_loc = np.zeros(len(entries) + 1, dtype=np.int32)
    np.cumsum(num_tokens, out=query_start_loc[1:])
    positions = np.arange(len(token_ids)) + np.repeat(starts - query_start_loc[:-1], num_tokens)

    tables = [entry.request.block_ids for entry in entries]
    block_tables = np.full((len(entries), max(map(len, tables))), NULL_BLOCK, dtype=np.int32)
    for row, table in zip(block_tables, tables, strict=True):
        row[: len(table)] = table
    rows = np.repeat(np.arange(len(entries)), num_tokens)
    slot_mapping = block_tables[rows, positions // block_size] * np.int64(block_size)
    slot_mapping += positions % block_size
    metadata = AttentionMetadata(
        block_tables=block_tables,
        context_lens=(starts + num_tokens).astype(np.int32),
        query_start_loc=query_start_loc,
        slot_mapping=slot_mapping,
        block_size=block_size,
    )
    return token_ids, positions, metadata


def make_kv_cache(decoder: Decoder, num_blocks: int, block_size: int) -> list[LayerCache]:
    """Empty pages for each layer, of the decoder's dtype and on its device.

    Zeros, because masked positions are still multiplied by their weight 0, and the operating
    system commits a page of zeros only when it is first written.
    """
    config = decoder.config
    shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
    weight = decoder.model.norm.weight

    def pages() -> torch.Tensor:
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    return [(pages(), pages()) for _ in range(config.num_layers)]
