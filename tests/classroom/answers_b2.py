"""Answers to the exercises of B2: right ones in several styles, and wrong ones of typical kinds."""

import hashlib
import math
import uuid
from collections import deque

import numpy as np

from course_lib.engine.block_pool_base import BlockPoolBase
from course_lib.sizing.memory import KvAccounting


def accounting_by_formula(cached_tokens, max_tokens_per_request, tokens_per_block):
    """Right: ceilings."""
    if any(tokens > max_tokens_per_request for tokens in cached_tokens):
        raise ValueError(f"cached_tokens must be at most {max_tokens_per_request}")
    reserved = math.ceil(max_tokens_per_request / tokens_per_block) * len(cached_tokens)
    paged = sum(math.ceil(tokens / tokens_per_block) for tokens in cached_tokens)
    return KvAccounting(sum(cached_tokens), reserved, paged, (reserved - paged) * tokens_per_block)


def accounting_one_by_one(cached_tokens, max_tokens_per_request, tokens_per_block):
    """Right: a loop over the requests, whole blocks and the rest apart."""
    used = reserved = paged = 0
    for index, tokens in enumerate(cached_tokens):
        if tokens > max_tokens_per_request:
            raise ValueError(f"cached_tokens[{index}] is {tokens}")
        used += tokens
        for length, kind in ((max_tokens_per_request, "reserved"), (tokens, "paged")):
            whole, rest = divmod(length, tokens_per_block)
            blocks = whole + (rest > 0)
            if kind == "reserved":
                reserved += blocks
            else:
                paged += blocks
    avoided = reserved * tokens_per_block - paged * tokens_per_block
    return KvAccounting(used, reserved, paged, avoided)


def accounting_rounds_down(cached_tokens, max_tokens_per_request, tokens_per_block):
    right = accounting_by_formula(cached_tokens, max_tokens_per_request, tokens_per_block)
    paged = sum(tokens // tokens_per_block for tokens in cached_tokens)
    avoided = (right.fixed_reservation_blocks - paged) * tokens_per_block
    return KvAccounting(right.used_tokens, right.fixed_reservation_blocks, paged, avoided)


def accounting_one_block_more(cached_tokens, max_tokens_per_request, tokens_per_block):
    """A request that fills its last block exactly gets another one."""
    right = accounting_by_formula(cached_tokens, max_tokens_per_request, tokens_per_block)
    paged = sum(tokens // tokens_per_block + 1 for tokens in cached_tokens)
    avoided = (right.fixed_reservation_blocks - paged) * tokens_per_block
    return KvAccounting(right.used_tokens, right.fixed_reservation_blocks, paged, avoided)


def accounting_of_the_sum(cached_tokens, max_tokens_per_request, tokens_per_block):
    right = accounting_by_formula(cached_tokens, max_tokens_per_request, tokens_per_block)
    paged = -(-sum(cached_tokens) // tokens_per_block)
    avoided = (right.fixed_reservation_blocks - paged) * tokens_per_block
    return KvAccounting(right.used_tokens, right.fixed_reservation_blocks, paged, avoided)


def accounting_without_rounding_the_reservation(
    cached_tokens, max_tokens_per_request, tokens_per_block
):
    right = accounting_by_formula(cached_tokens, max_tokens_per_request, tokens_per_block)
    fixed = len(cached_tokens) * max_tokens_per_request // tokens_per_block
    avoided = (fixed - right.paged_blocks) * tokens_per_block
    return KvAccounting(right.used_tokens, fixed, right.paged_blocks, avoided)


def accounting_avoided_in_blocks(cached_tokens, max_tokens_per_request, tokens_per_block):
    right = accounting_by_formula(cached_tokens, max_tokens_per_request, tokens_per_block)
    blocks = right.fixed_reservation_blocks - right.paged_blocks
    return KvAccounting(
        right.used_tokens, right.fixed_reservation_blocks, right.paged_blocks, blocks
    )


def accounting_lets_requests_outgrow(cached_tokens, max_tokens_per_request, tokens_per_block):
    fixed = -(-max_tokens_per_request // tokens_per_block) * len(cached_tokens)
    paged = sum(-(-tokens // tokens_per_block) for tokens in cached_tokens)
    return KvAccounting(sum(cached_tokens), fixed, paged, (fixed - paged) * tokens_per_block)


def accounting_constant(cached_tokens, max_tokens_per_request, tokens_per_block):
    return KvAccounting(1545, 512, 99, 6608)


def name_sha256(parent_hash, token_ids, extra_keys=()):
    """Right: text, with commas between the tokens."""
    text = f"{parent_hash.hex()}|{','.join(str(int(t)) for t in token_ids)}|{extra_keys!r}"
    return hashlib.sha256(text.encode()).digest()


def name_blake(parent_hash, token_ids, extra_keys=()):
    """Right: bytes of a fixed width."""
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(len(parent_hash).to_bytes(8, "big") + parent_hash)
    hasher.update(np.asarray(token_ids, dtype=np.int64).tobytes())
    for key in extra_keys:
        data = b"" if key is None else key.encode()
        hasher.update(b"-" if key is None else b"+" + len(data).to_bytes(8, "big") + data)
    return hasher.digest()


def name_without_parent(parent_hash, token_ids, extra_keys=()):
    return name_sha256(b"", token_ids, extra_keys)


def name_without_keys(parent_hash, token_ids, extra_keys=()):
    return name_sha256(parent_hash, token_ids)


def name_of_sorted_tokens(parent_hash, token_ids, extra_keys=()):
    return name_sha256(parent_hash, sorted(token_ids), extra_keys)


def name_of_a_set(parent_hash, token_ids, extra_keys=()):
    return name_sha256(parent_hash, sorted(set(token_ids)), extra_keys)


def name_without_commas(parent_hash, token_ids, extra_keys=()):
    text = parent_hash.hex() + "".join(map(str, token_ids)) + repr(extra_keys)
    return hashlib.sha256(text.encode()).digest()


def name_of_small_tokens(parent_hash, token_ids, extra_keys=()):
    return name_sha256(parent_hash, [token % 256 for token in token_ids], extra_keys)


def name_with_joined_keys(parent_hash, token_ids, extra_keys=()):
    return name_sha256(parent_hash, token_ids, "".join(map(str, extra_keys)))


def name_by_python(parent_hash, token_ids, extra_keys=()):
    return str(hash((parent_hash, tuple(token_ids), extra_keys))).encode().rjust(20)


def name_too_short(parent_hash, token_ids, extra_keys=()):
    return name_sha256(parent_hash, token_ids, extra_keys)[:4]


def name_in_hex(parent_hash, token_ids, extra_keys=()):
    return name_sha256(parent_hash, token_ids, extra_keys).hex()


def name_at_random(parent_hash, token_ids, extra_keys=()):
    return uuid.uuid4().bytes


class PlainPool(BlockPoolBase):
    """Right: on the tables of the base class, in small methods that the wrong ones change."""

    def most_hits(self, request):
        return (request.num_tokens - 1) // self.block_size

    def match_prefix(self, request):
        hits = []
        if self.enable_prefix_caching:
            for name in self.hashes_of(request, self.most_hits(request)):
                if name not in self.cached_blocks:
                    return hits
                hits.append(self.cached_blocks[name])
        return hits

    def needed(self, request, num_tokens, prefix_blocks):
        blocks = -(-num_tokens // self.block_size)
        needed = max(0, blocks - len(request.block_ids) - len(prefix_blocks))
        return needed + [self.ref_counts[block] for block in prefix_blocks].count(0)

    def can_admit(self, request, prefix_blocks=()):
        return self.needed(request, request.num_tokens, prefix_blocks) <= len(self.free_blocks)

    def allocate(self, request, num_new_tokens, prefix_blocks=()):
        total = request.num_computed_tokens + num_new_tokens
        total += len(prefix_blocks) * self.block_size
        if self.needed(request, total, prefix_blocks) > len(self.free_blocks):
            return False
        for block in prefix_blocks:
            self.share(block)
            request.block_ids.append(block)
            request.num_final_blocks += 1
        missing = -(-total // self.block_size) - len(request.block_ids)
        for _ in range(missing):
            request.block_ids.append(self.next_block())
        self.name_blocks(request, total)
        return True

    def share(self, block):
        self.free_blocks.pop(block, None)
        self.ref_counts[block] += 1

    def next_block(self):
        block = next(iter(self.free_blocks))
        del self.free_blocks[block]
        self.forget(block)
        self.ref_counts[block] = 1
        return block

    def forget(self, block):
        if self.block_hashes[block] is not None:
            del self.cached_blocks[self.block_hashes[block]]
            self.block_hashes[block] = None

    def num_full(self, request, total):
        return min(total, request.num_tokens) // self.block_size

    def name_blocks(self, request, total):
        if not self.enable_prefix_caching:
            return
        names = self.hashes_of(request, self.num_full(request, total))
        for index, name in enumerate(names):
            if index >= request.num_final_blocks:
                self.give_name(request.block_ids[index], name)
        request.num_final_blocks = len(names)

    def give_name(self, block, name):
        if name not in self.cached_blocks:
            self.cached_blocks[name] = block
            self.block_hashes[block] = name

    def order_of_freeing(self, request):
        return request.block_ids[::-1]

    def free(self, request):
        for block in self.order_of_freeing(request):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.put_back(block)
        request.block_ids.clear()
        request.num_final_blocks = 0

    def put_back(self, block):
        self.free_blocks[block] = None
        if self.block_hashes[block] is None:
            self.free_blocks.move_to_end(block, last=False)


class PoolOfItsOwn:
    """Right: no base class, lists and sets of its own, contents as keys, names given anew."""

    def __init__(self, num_blocks, block_size, *, enable_prefix_caching=True):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.reuse = enable_prefix_caching
        self.blank = deque(range(num_blocks - 1, 0, -1))
        self.kept = []  # free, with contents; the oldest first
        self.owners = dict.fromkeys(range(1, num_blocks), 0)
        self.where = {}  # contents -> block

    @property
    def usage(self):
        return sum(count > 0 for count in self.owners.values()) / (self.num_blocks - 1)

    def contents(self, request, index):
        tokens = tuple(request.token_ids[: self.block_size * (index + 1)])
        return request.cache_salt, request.lora_name, tokens

    def match_prefix(self, request):
        hits = []
        while self.reuse and self.block_size * (len(hits) + 1) <= request.num_tokens - 1:
            found = self.where.get(self.contents(request, len(hits)))
            if found is None:
                break
            hits.append(found)
        return tuple(hits)

    def room_for(self, request, tokens, prefix_blocks):
        there = len(request.block_ids) + len(prefix_blocks)
        new = max(0, math.ceil(tokens / self.block_size) - there)
        unowned = [block for block in prefix_blocks if not self.owners[block]]
        return new + len(unowned) <= len(self.blank) + len(self.kept)

    def can_admit(self, request, prefix_blocks=()):
        return self.room_for(request, len(request.token_ids), prefix_blocks)

    def allocate(self, request, num_new_tokens, prefix_blocks=()):
        tokens = len(prefix_blocks) * self.block_size + request.num_computed_tokens + num_new_tokens
        if not self.room_for(request, tokens, prefix_blocks):
            return False
        self.kept = [block for block in self.kept if block not in prefix_blocks]
        table = [*request.block_ids, *prefix_blocks]
        while len(table) * self.block_size < tokens:
            if self.blank:
                table.append(self.blank.pop())
            else:
                table.append(self.kept.pop(0))
                self.where = {c: b for c, b in self.where.items() if b != table[-1]}
        for block in table[len(request.block_ids) :]:
            self.owners[block] += 1
        request.block_ids = table
        certain = min(tokens, len(request.token_ids))
        for index in range(certain // self.block_size if self.reuse else 0):
            self.where.setdefault(self.contents(request, index), table[index])
        return True

    def free(self, request):
        while request.block_ids:
            block = request.block_ids.pop()
            self.owners[block] -= 1
            if not self.owners[block]:
                named = block in self.where.values()
                (self.kept if named else self.blank).append(block)

    def reset_prefix_cache(self):
        self.where = {}
        self.blank.extend(self.kept)
        self.kept = []


class StaleBlockReused(PlainPool):
    """Hands out a cached block and leaves its name."""

    def forget(self, block):
        self.block_hashes[block] = None


class CoversTheWholePrompt(PlainPool):
    def most_hits(self, request):
        return request.num_tokens // self.block_size


class FirstBlockOnly(PlainPool):
    def match_prefix(self, request):
        return super().match_prefix(request)[:1]


class JumpsOverMisses(PlainPool):
    def match_prefix(self, request):
        names = self.hashes_of(request, self.most_hits(request)) * self.enable_prefix_caching
        return [self.cached_blocks[name] for name in names if name in self.cached_blocks]


class NoReferenceCounts(PlainPool):
    """The first owner who leaves frees a shared block."""

    def free(self, request):
        for block in self.order_of_freeing(request):
            if self.ref_counts[block]:
                self.ref_counts[block] = 0
                self.put_back(block)
        request.block_ids.clear()
        request.num_final_blocks = 0


class CountsNoHits(PlainPool):
    def share(self, block):
        self.free_blocks.pop(block, None)
        self.ref_counts[block] = 1


class LeavesHitsOnTheFreeList(PlainPool):
    def share(self, block):
        self.ref_counts[block] += 1


class HitsCostNothing(PlainPool):
    """Takes cached free blocks for a gift, and runs out of blocks on the way."""

    def needed(self, request, num_tokens, prefix_blocks):
        blocks = -(-num_tokens // self.block_size)
        return max(0, blocks - len(request.block_ids) - len(prefix_blocks))


class BeginningFirst(PlainPool):
    """Frees in the order of the table, so that the beginning is evicted first."""

    def order_of_freeing(self, request):
        return list(request.block_ids)


class LastFreedFirst(PlainPool):
    def put_back(self, block):
        self.free_blocks[block] = None
        self.free_blocks.move_to_end(block, last=False)


class EmptyOnesLast(PlainPool):
    def put_back(self, block):
        self.free_blocks[block] = None


class ForgetsAtOnce(PlainPool):
    """Not lazy: what nobody owns is gone."""

    def put_back(self, block):
        self.forget(block)
        super().put_back(block)


class OneBlockTooMany(PlainPool):
    """Another block behind one that is exactly full."""

    def needed(self, request, num_tokens, prefix_blocks):
        return super().needed(request, num_tokens + 1, prefix_blocks)

    def allocate(self, request, num_new_tokens, prefix_blocks=()):
        done = super().allocate(request, num_new_tokens, prefix_blocks)
        total = request.num_computed_tokens + num_new_tokens
        total += len(prefix_blocks) * self.block_size
        if done and len(request.block_ids) * self.block_size == total:
            request.block_ids.append(self.next_block())
        return done


class OneBlockTooFew(PlainPool):
    def allocate(self, request, num_new_tokens, prefix_blocks=()):
        return super().allocate(request, max(1, num_new_tokens - 1), prefix_blocks)


class NamesPartialBlocks(PlainPool):
    def num_full(self, request, total):
        return -(-min(total, request.num_tokens) // self.block_size)


class NamesWhatIsNotComputed(PlainPool):
    """All full blocks of the prompt at the first chunk, as far as there are blocks."""

    def num_full(self, request, total):
        blocks = len(request.block_ids)
        return min(blocks, request.num_tokens // self.block_size)


class NamesGuesses(PlainPool):
    def num_full(self, request, total):
        return total // self.block_size

    def hashes_of(self, request, num_blocks):
        known = request.token_ids
        request.token_ids = known + [0] * (num_blocks * self.block_size - len(known))
        names = super().hashes_of(request, num_blocks)
        request.token_ids = known
        return names


class NewestCopyHasTheName(PlainPool):
    def give_name(self, block, name):
        old = self.cached_blocks.get(name)
        if old is not None:
            self.block_hashes[old] = None
        self.cached_blocks[name], self.block_hashes[block] = block, name


class FailsHalfway(PlainPool):
    """Hands out blocks until none is left, and only then says no."""

    def allocate(self, request, num_new_tokens, prefix_blocks=()):
        total = request.num_computed_tokens + num_new_tokens
        total += len(prefix_blocks) * self.block_size
        for block in prefix_blocks:
            self.share(block)
        request.block_ids += prefix_blocks
        request.num_final_blocks += len(prefix_blocks)
        while len(request.block_ids) * self.block_size < total:
            if not self.free_blocks:
                return False
            request.block_ids.append(self.next_block())
        self.name_blocks(request, total)
        return True


class KeepsHitsOnFailure(PlainPool):
    """Takes back the prefix before it finds out that the rest does not fit."""

    def allocate(self, request, num_new_tokens, prefix_blocks=()):
        done = super().allocate(request, num_new_tokens, prefix_blocks)
        if not done:
            for block in prefix_blocks:
                self.share(block)
        return done


class RefreshesOnLookup(PlainPool):
    """A lookup counts as use, and so changes the order of eviction."""

    def match_prefix(self, request):
        hits = super().match_prefix(request)
        for block in hits:
            if block in self.free_blocks:
                self.free_blocks.move_to_end(block)
        return hits


class RaisesInsteadOfFalse(PlainPool):
    def allocate(self, request, num_new_tokens, prefix_blocks=()):
        if not super().allocate(request, num_new_tokens, prefix_blocks):
            raise MemoryError("no free block")
        return True


class ReturnsNothing(PlainPool):
    def allocate(self, request, num_new_tokens, prefix_blocks=()):
        super().allocate(request, num_new_tokens, prefix_blocks)


class AdmitsByFirstChunk(PlainPool):
    def can_admit(self, request, prefix_blocks=()):
        return len(self.free_blocks) > 0


class ForgetsTenants(PlainPool):
    def hashes_of(self, request, num_blocks):
        salt, lora = request.cache_salt, request.lora_name
        request.cache_salt = request.lora_name = None
        names = super().hashes_of(request, num_blocks)
        request.cache_salt, request.lora_name = salt, lora
        return names


class NamesByTokensAlone(PlainPool):
    """Without what stands before."""

    def hashes_of(self, request, num_blocks):
        size = self.block_size
        starts = range(0, num_blocks * size, size)
        keys = (request.lora_name, request.cache_salt)
        return [(tuple(request.token_ids[start : start + size]), keys) for start in starts]


class UsesTheNullBlock(PlainPool):
    def __init__(self, num_blocks, block_size, *, enable_prefix_caching=True):
        super().__init__(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        self.free_blocks[0] = None
        self.free_blocks.move_to_end(0, last=False)
        del self.free_blocks[num_blocks - 1]


class KeepsTheTable(PlainPool):
    """Frees the blocks, but the request still thinks that it has them."""

    def free(self, request):
        table = list(request.block_ids)
        super().free(request)
        request.block_ids.extend(table)


class ForgetsFinalBlocks(PlainPool):
    """After a preemption the blocks of a request are no longer named."""

    def free(self, request):
        final = request.num_final_blocks
        super().free(request)
        request.num_final_blocks = final


class NeverForgets(PlainPool):
    def reset_prefix_cache(self):
        pass


class AlwaysReuses(PlainPool):
    def __init__(self, num_blocks, block_size, *, enable_prefix_caching=True):
        super().__init__(num_blocks, block_size)


RIGHT = {
    "B2.1": [accounting_by_formula, accounting_one_by_one],
    "B2.2": [name_sha256, name_blake],
    "B2.3": [PlainPool, PoolOfItsOwn],
}
WRONG = {
    "B2.1": [
        accounting_rounds_down,
        accounting_one_block_more,
        accounting_of_the_sum,
        accounting_without_rounding_the_reservation,
        accounting_avoided_in_blocks,
        accounting_lets_requests_outgrow,
        accounting_constant,
    ],
    "B2.2": [
        name_without_parent,
        name_without_keys,
        name_of_sorted_tokens,
        name_of_a_set,
        name_without_commas,
        name_of_small_tokens,
        name_with_joined_keys,
        name_by_python,
        name_too_short,
        name_in_hex,
        name_at_random,
    ],
    "B2.3": [
        StaleBlockReused,
        CoversTheWholePrompt,
        FirstBlockOnly,
        JumpsOverMisses,
        NoReferenceCounts,
        CountsNoHits,
        LeavesHitsOnTheFreeList,
        HitsCostNothing,
        BeginningFirst,
        LastFreedFirst,
        EmptyOnesLast,
        ForgetsAtOnce,
        OneBlockTooMany,
        OneBlockTooFew,
        NamesPartialBlocks,
        NamesWhatIsNotComputed,
        NamesGuesses,
        NewestCopyHasTheName,
        FailsHalfway,
        KeepsHitsOnFailure,
        RefreshesOnLookup,
        RaisesInsteadOfFalse,
        ReturnsNothing,
        AdmitsByFirstChunk,
        ForgetsTenants,
        NamesByTokensAlone,
        UsesTheNullBlock,
        KeepsTheTable,
        ForgetsFinalBlocks,
        NeverForgets,
        AlwaysReuses,
        accounting_constant,
    ],
}
