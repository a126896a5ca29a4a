"""Who owns which page of the KV cache (PagedAttention, Kwon et al., SOSP 2023).

The cache is cut into blocks of `block_size` tokens. A request holds a list of block ids, its block
table. Full blocks are known by a hash over everything that led to them, so that a later request
with the same beginning shares them instead of computing them again (prefix caching).

A block is in one of three states: owned (reference count above 0), free and empty, or free and
still cached, in which case it can be taken back until the space is needed. `free_blocks` holds the
free ones in the order in which they will be reused.

The protocol of a part that replaces `BlockPool`: `match_prefix`, `can_admit`, `allocate`, `free`,
`reset_prefix_cache`, the attributes `num_blocks`, `block_size`, `usage`, and the rule that a call
that fails changes nothing.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from course_lib.engine.request import Request

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
    digest = hashlib.blake2b(parent_hash, digest_size=32)
    digest.update(array("q", token_ids).tobytes())
    digest.update(repr(extra_keys).encode())
    return digest.digest()


class BlockPool:
    """Hands out blocks, counts their owners and remembers what the full ones hold.

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
        """Ids of the cached blocks that hold the request's beginning. Changes nothing.

        Stops at the first miss. Never covers all known tokens: the last one is always computed,
        so that there are logits to sample from.
        """
        if not self.enable_prefix_caching:
            return []
        blocks: list[int] = []
        num_full_blocks = (request.num_tokens - 1) // self.block_size
        self._extend_hashes(request, num_full_blocks)
        for block_hash in request.block_hashes[:num_full_blocks]:
            block = self.cached_blocks.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_admit(self, request: Request, prefix_blocks: Sequence[int] = ()) -> bool:
        """Whether the request's whole known sequence fits into what is free now."""
        num_missing = self._num_missing_blocks(request, request.num_tokens, prefix_blocks)
        return num_missing <= self.num_free_blocks

    def allocate(
        self, request: Request, num_new_tokens: int, prefix_blocks: Sequence[int] = ()
    ) -> bool:
        """Give the request room for its next `num_new_tokens` tokens.

        Args:
            request: its computed tokens already have blocks, unless they are in `prefix_blocks`.
            num_new_tokens: tokens that this step computes.
            prefix_blocks: the result of `match_prefix`, for a request that owns nothing yet.

        Returns:
            False if there are not enough free blocks; then nothing has changed.
        """
        num_cached_tokens = len(prefix_blocks) * self.block_size
        num_tokens = request.num_computed_tokens + num_cached_tokens + num_new_tokens
        if self._num_missing_blocks(request, num_tokens, prefix_blocks) > self.num_free_blocks:
            return False
        for block in prefix_blocks:
            self._take_back(block)
        request.block_ids.extend(prefix_blocks)
        request.num_final_blocks += len(prefix_blocks)
        while len(request.block_ids) * self.block_size < num_tokens:
            request.block_ids.append(self._take_free_block())
        if self.enable_prefix_caching:
            self._cache_full_blocks(request, num_tokens)
        return True

    def free(self, request: Request) -> None:
        """Give up all blocks of the request.

        They join the end of the free list last block first, so that the tail of a sequence is
        evicted before its beginning. Those that hold nothing reusable go to the front.
        """
        for block in reversed(request.block_ids):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free_blocks[block] = None
                if self.block_hashes[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        request.block_ids.clear()
        request.num_final_blocks = 0

    def reset_prefix_cache(self) -> None:
        """Forget what the blocks hold. Requests should own none; the scheduler sees to that."""
        self.cached_blocks.clear()
        self.block_hashes = [None] * self.num_blocks

    def _num_missing_blocks(
        self, request: Request, num_tokens: int, prefix_blocks: Sequence[int]
    ) -> int:
        """Free blocks it takes for the request to hold `num_tokens`.

        A hit on a cached block that nobody owns takes it off the free list too.
        """
        num_there = len(request.block_ids) + len(prefix_blocks)
        num_blocks = -(-num_tokens // self.block_size)
        num_hits_on_free = sum(self.ref_counts[block] == 0 for block in prefix_blocks)
        return max(0, num_blocks - num_there) + num_hits_on_free

    def _take_back(self, block: int) -> None:
        if self.ref_counts[block] == 0:
            del self.free_blocks[block]
        self.ref_counts[block] += 1

    def _take_free_block(self) -> int:
        block, _ = self.free_blocks.popitem(last=False)
        block_hash = self.block_hashes[block]
        if block_hash is not None:  # eviction happens only now that the space is needed
            del self.cached_blocks[block_hash]
            self.block_hashes[block] = None
        self.ref_counts[block] = 1
        return block

    def _cache_full_blocks(self, request: Request, num_tokens: int) -> None:
        """Make the blocks that this step fills findable, already for requests of the same step.

        Draft tokens may be rejected and overwritten, so a block with one of them is not final. A
        block whose contents another block has already stays private: duplicates are not merged.
        """
        num_full_blocks = min(num_tokens, request.num_tokens) // self.block_size
        self._extend_hashes(request, num_full_blocks)
        for index in range(request.num_final_blocks, num_full_blocks):
            block, block_hash = request.block_ids[index], request.block_hashes[index]
            if block_hash not in self.cached_blocks:
                self.block_hashes[block] = block_hash
                self.cached_blocks[block_hash] = block
        request.num_final_blocks = num_full_blocks

    def _extend_hashes(self, request: Request, num_blocks: int) -> None:
        """Hash the request's first `num_blocks` blocks, each once in its life."""
        extra_keys = (request.lora_name, request.cache_salt)
        for index in range(len(request.block_hashes), num_blocks):
            parent = request.block_hashes[-1] if request.block_hashes else b""
            start = index * self.block_size
            tokens = request.token_ids[start : start + self.block_size]
            request.block_hashes.append(hash_block(parent, tokens, extra_keys))
