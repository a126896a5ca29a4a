"""Oracles of notebook B3: attention in float64 on fresh batches over a paged cache.

A wrong result is compared with what known mistakes give on the same batch, so that the hint fits.
The batches of an exercise rise in difficulty; each brings one thing that the one before lacked.
"""

import ast
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from course_lib.classroom.checks import Exercise, Mismatch
from course_lib.classroom.exercises.b3_mistakes import (
    DECODE_SLIPS,
    GROUPED_SLIPS,
    ONE_BLOCK_SLIPS,
    Slip,
    split_slips,
)
from course_lib.classroom.exercises.b3_oracle import Batch, attend, make_batch
from course_lib.classroom.source import kernels_of, plain, source_of
from kernels.runtime import triton

TOLERANCE = 1e-5  # ||out - reference|| / ||reference||, in float32
LARGE_TOLERANCE = 1e-3  # where scores of several hundred are rounded to float32
HALF_TOLERANCE = 3e-3  # where the result is rounded to float16

Answer = Callable[..., Any]
_ENGINES_OWN = tuple(
    f"kernels.paged_attention:{name}"
    for name in ("paged_attention", "launch_paged_attention", "paged_attention_reference")
)


@dataclass(frozen=True)
class Case:
    """A batch, and the hint for an answer that fails on it in no known way."""

    batch: Batch
    hint: str
    tolerance: float = TOLERANCE
    nan_hint: str = (
        "`out` was full of NaN before. Does every program store its row? Or is something divided "
        "by 0?"
    )


def verify_one_block(answer: Answer, rng: random.Random) -> None:
    """Decode over one block a request: full, with one slot free, with one token."""
    one = partial(make_batch, rng, block_size=8, num_kv_heads=2)
    cases = [
        Case(one([(1, 8), (1, 8)]), "The blocks are full here, so no mask is needed yet: scores, "
             "softmax, weighted sum. Look at the offsets first."),
        Case(one([(1, 7), (1, 1), (1, rng.randint(2, 6))]), _MASK),
        Case(one([(1, 8), (1, 5)], head_dim=20), _DIMS),
        Case(one([(1, 8), (1, 3)], strength=400), _LARGE, LARGE_TOLERANCE, _LARGE),
    ]  # fmt: skip
    with _own_kernel(answer):
        for case in cases:
            batch = case.batch
            blocks = batch.block_tables[:, 0].long()
            keys, values = batch.k_cache[blocks], batch.v_cache[blocks]
            got = answer(batch.q, keys, values, batch.context_lens, batch.scale)
            _compare(got, case, "one_block_attention", ONE_BLOCK_SLIPS)


def verify_block_table(answer: Answer, rng: random.Random) -> None:
    """Decode over a block table: contexts of whole blocks, one more, one less."""
    with _own_kernel(answer):
        for case in _decode_cases(rng):
            batch = case.batch
            tables = (batch.block_tables, batch.context_lens, batch.scale)
            got = answer(batch.q, batch.k_cache, batch.v_cache, *tables)
            _compare(got, case, "block_table_attention", DECODE_SLIPS)


def verify_split(answer: Answer, rng: random.Random) -> None:
    """The same by several programs a head, evenly and unevenly, more programs than blocks too."""
    empty = (
        "There are more programs than blocks, so some get none: walk up to "
        "tl.minimum((split + 1) * share, num_blocks). Their lse is -inf and their part 0; see that "
        "no -inf - -inf and no 0 / 0 makes a NaN of it."
    )
    with _own_kernel(answer):
        one, whole, ragged, wide, large = _decode_cases(rng)
        uneven = make_batch(rng, [(1, 12), (1, 17)], block_size=4, num_kv_heads=1)
        _split(answer, whole, 1)
        _split(answer, Case(uneven, "5 blocks for 3 programs: 2, 2 and 1."), 3)
        for case in (ragged, wide, large):
            _split(answer, case, 2)
        for case, num_splits in ((one, 2), (ragged, 5)):
            _split(answer, Case(case.batch, empty, nan_hint=empty), num_splits)


def _split(answer: Answer, case: Case, num_splits: int) -> None:
    batch = case.batch
    tables = (batch.block_tables, batch.context_lens, batch.scale)
    got = answer(batch.q, batch.k_cache, batch.v_cache, *tables, num_splits)
    slips = split_slips(num_splits) if num_splits > 1 else ()
    _compare(got, case, f"split_attention with {num_splits} splits", [*DECODE_SLIPS, *slips])


def _decode_cases(rng: random.Random) -> Sequence[Case]:
    decode = partial(make_batch, rng, block_size=4, num_kv_heads=2)
    return (
        Case(decode([(1, 4), (1, 4)]), "One full block each: everything but the block's number is "
             "as in B3.1. Take the number from the block table."),
        Case(decode([(1, 8), (1, 16)]), "Whole blocks, so no mask is needed, but several of them. "
             "Look at what is carried from one block to the next."),
        Case(decode([(1, 9), (1, 7), (1, rng.choice((10, 11, 13, 14)))]), _MASK),
        Case(decode([(1, 6), (1, 8)], head_dim=20), _DIMS),
        Case(decode([(1, 11)], strength=400), _LARGE, LARGE_TOLERANCE, _LARGE),
    )  # fmt: skip


def verify_paged_attention(answer: Answer, rng: random.Random) -> None:
    """The whole contract: grouped heads, prefill, chunks, mixes, `out`, 16 bits, a window."""
    make = partial(make_batch, rng, block_size=4)
    cases = [
        Case(make([(1, 4), (1, 6)], num_kv_heads=2), "Decode without grouping, as in B3.2. Each "
             "token is a request of its own here."),
        Case(make([(1, 3), (1, 5)], num_kv_heads=2, group=2), "Two query heads share a KV head "
             "here: kv_head = head // (NUM_HEADS // NUM_KV_HEADS), and the cache has NUM_KV_HEADS "
             "heads a slot."),
        Case(make([(5, 5)], num_kv_heads=1, group=2), "A prompt from its first token: token i sees "
             "i + 1 keys."),
        Case(make([(1, 5), (3, 7), (0, 4), (2, 2)], num_kv_heads=2, head_dim=24), "A mix: a "
             "decode, a chunk after a computed beginning, a request without a token in this step, "
             "a prompt. The query tokens are the last ones of their context. And head_dim is 24: "
             "mask dims < HEAD_DIM."),
        Case(make([(2, rng.randint(5, 9)), (1, 2)], num_kv_heads=1, group=3), _MASK),
    ]  # fmt: skip
    half = make([(2, 6)], num_kv_heads=1, group=2, dtype=torch.float16)
    bits = "These are 16-bit numbers: load, then .to(tl.float32) before any sum."
    cases.append(Case(half, bits, HALF_TOLERANCE))
    with _own_kernel(answer):
        for case in cases:
            got = answer(*case.batch.contract, scale=case.batch.scale)
            _compare(got, case, "my_paged_attention", GROUPED_SLIPS)
        _takes_a_slice(answer, cases[1])
        _writes_into_out(answer, cases[1])
        _knows_of_windows(answer, cases[2])


def _takes_a_slice(answer: Answer, case: Case) -> None:
    """A projection gives queries, keys and values side by side, and q is a slice of that."""
    q, *rest = case.batch.contract
    wide = torch.cat([q, torch.full_like(q, float("nan"))], dim=1)[:, : q.shape[1]]
    hint = "q may be a slice of a larger tensor, whose rows are not next to each other: begin with "
    hint += "q = q.contiguous()."
    got = answer(wide, *rest, scale=case.batch.scale)
    _compare(got, Case(case.batch, hint, nan_hint=hint), "my_paged_attention on a slice", ())


def _writes_into_out(answer: Answer, case: Case) -> None:
    out = torch.full_like(case.batch.q, float("nan"))
    got = answer(*case.batch.contract, scale=case.batch.scale, out=out)
    hint = "out = torch.empty_like(q) if out is None else out, then write into it and return it."
    if got is not out:
        raise Mismatch("my_paged_attention(..., out=out) returned another tensor than out", hint)
    _compare(
        out, Case(case.batch, hint, nan_hint=hint), "my_paged_attention with out", GROUPED_SLIPS
    )


def _knows_of_windows(answer: Answer, case: Case) -> None:
    """A window is handled or refused; ignoring it would give wrong text without a word."""
    where = "my_paged_attention(..., sliding_window=2)"
    try:
        got = answer(*case.batch.contract, scale=case.batch.scale, sliding_window=2)
    except (ValueError, NotImplementedError):
        return
    expected = attend(case.batch, window=2)
    if _error(got.double().cpu(), expected) > TOLERANCE:
        raise Mismatch(
            f"{where} returned the result of another window",
            "Refuse what your kernel does not do: if sliding_window is not None: raise ValueError.",
        )


_MASK = (
    "The last block is not full: slots from the end of the context on must get the score -inf, so "
    "that their weight is 0. Which slots are seen, counted from the beginning of the context?"
)
_DIMS = (
    "head_dim is 20 here, and tl.arange(0, PADDED_DIM) goes on to 32: mask dims < HEAD_DIM in "
    "every load, with other=0.0, and in the store."
)
_LARGE = (
    "Scores are large here, and exp() of more than 88 is too large for float32: subtract the "
    "largest score so far before exp()."
)


@contextmanager
def _own_kernel(answer: Answer) -> Iterator[None]:
    """Whether there is a kernel of the student's.

    A stub in a kernel is found in its source: a compiled kernel cannot raise.
    """
    if not isinstance(triton.__version__, str):
        print(f"It cannot be checked on this machine: {triton.reason}.")
        raise NotImplementedError
    functions = [plain(answer), *kernels_of(plain(answer))]
    if any(_is_stub(node) for f in functions for node in ast.walk(ast.parse(source_of(f)))):
        raise NotImplementedError
    if len(functions) == 1:
        raise Mismatch(
            f"{functions[0].__name__} launches no Triton kernel",
            "The arithmetic belongs into the @triton.jit function, the function below launches it.",
        )
    # A NaN is reported as a difference; what NumPy says about it would only confuse.
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _is_stub(node: ast.AST) -> bool:
    return isinstance(node, ast.Raise) and ast.unparse(node) == "raise NotImplementedError()"


def _compare(got: Any, case: Case, name: str, slips: Sequence[Slip]) -> None:
    """Raise `Mismatch` if the result is wrong, with the hint of the mistake that gives it."""
    batch, tolerance = case.batch, case.tolerance
    where = f"{name}: {batch.described()}"
    if not isinstance(got, torch.Tensor) or got.shape != batch.q.shape:
        shape = list(got.shape) if isinstance(got, torch.Tensor) else repr(got)
        raise Mismatch(f"{where}: expected a tensor of {list(batch.q.shape)}, got {shape}")
    if got.dtype != batch.q.dtype:
        raise Mismatch(f"{where}: expected {batch.q.dtype} as q has, got {got.dtype}")
    have, want = got.double().cpu(), attend(batch)
    error = _error(have, want)
    if error < tolerance:
        return
    if have.isnan().any():
        at = batch.place(have.isnan())
        raise Mismatch(f"{where}: NaN at {at}, expected {want[have.isnan()][0]:.5f}", case.nan_hint)
    rows = (have - want).norm(dim=-1, keepdim=True) > tolerance * want.norm(dim=-1, keepdim=True)
    differs = rows & ((have - want).abs() > tolerance * want.norm(dim=-1, keepdim=True) / 10)
    message = (
        f"{where}: at {batch.place(differs)} expected {want[differs][0]:.5f}, got "
        f"{have[differs][0]:.5f}; over all, ||out - reference|| / ||reference|| is {error:.1e}, "
        f"it must be below {tolerance:.0e}"
    )
    raise Mismatch(message, _recognized(have, batch, slips, 30 * tolerance) or case.hint)


def _recognized(
    have: torch.Tensor, batch: Batch, slips: Sequence[Slip], tolerance: float
) -> str | None:
    """The hint of the mistake whose result this is."""
    for hint, options in slips:
        if _error(have, attend(batch, **options)) < tolerance:
            return hint
    return None


def _error(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have - want).norm() / want.norm())


_LAYOUT = (
    "Tensors lie in memory row after row: of shape [A, B, C, D], the element [a, b, c, d] is "
    "at ((a * B + b) * C + c) * D + d."
)

EXERCISES = (
    Exercise(
        id="B3.1",
        title="attention over one block",
        points=2,
        verify=verify_one_block,
        reference="course_lib.classroom.exercises.b3_kernels:one_block_attention",
        off_limits=_ENGINES_OWN,
        hints=(
            "Six steps: load the query, load the keys, scores, softmax, load the values, store "
            "the weighted sum. Print each of them: print() works in the interpreter.",
            _LAYOUT + " The key of slot s begins at ((request * BLOCK_SIZE + s) * NUM_HEADS + "
            "head) * HEAD_DIM.",
            "scores = tl.sum(keys * query[None, :], axis=1) * scale, then tl.where(seen, scores, "
            "float('-inf')) with seen = slots < context_len.",
            "weights = tl.exp(scores - tl.max(scores, axis=0)); the result is "
            "tl.sum(weights[:, None] * values, axis=0) / tl.sum(weights, axis=0).",
        ),
    ),
    Exercise(
        id="B3.2",
        title="online softmax over a block table",
        points=3,
        verify=verify_block_table,
        reference="course_lib.classroom.exercises.b3_kernels:block_table_attention",
        off_limits=_ENGINES_OWN,
        hints=(
            "A loop over the blocks of the request, `for i in range(0, tl.cdiv(context_len, "
            "BLOCK_SIZE))`, with B3.1 inside. Three things are carried: largest, total, acc.",
            "The number of block i is tl.load(block_tables + request * max_blocks + i). Slot s of "
            "it holds the token i * BLOCK_SIZE + s of the context.",
            "new_largest = tl.maximum(largest, tl.max(scores, axis=0)). What was summed so far "
            "was measured against the old one: multiply total and acc by "
            "tl.exp(largest - new_largest), then add this block's.",
            "Begin with largest = float('-inf'), total = 0.0 and acc = tl.zeros([PADDED_DIM], "
            "tl.float32). Divide once, after the loop: acc / total.",
        ),
    ),
    Exercise(
        id="B3.3",
        title="the paged_attention part",
        points=4,
        verify=verify_paged_attention,
        reference="course_lib.classroom.exercises.b3_kernels:paged_attention",
        off_limits=_ENGINES_OWN,
        hints=(
            "Take your kernel of B3.2. Three things change: the request is looked up, the keys "
            "that are seen are counted for each token, and query heads share KV heads.",
            "kv_head = head // (NUM_HEADS // NUM_KV_HEADS). It replaces head in the offsets of "
            "keys and values, and NUM_KV_HEADS replaces NUM_HEADS there. The query keeps its own.",
            "query_lens = query_start_loc[1:] - query_start_loc[:-1], and request_of_token = "
            "torch.arange(len(query_lens), device=q.device).repeat_interleave(query_lens).",
            "The last query token of a request sees context_len keys, the one before it one less. "
            "With end = query_start_loc[request_of_token + 1], token t sees "
            "context_lens[request_of_token] - (end - 1 - t) keys.",
        ),
        part="paged_attention",
    ),
    Exercise(
        id="B3.4",
        title="split-KV and the combine",
        points=3,
        verify=verify_split,
        reference="course_lib.classroom.exercises.b3_kernels:split_attention",
        off_limits=_ENGINES_OWN,
        hints=(
            "The partial kernel is B3.2 over some of the blocks. It stores its mean, already "
            "divided by its total, and lse = largest + tl.log(total).",
            "share = tl.cdiv(num_blocks, NUM_SPLITS). Program `split` takes the blocks from "
            "split * share on, up to tl.minimum((split + 1) * share, num_blocks).",
            "The combine: with weights exp(lse - the largest lse), out = sum of weight * part over "
            "the splits / sum of the weights. exp(lse) is the total that part was divided by.",
            "A program without blocks stores a part of 0 and an lse of float('-inf'): "
            "`if total > 0:` in the partial kernel. Its weight then is exp(-inf) = 0.",
        ),
    ),
)
