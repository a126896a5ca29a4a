"""The block pool's tables: what each block holds, who finds it by which name, which are free.

`BlockPoolBase` keeps them and decides nothing. A block pool derives from it and implements
`match_prefix`, `can_admit`, `allocate` and `free`; the engine's own is in `block_pool`. The base is
not abstract: a method that a student has not written yet says so when it is called.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence

from course_lib.engine.request import Request

_BYTES_PER_TOKEN = struct.calcsize("q")

#: Padding in a block table points here. Never handed out, not counted in `usage`.
NULL_BLOCK = 0


def hash_block(
    parent_hash: bytes, token_ids: Sequence[int], extra_keys: tuple[str | None, ...] = ()
) -> bytes:
    """Name of a full block: a cryptographic hash of all that its keys and values depend on.

    Args:
        parent_hash: hash of the block before it, empty for the first one.
        token_ids: the block's tokens.
        extra_keys: what else changes the contents or must keep tenants apart: LoRA name, salt.
    """
    return _digest(parent_hash, _as_bytes(token_ids), repr(extra_keys).encode())


def _as_bytes(token_ids: Sequence[int]) -> bytes:
    return struct.pack(f"{len(token_ids)}q", *token_ids)


def _digest(parent_hash: bytes, tokens: bytes, extra: bytes) -> bytes:
    # Of the cryptographic hashes the one that processors have instructions for.
    return hashlib.sha256(parent_hash + tokens + extra).digest()


class BlockPoolBase:
    """The blocks of a KV cache, all of them free and empty at first.

    `ref_counts` and `block_hashes` have an entry for each block: how many requests own it, and the
    hash of what it holds, None if that cannot be reused. `cached_blocks` finds a block by its hash.
    `free_blocks` holds those that nobody owns, the next one to be reused first.

    Args:
        num_blocks: blocks of the cache, the null block included; at least 2.
        block_size: tokens in a block; at least 1.
        enable_prefix_caching: whether full blocks may be shared and reused.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True
    ) -> None:
        if num_blocks < 2:
            raise ValueError(
                f"num_blocks must be at least 2 (block 0 only serves as padding), got {num_blocks}"
            )
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, got {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.ref_counts = [0] * num_blocks
        self.block_hashes: list[bytes | None] = [None] * num_blocks
        self.cached_blocks: dict[bytes, int] = {}
        # An OrderedDict is a doubly linked list with an index: the front is reused first, and a
        # block that is taken back leaves from the middle in constant time.
        self.free_blocks: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_free_blocks(self) -> int:
        """Blocks nobody owns, cached ones included."""
        return len(self.free_blocks)

    @property
    def usage(self) -> float:
        """Share of the blocks that requests own, 0 to 1."""
        return 1 - len(self.free_blocks) / (self.num_blocks - 1)

    def match_prefix(self, request: Request) -> list[int]:
        """Ids of the cached blocks that hold the request's beginning. Changes nothing."""
        raise NotImplementedError

    def can_admit(self, request: Request, prefix_blocks: Sequence[int] = ()) -> bool:
        """Whether the request's whole known sequence fits into what is free now."""
        raise NotImplementedError

    def allocate(
        self, request: Request, num_new_tokens: int, prefix_blocks: Sequence[int] = ()
    ) -> bool:
        """Give the request room for its next tokens; False, and nothing changed, if there is none.

        Args:
            request: its computed tokens already have blocks, unless they are in `prefix_blocks`.
            num_new_tokens: tokens that this step computes.
            prefix_blocks: the result of `match_prefix`, for a request that owns nothing yet.
        """
        raise NotImplementedError

    def free(self, request: Request) -> None:
        """Give up all blocks of the request, which may have none."""
        raise NotImplementedError

    def reset_prefix_cache(self) -> None:
        """Forget what the blocks hold. Requests should own none; the scheduler sees to that."""
        self.cached_blocks.clear()
        self.block_hashes = [None] * self.num_blocks

    def hashes_of(self, request: Request, num_blocks: int) -> list[bytes]:
        """Hashes of the request's first `num_blocks` blocks, each computed once in its life."""
        hashes, size = request.block_hashes, self.block_size
        if len(hashes) < num_blocks:
            # As `hash_block` does, but the tokens of all blocks become bytes at once.
            data = _as_bytes(request.token_ids[len(hashes) * size : num_blocks * size])
            width = size * _BYTES_PER_TOKEN
            extra = repr((request.lora_name, request.cache_salt)).encode()
            parent = hashes[-1] if hashes else b""
            for start in range(0, len(data), width):
                parent = _digest(parent, data[start : start + width], extra)
                hashes.append(parent)
        return hashes[:num_blocks]
