"""What known mistakes in an attention kernel make of a batch, and the hint for each.

A slip is a hint and the arguments of `attend` that give the result of the mistake.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from course_lib.classroom.exercises.b3_oracle import Mix

Slip = tuple[str, dict[str, Any]]


def _weighted(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.einsum("hn,nhd->hd", weights, values)


def _mean(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return _weighted(weights, values) / weights.sum(-1, keepdim=True)


def _not_divided(scores: torch.Tensor, values: torch.Tensor, block_size: int) -> torch.Tensor:
    return _weighted((scores - scores.max(-1, keepdim=True).values).exp(), values)


def _free_slots_count(scores: torch.Tensor, values: torch.Tensor, block_size: int) -> torch.Tensor:
    """Slots that are masked in the load only have the score 0 and the value 0."""
    free = -scores.shape[1] % block_size
    scores = torch.cat([scores, scores.new_zeros(len(scores), free)], dim=1)
    return _weighted(scores.softmax(-1)[:, : len(values)], values)


def _largest_so_far(scores: torch.Tensor, block_size: int) -> torch.Tensor:
    """For each key, the largest score up to the end of its block."""
    blocks = scores.split(block_size, dim=1)
    ends = torch.stack([block.max(-1).values for block in blocks], dim=1).cummax(1).values
    return ends.repeat_interleave(block_size, dim=1)[:, : scores.shape[1]]


def _online(
    scores: torch.Tensor, values: torch.Tensor, block_size: int, *, mean: bool, total: bool
) -> torch.Tensor:
    """Online softmax in which the mean or the total is not scaled down."""
    right = (scores - scores.max(-1, keepdim=True).values).exp()
    kept = (scores - _largest_so_far(scores, block_size)).exp()
    weighted = _weighted(right if mean else kept, values)
    return weighted / (right if total else kept).sum(-1, keepdim=True)


def _own_largest(scores: torch.Tensor, values: torch.Tensor, block_size: int) -> torch.Tensor:
    blocks = scores.split(block_size, dim=1)
    weights = [(block - block.max(-1, keepdim=True).values).exp() for block in blocks]
    return _mean(torch.cat(weights, dim=1), values)


def _last_block(scores: torch.Tensor, values: torch.Tensor, block_size: int) -> torch.Tensor:
    start = (scores.shape[1] - 1) // block_size * block_size
    return _mean(scores[:, start:].softmax(-1), values[start:])


_SCALE: Sequence[Slip] = (
    ("The scores are not multiplied by scale.", {"scale": 1.0}),
    ("It must divide by the sum of the weights: the weights of a softmax add up to 1.",
     {"mix": _not_divided}),
    ("Free slots of the last block still count. Masking the load gives them the score 0, and "
     "exp(0) is not 0: set their scores to -inf with tl.where.", {"mix": _free_slots_count}),
)  # fmt: skip

_MASKS: Sequence[Slip] = (
    ("The mask is one slot too wide: the first token of a context is number 0, so those that are "
     "seen are < the number of tokens, not <=.", {"seen": lambda at, context, new: at + 2}),
    ("The mask is one slot too wide: seen are the slots with a number < the number of tokens.",
     {"seen": lambda at, context, new: at + 1 if (at + 1) % 4 == 0 else at + 2}),
    ("The last key that should be seen is not: a token sees itself, too.",
     {"seen": lambda at, context, new: at}),
)  # fmt: skip

ONE_BLOCK_SLIPS: Sequence[Slip] = (
    *_SCALE,
    *_MASKS,
    ("Slots behind the end of the context are read as if they were tokens: mask slots < "
     "context_len.", {"seen": lambda at, context, new: 8}),
    ("All requests read the block of request 0: the offset of a block goes with the request.",
     {"table": lambda tables, request: tables[0]}),
)  # fmt: skip


_NUMBER = (
    "A wrong block is read. Block i of a request is neither block i of the cache nor entry i + 1: "
    "its number is tl.load(block_tables + request * max_blocks + i)."
)


def _up_to_block_end(at: int, context: int, new: int) -> int:
    return -(-(at + 1) // 4) * 4


DECODE_SLIPS: Sequence[Slip] = (
    *_SCALE,
    *_MASKS,
    ("When the largest score grows, what was summed before is too large: multiply total and mean "
     "by exp(largest - new_largest).", {"mix": partial(_online, mean=False, total=False)}),
    ("The total is scaled down when the largest score grows, the mean is not. Both need it.",
     {"mix": partial(_online, mean=False, total=True)}),
    ("The mean is scaled down when the largest score grows, the total is not. Both need it.",
     {"mix": partial(_online, mean=True, total=False)}),
    ("Each block is measured against its own largest score. Keep the largest so far, for all.",
     {"mix": _own_largest}),
    ("Only the last block is in the result: add to mean and total, do not replace them.",
     {"mix": _last_block}),
    ("Only the first block is in the result: loop over tl.cdiv(context_len, BLOCK_SIZE) blocks.",
     {"seen": lambda at, context, new: min(at + 1, 4)}),
    ("The last block, which is not full, is missing: round the number of blocks up with tl.cdiv.",
     {"seen": lambda at, context, new: (at + 1) // 4 * 4}),
    ("Slots behind the end of the context are read as if they were tokens. Slot s of block i is "
     "token i * BLOCK_SIZE + s.", {"seen": _up_to_block_end}),
    ("Blocks behind the end of the context are read. The rest of a block table is padding: it "
     "points to block 0, which belongs to nobody.", {"seen": lambda at, context, new: 10**6}),
    (_NUMBER, {"table": lambda tables, request: torch.arange(tables.shape[1])}),
    (_NUMBER, {"table": lambda tables, request: tables[request].roll(-1)}),
    ("All requests use the block table of request 0: row `request` begins at request * max_blocks.",
     {"table": lambda tables, request: tables[0]}),
)  # fmt: skip

GROUPED_SLIPS: Sequence[Slip] = (
    ("Query heads that share a KV head stand next to each other: kv_head = head // (NUM_HEADS // "
     "NUM_KV_HEADS), not head % NUM_KV_HEADS.", {"kv_head": lambda h, heads, kv: h % kv}),
    ("All heads read KV head 0: kv_head = head // (NUM_HEADS // NUM_KV_HEADS).",
     {"kv_head": lambda h, heads, kv: 0}),
    ("kv_head = head // queries per KV head, which is NUM_HEADS // NUM_KV_HEADS, not NUM_KV_HEADS.",
     {"kv_head": lambda h, heads, kv: min(h // kv, kv - 1)}),
    ("A token sees what comes after it. The last query token of a request sees its whole context, "
     "the one before it one key less.", {"seen": lambda at, context, new: context}),
    ("The tokens that were computed before are not seen: the query tokens are the last ones of "
     "their context, not the first.", {"seen": lambda at, context, new: at - context + new + 1}),
    *DECODE_SLIPS,
)  # fmt: skip


def split_slips(num_splits: int) -> Sequence[Slip]:
    """Mistakes in sharing the blocks out and in combining the parts."""
    return (
        ("All parts count the same. A part with large scores has more weight: combine with weights "
         "exp(lse - the largest lse).", {"mix": _combined(num_splits, lambda m, t: 0 * m)}),
        ("The parts are weighted by their totals only, but each total was measured against its own "
         "largest score: lse = largest + log(total).",
         {"mix": _combined(num_splits, lambda m, t: t.log())}),
        ("The parts are weighted by their largest scores only: lse = largest + log(total).",
         {"mix": _combined(num_splits, lambda m, t: m)}),
        ("lse is the logarithm of the sum: largest + log(total), not largest + total.",
         {"mix": _combined(num_splits, lambda m, t: m + t)}),
        ("The parts are added up. Divide by the sum of their weights at the end.",
         {"mix": _combined(num_splits, lambda m, t: m + t.log(), divided=False)}),
        ("A part is weighted by its total twice: store mean / total, or leave the log(total) out "
         "of its weight.", {"mix": _combined(num_splits, lambda m, t: m + 2 * t.log())}),
        ("Only the first part is in the result.", {"mix": _combined(num_splits, _first_only)}),
        ("Blocks are lost where they cannot be shared out evenly: share = tl.cdiv(num_blocks, "
         "NUM_SPLITS), rounded up.",
         {"seen": lambda at, context, new: min(at + 1, -(-context // 4) // num_splits
                                               * num_splits * 4)}),
    )  # fmt: skip


def _first_only(largest: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    rest = torch.full_like(largest[:, 1:], float("-inf"))
    return torch.cat([torch.zeros_like(largest[:, :1]), rest], dim=1)


def _combined(
    num_splits: int,
    lse: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    divided: bool = True,
) -> Mix:
    """The parts combined with another `lse` of the largest scores and totals, `[heads, splits]`."""

    def mix(scores: torch.Tensor, values: torch.Tensor, block_size: int) -> torch.Tensor:
        num_blocks = -(-scores.shape[1] // block_size)
        share = -(-num_blocks // num_splits) * block_size
        parts = list(zip(scores.split(share, dim=1), values.split(share), strict=True))
        largest = torch.stack([s.max(-1).values for s, _ in parts], dim=1)
        total = torch.stack(
            [(s - s.max(-1, keepdim=True).values).exp().sum(-1) for s, _ in parts], 1
        )
        means = torch.stack([_mean(s.softmax(-1), v) for s, v in parts], dim=1)
        weights = lse(largest, total)
        weights = (weights - weights.max(-1, keepdim=True).values).exp()
        weights = weights / weights.sum(-1, keepdim=True) if divided else weights
        return torch.einsum("hs,hsd->hd", weights, means)

    return mix
