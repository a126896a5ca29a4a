"""Who owns which page of the KV cache (PagedAttention, Kwon et al., SOSP 2023).

The cache is cut into blocks of `block_size` tokens. A request holds a list of block ids, its block
table. Full blocks are known by a hash over everything that led to them, so that a later request
with the same beginning shares them instead of computing them again (prefix caching).

A block is in one of three states: owned (reference count above 0), free and empty, or free and
still cached, in which case it can be taken back until the space is needed. `free_blocks` holds the
free ones in the order in which they will be reused.

The protocol of a part that replaces `BlockPool`: `match_prefix`, `can_admit`, `allocate`, `free`,
`reset_prefix_cache`, the attributes `num_blocks`, `block_size`, `usage`, and the rule that a call
that fails changes nothing. A class derived from `BlockPoolBase`, which keeps the tables, needs only
the first four. `request.block_ids` is the block table: `allocate` extends it, `free` empties it.
"""

from collections.abc import Sequence

from course_lib.engine.block_pool_base import NULL_BLOCK, BlockPoolBase
from course_lib.engine.request import Request

__all__ = ["NULL_BLOCK", "BlockPool"]


class BlockPool(BlockPoolBase):
    """Hands out blocks, counts their owners and remembers what the full ones hold."""

    def match_prefix(self, request: Request) -> list[int]:
        """Ids of the cached blocks that hold the request's beginning. Changes nothing.

        Stops at the first miss. Never covers all known tokens: the last one is always computed,
        so that there are logits to sample from.
        """
        if not self.enable_prefix_caching:
            return []
        blocks: list[int] = []
        num_full_blocks = (request.num_tokens - 1) // self.block_size
        for block_hash in self.hashes_of(request, num_full_blocks):
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
        size, block_ids = self.block_size, request.block_ids
        num_tokens = request.num_computed_tokens + len(prefix_blocks) * size + num_new_tokens
        if prefix_blocks or num_tokens > len(block_ids) * size:
            if self._num_missing_blocks(request, num_tokens, prefix_blocks) > len(self.free_blocks):
                return False
            for block in prefix_blocks:
                self._take_back(block)
            block_ids.extend(prefix_blocks)
            request.num_final_blocks += len(prefix_blocks)
            num_missing = -(-num_tokens // size) - len(block_ids)
            block_ids.extend([self._take_free_block() for _ in range(num_missing)])
        if self.enable_prefix_caching:
            # Draft tokens may be rejected and overwritten: a block with one of them is not final.
            num_final_blocks = min(num_tokens, request.num_tokens) // size
            if num_final_blocks > request.num_final_blocks:
                self._cache_final_blocks(request, num_final_blocks)
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

    def _num_missing_blocks(
        self, request: Request, num_tokens: int, prefix_blocks: Sequence[int]
    ) -> int:
        """Free blocks it takes for the request to hold `num_tokens`.

        A hit on a cached block that nobody owns takes it off the free list too.
        """
        num_there = len(request.block_ids) + len(prefix_blocks)
        num_missing = max(0, -(-num_tokens // self.block_size) - num_there)
        if prefix_blocks:
            num_missing += sum(self.ref_counts[block] == 0 for block in prefix_blocks)
        return num_missing

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

    def _cache_final_blocks(self, request: Request, num_final_blocks: int) -> None:
        """Make the blocks that this step fills findable, already for requests of the same step.

        A block whose contents another block has already stays private: duplicates are not merged.
        """
        hashes = self.hashes_of(request, num_final_blocks)
        for index in range(request.num_final_blocks, num_final_blocks):
            block, block_hash = request.block_ids[index], hashes[index]
            if block_hash not in self.cached_blocks:
                self.block_hashes[block] = block_hash
                self.cached_blocks[block_hash] = block
        request.num_final_blocks = num_final_blocks
