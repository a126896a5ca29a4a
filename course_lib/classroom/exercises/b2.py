"""Exercises of notebook B2, the paged KV cache: counted pages, names of blocks, the block pool.

The oracles of the first two are here; that of the pool, a model of the rules, is in `b2_oracle`.
"""

import builtins
import random
from collections.abc import Callable, Sequence
from typing import Any

from course_lib.classroom.checks import Exercise, Mismatch, compare
from course_lib.classroom.exercises.b2_oracle import verify_block_pool
from course_lib.classroom.source import names_in, own_functions
from course_lib.sizing.memory import KvAccounting


def verify_accounting(answer: Callable[..., Any], rng: random.Random) -> None:
    """Against blocks counted one by one; then a request longer than its reservation."""
    cases = [([320, 75, 900, 250], 2048, 16), ([16], 16, 16), ([17, 16, 15, 0], 40, 16), ([], 8, 4)]
    for _ in range(40):
        longest, block = rng.randint(1, 3000), rng.choice((1, 8, 16, 32, 100))
        lengths = [rng.randint(0, longest) for _ in range(rng.randint(1, 8))]
        cases.append((lengths, longest, block))
    for lengths, longest, block in cases:
        fixed = len([start for _ in lengths for start in range(0, longest, block)])
        paged = len([start for length in lengths for start in range(0, length, block)])
        expected = KvAccounting(sum(lengths), fixed, paged, (fixed - paged) * block)
        where = f"paged_kv_accounting({lengths}, {longest}, {block})"
        _compare_accounting(answer(list(lengths), longest, block), expected, where, block)
    call = "paged_kv_accounting([8, 33], 32, 16)"
    hint = "A request cannot outgrow its reservation: raise a ValueError that says `cached_tokens`."
    try:
        got = answer([8, 33], 32, 16)
    except ValueError as error:
        if "cached_tokens" not in str(error):
            raise Mismatch(
                f"{call}: the ValueError says {str(error)!r}, which does not name cached_tokens",
                hint,
            ) from None
    else:
        raise Mismatch(f"{call}: expected a ValueError, got {got!r}", hint)


def _compare_accounting(got: Any, expected: KvAccounting, where: str, block: int) -> None:
    try:
        compare(got, expected, where)
    except Mismatch as error:
        hint = None
        if getattr(got, "used_tokens", None) != expected.used_tokens:
            hint = "Return a KvAccounting; used_tokens is the sum of cached_tokens."
        elif got.fixed_reservation_blocks != expected.fixed_reservation_blocks:
            hint = (
                "Each request is reserved ceil(max_tokens_per_request / tokens_per_block) blocks."
            )
        elif got.paged_blocks == -(-expected.used_tokens // block):
            hint = "Requests do not share a block here: round up for each one, then add up."
        elif got.paged_blocks != expected.paged_blocks:
            hint = "A block that has begun counts whole: round up. One that has not counts nothing."
        elif got.reserved_tokens_avoided != expected.reserved_tokens_avoided:
            hint = "Blocks avoided times tokens_per_block."
        raise Mismatch(str(error), hint) from None


_NONE = (None, None)
#: Calls (parent, tokens, keys) that must not have the same name, and what to think of.
_DIFFERENT: Sequence[tuple[tuple[Any, ...], tuple[Any, ...], str]] = (
    ((b"", [1, 2], _NONE), (b"", [1, 3], _NONE), "The name covers all tokens of the block."),
    ((b"", [1, 2], _NONE), (b"", [2, 1], _NONE), "The order of the tokens counts."),
    ((b"", [1, 1, 2], _NONE), (b"", [1, 2, 2], _NONE), "Every token counts, repeated ones too."),
    (
        (b"", [1, 23], _NONE),
        (b"", [12, 3], _NONE),
        "Written one after another both are 123: separate the tokens, or give each the same width.",
    ),
    (
        (b"", [5, 6], _NONE),
        (b"", [261, 6], _NONE),
        "A token may be larger than a byte: give each of them 8 bytes.",
    ),
    (
        (b"", [5, 6], _NONE),
        (b"", [65541, 6], _NONE),
        "A token may be larger than two bytes: give each of them 8 bytes.",
    ),
    (
        (b"p" * 32, [1, 2], _NONE),
        (b"q" * 32, [1, 2], _NONE),
        "The same tokens after another beginning have other keys and values: hash parent_hash too.",
    ),
    (
        (b"", [1, 2], ("fr", None)),
        (b"", [1, 2], _NONE),
        "Another LoRA adapter, other keys and values: hash extra_keys too.",
    ),
    (
        (b"", [1, 2], (None, "tenant a")),
        (b"", [1, 2], (None, "tenant b")),
        "Tenants with another salt must share nothing: hash all extra_keys.",
    ),
    (
        (b"", [1, 2], ("x", None)),
        (b"", [1, 2], (None, "x")),
        "A LoRA adapter named x is not a salt x: the place of a key counts.",
    ),
    (
        (b"", [1, 2], ("ab", "c")),
        (b"", [1, 2], ("a", "bc")),
        "Written one after another both are abc: repr(extra_keys) keeps them apart.",
    ),
    (
        (b"", [1, 2], (None, "None")),
        (b"", [1, 2], _NONE),
        "A salt may be the word None: repr(extra_keys) keeps it apart from no salt.",
    ),
)


def verify_hash_block(answer: Callable[..., Any], rng: random.Random) -> None:
    """Equal contents have equal names, all others different ones; by pairs, then at random."""
    name = answer(b"", [1, 2, 3], _NONE)
    if not isinstance(name, bytes):
        raise Mismatch(
            f"hash_block(b'', [1, 2, 3], (None, None)) returned {name!r}, expected bytes",
            "hashlib.blake2b(data, digest_size=32).digest() gives 32 bytes.",
        )
    if len(name) < 16 or any(
        "hash" in names_in(f.__code__) and f.__globals__.get("hash", hash) is builtins.hash
        for f in own_functions(answer)
    ):
        raise Mismatch(
            f"a name of {len(name)} bytes"
            + (", expected at least 16" if len(name) < 16 else " made with Python's hash()"),
            "Names must not collide by accident nor by intent, or one tenant reads another's "
            "cache: use a cryptographic hash, such as hashlib.blake2b with digest_size=32.",
        )
    for _ in range(3):
        tokens = [rng.randrange(100_000) for _ in range(4)]
        again = answer(bytes(name), [*tokens], ("fr", "s"))
        if answer(name, tokens, ("fr", "s")) != again:
            raise Mismatch(
                f"hash_block(..., {tokens}, ('fr', 's')) gave two names in two calls",
                "The name may depend on the three arguments only.",
            )
    for one, other, hint in _DIFFERENT:
        if answer(*one) == answer(*other):
            raise Mismatch(f"hash_block{one} and hash_block{other} gave the same name", hint)
    _compare_chains(answer, rng)


def _compare_chains(answer: Callable[..., Any], rng: random.Random) -> None:
    contents: dict[bytes, tuple[Any, ...]] = {}
    for _ in range(60):
        keys = (rng.choice((None, "fr")), rng.choice((None, "a", "b")))
        parent = b""
        tokens: tuple[int, ...] = ()
        for _ in range(rng.randint(1, 4)):
            block = [rng.choice((0, 1, 7, 70_000)) for _ in range(2)]
            parent, tokens = answer(parent, block, keys), (*tokens, *block)
            if contents.setdefault(parent, (tokens, keys)) != (tokens, keys):
                raise Mismatch(
                    f"a block at the end of {tokens} with keys {keys} has the name of one at the "
                    f"end of {contents[parent][0]} with keys {contents[parent][1]}",
                    "The name covers the parent's name, the tokens and the keys, each in order.",
                )


EXERCISES = (
    Exercise(
        id="B2.1",
        title="reserved and paged",
        points=2,
        verify=verify_accounting,
        reference="course_lib.sizing.memory:paged_kv_accounting",
        hints=(
            "Everything is counted in whole blocks. How many blocks does one request take, with a "
            "reservation of the longest length, and with what it really has?",
            "Round up: -(-tokens // tokens_per_block). A reservation is the same for every "
            "request; pages differ, so round up for each one and add up.",
            "reserved_tokens_avoided = (fixed blocks - paged blocks) * tokens_per_block. Raise the "
            "ValueError first, if max(cached_tokens) is too large.",
        ),
    ),
    Exercise(
        id="B2.2",
        title="the name of a block",
        points=2,
        verify=verify_hash_block,
        reference="course_lib.engine.block_pool_base:hash_block",
        hints=(
            "A hash object takes data piece by piece: hasher.update(more_bytes). Give it the name "
            "of the parent, the tokens, the extra keys; return hasher.digest().",
            "Tokens become bytes of a fixed width with numpy.asarray(token_ids, 'int64').tobytes() "
            "or array.array('q', token_ids).tobytes().",
            "Keys become unmistakable bytes with repr(extra_keys).encode().",
        ),
    ),
    Exercise(
        id="B2.3",
        title="the block pool",
        points=6,
        verify=verify_block_pool,
        reference="course_lib.engine.block_pool:BlockPool",
        hints=(
            "Write a helper that counts the free blocks a request needs for so many tokens: "
            "ceil(tokens / block_size) - blocks it has - prefix blocks, not below 0, plus the "
            "prefix blocks whose reference count is 0. can_admit and allocate both ask it first.",
            "allocate: False if too few are free. Then take back the prefix blocks (off the free "
            "list if nobody owned them, count + 1), then take new ones from the front of the free "
            "list (forget what they held, count = 1), then name the full blocks.",
            "Naming: min(tokens in all, request.num_tokens) // block_size blocks are full and "
            "certain. For those from request.num_final_blocks on: if the hash is not in "
            "cached_blocks yet, enter it there and in block_hashes.",
            "free: go through reversed(request.block_ids); count - 1; at 0 put the block at the "
            "end of free_blocks, or with move_to_end(block, last=False) at the front if it has no "
            "hash. Then empty block_ids and set num_final_blocks to 0.",
        ),
        part="block_pool",
    ),
)
