"""Who owns which page of the KV cache: the rules of the block pool, one by one."""

import copy
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.engine.block_pool import NULL_BLOCK, BlockPool
from course_lib.engine.block_pool_base import hash_block
from course_lib.engine.request import Request

BLOCK_SIZE = 4


def request(token_ids: list[int], **options: object) -> Request:
    return Request("r", token_ids, **options)


def pool_of(num_usable_blocks: int, block_size: int = BLOCK_SIZE) -> BlockPool:
    return BlockPool(num_usable_blocks + 1, block_size)


def computed(pool: BlockPool, token_ids: list[int], **options: object) -> Request:
    """A request all of whose tokens have been computed."""
    r = request(token_ids, **options)
    prefix_blocks = pool.match_prefix(r)
    cached = len(prefix_blocks) * pool.block_size
    assert pool.allocate(r, r.num_tokens - cached, prefix_blocks)
    r.num_computed_tokens = r.num_tokens
    return r


def fields(pool: BlockPool, *requests: Request) -> object:
    """Everything the pool and the requests know, for comparing before with after."""
    state = copy.deepcopy([vars(pool), *map(vars, requests)])
    state[0]["free_blocks"] = list(state[0]["free_blocks"])  # equality must see the order
    return state


# Hashes: rules 9 and 10


def test_a_hash_covers_the_tokens_and_all_blocks_before() -> None:
    first, other = hash_block(b"", [1, 2]), hash_block(b"", [1, 3])
    assert first == hash_block(b"", [1, 2])
    assert first != other
    assert hash_block(first, [7, 8]) != hash_block(other, [7, 8])


def test_the_same_tokens_after_another_beginning_are_no_hit() -> None:
    pool = pool_of(8)
    pool.free(computed(pool, [1, 1, 1, 1, 5, 5, 5, 5]))
    assert pool.match_prefix(request([2, 2, 2, 2, 5, 5, 5, 5, 9])) == []
    assert pool.match_prefix(request([5, 5, 5, 5, 9])) == []


def test_a_hash_is_cryptographic() -> None:
    """Python's `hash` would do for speed, but one tenant could then find another's blocks."""
    assert hash((-1,)) == hash((-2,))
    assert hash_block(b"", [-1]) != hash_block(b"", [-2])
    assert len(hash_block(b"", [1])) >= 32


@pytest.mark.parametrize("key", ["lora_name", "cache_salt"])
def test_requests_with_other_extra_keys_share_nothing(key: str) -> None:
    pool = pool_of(12)
    tokens = [1, 2, 3, 4, 5]
    a = computed(pool, tokens, **{key: "a"})
    assert pool.match_prefix(request(tokens, **{key: "a"})) == a.block_ids[:1]
    assert pool.match_prefix(request(tokens, **{key: "b"})) == []
    assert pool.match_prefix(request(tokens)) == []
    other_key = {"lora_name": "cache_salt", "cache_salt": "lora_name"}[key]
    assert pool.match_prefix(request(tokens, **{other_key: "a"})) == []


def test_only_full_blocks_are_cached() -> None:
    pool = pool_of(8)
    r = computed(pool, [1, 2, 3, 4, 5, 6, 7])
    assert list(pool.cached_blocks.values()) == r.block_ids[:1]


def test_a_block_with_draft_tokens_is_not_cached_until_they_are_accepted() -> None:
    pool = pool_of(8)
    r = request([1, 2, 3])
    assert pool.allocate(r, 3)
    r.num_computed_tokens = 3
    r.token_ids.append(4)
    r.draft_token_ids = [5, 6, 7, 8]
    assert pool.allocate(r, 5)
    assert list(pool.cached_blocks.values()) == r.block_ids[:1]

    r.num_computed_tokens = 8  # all four accepted, and one more sampled
    r.token_ids += [5, 6, 7, 8, 9]
    r.draft_token_ids = []
    assert pool.allocate(r, 1)
    assert list(pool.cached_blocks.values()) == r.block_ids[:2]


def test_a_lookup_stops_at_the_first_miss() -> None:
    pool = pool_of(4)
    a = computed(pool, [1] * 12)
    first, second, third = a.block_ids
    pool.free(a)
    block_hash = pool.block_hashes[second]
    del pool.cached_blocks[block_hash]
    pool.block_hashes[second] = None
    assert third in pool.cached_blocks.values()
    assert pool.match_prefix(request([1] * 13)) == [first]


@pytest.mark.parametrize(("num_tokens", "num_hits"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_a_lookup_leaves_the_last_token_to_compute(num_tokens: int, num_hits: int) -> None:
    pool = pool_of(8)
    pool.free(computed(pool, [1] * 12))
    assert len(pool.match_prefix(request([1] * num_tokens))) == num_hits


def test_without_prefix_caching_nothing_is_remembered() -> None:
    pool = BlockPool(9, BLOCK_SIZE, enable_prefix_caching=False)
    pool.free(computed(pool, [1] * 12))
    assert pool.match_prefix(request([1] * 12)) == []
    assert not pool.cached_blocks


# The life of a block: rules 11 to 15


def test_a_block_is_found_as_soon_as_it_is_allocated() -> None:
    pool = pool_of(8)
    a = request([1] * 8)
    assert pool.allocate(a, 8)
    assert pool.match_prefix(request([1] * 9)) == a.block_ids


def test_a_chunk_caches_only_the_blocks_it_fills() -> None:
    pool = pool_of(8)
    r = request([1] * 12)
    for num_new, num_cached in [(3, 0), (1, 1), (3, 1), (5, 3)]:
        assert pool.allocate(r, num_new)
        assert len(pool.cached_blocks) == num_cached
        r.num_computed_tokens += num_new


@pytest.mark.parametrize("num_new", [1, 3, 4, 5, 8, 9])
def test_an_allocation_takes_as_many_blocks_as_the_tokens_need(num_new: int) -> None:
    pool = pool_of(8)
    r = request([1] * 20)
    assert pool.allocate(r, num_new)
    assert len(r.block_ids) == -(-num_new // BLOCK_SIZE)
    assert pool.num_free_blocks == 8 - len(r.block_ids)


def test_the_free_list_is_linked_so_that_a_hit_leaves_its_middle_in_constant_time() -> None:
    pool = pool_of(8)
    assert isinstance(pool.free_blocks, OrderedDict)  # a doubly linked list with an index
    pool.free(computed(pool, [1] * 9))
    before = list(pool.free_blocks)
    hits = computed(pool, [1] * 6).block_ids[:1]
    assert before.index(hits[0]) > 0
    assert not set(hits) & set(pool.free_blocks)


def test_the_tail_of_a_sequence_is_evicted_before_its_beginning() -> None:
    pool = pool_of(3)
    a = computed(pool, [1] * 12)
    first, second, third = a.block_ids
    pool.free(a)
    assert list(pool.free_blocks) == [third, second, first]
    computed(pool, [2] * 4)
    assert pool.match_prefix(request([1] * 12)) == [first, second]


def test_blocks_that_hold_nothing_reusable_are_reused_first() -> None:
    pool = pool_of(3)
    full, partial = computed(pool, [1] * 4), computed(pool, [2] * 3)
    (reusable,), (useless,) = full.block_ids, partial.block_ids
    never_used = next(iter(pool.free_blocks))
    pool.free(full)
    pool.free(partial)
    assert list(pool.free_blocks) == [useless, never_used, reusable]


def test_the_least_recently_used_is_evicted_first() -> None:
    pool = pool_of(2)
    a, b = computed(pool, [1] * 4), computed(pool, [2] * 4)
    pool.free(a)
    pool.free(b)
    again = request([1] * 5)
    pool.allocate(again, 1, pool.match_prefix(again))  # takes b's block for its last token
    pool.free(again)
    assert pool.match_prefix(request([1] * 5))
    assert not pool.match_prefix(request([2] * 5))


def test_a_hit_on_a_free_block_counts_against_free_capacity() -> None:
    pool = pool_of(3)
    pool.free(computed(pool, [1] * 8))
    r = request([1] * 13)  # two hits and two more blocks, but three are there
    hits = pool.match_prefix(r)
    assert len(hits) == 2
    assert not pool.can_admit(r, hits)
    assert not pool.allocate(r, 5, hits)


def test_a_hit_on_an_owned_block_costs_nothing() -> None:
    pool = pool_of(3)
    a = computed(pool, [1] * 8)
    r = request([1] * 12)
    hits = pool.match_prefix(r)
    assert pool.can_admit(r, hits)
    assert pool.allocate(r, 4, hits)
    assert r.block_ids[:2] == a.block_ids
    assert [pool.ref_counts[block] for block in r.block_ids] == [2, 2, 1]


def test_a_failed_allocation_changes_nothing() -> None:
    pool = pool_of(3)
    pool.free(computed(pool, [1] * 8))
    other = computed(pool, [3] * 2)
    r = request([1] * 16)
    hits = pool.match_prefix(r)
    before = fields(pool, r, other)
    assert not pool.allocate(r, 8, hits)
    assert not pool.allocate(other, 11)
    assert fields(pool, r, other) == before


@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 2)), min_size=1, max_size=8),
    num_blocks=st.integers(1, 6),
    block_size=st.integers(1, 8),
)
def test_no_failed_call_ever_changes_anything(lengths, num_blocks: int, block_size: int) -> None:
    pool = pool_of(num_blocks, block_size)
    owners = []
    for num_tokens, token in lengths:
        r = request([token] * num_tokens)
        hits = pool.match_prefix(r)
        before = fields(pool, r, *owners)
        pool.can_admit(r, hits)
        assert pool.match_prefix(r) == hits
        assert fields(pool, r, *owners) == before
        if pool.allocate(r, num_tokens - len(hits) * block_size, hits):
            r.num_computed_tokens = num_tokens
            owners.append(r)
        else:
            assert fields(pool, r, *owners) == before
            if owners:
                pool.free(owners.pop(0))
    for r in owners:
        pool.free(r)
    assert pool.usage == 0
    assert pool.ref_counts == [0] * pool.num_blocks


def test_a_cached_block_keeps_its_hash_until_the_space_is_needed() -> None:
    pool = pool_of(2)
    a = computed(pool, [1] * 4)
    (block,) = a.block_ids
    pool.free(a)
    assert pool.match_prefix(request([1] * 5)) == [block]
    computed(pool, [2] * 4)  # the empty block first
    assert pool.match_prefix(request([1] * 5)) == [block]
    computed(pool, [3] * 4)
    assert pool.match_prefix(request([1] * 5)) == []


def test_duplicate_blocks_are_not_merged() -> None:
    pool = pool_of(4)
    a, b = computed(pool, [1] * 4), computed(pool, [1] * 4)  # the last token is no hit
    assert a.block_ids != b.block_ids
    assert list(pool.cached_blocks.values()) == a.block_ids
    pool.free(b)
    assert pool.match_prefix(request([1] * 5)) == a.block_ids


def test_a_shared_block_is_free_when_its_last_owner_is_gone() -> None:
    pool = pool_of(4)
    a, b = computed(pool, [1] * 5), computed(pool, [1] * 6)
    shared = a.block_ids[0]
    assert shared == b.block_ids[0]
    pool.free(a)
    assert shared not in pool.free_blocks
    pool.free(b)
    assert shared in pool.free_blocks
    assert a.block_ids == b.block_ids == []


def test_the_null_block_is_never_handed_out_and_not_counted() -> None:
    pool = pool_of(4)
    assert pool.usage == 0
    r = computed(pool, [1] * 16)
    assert pool.usage == 1
    assert sorted(r.block_ids) == [1, 2, 3, 4]
    assert NULL_BLOCK == 0
    pool.free(r)
    assert NULL_BLOCK not in pool.free_blocks
    assert pool.usage == 0


@pytest.mark.parametrize(
    ("num_blocks", "block_size", "name"), [(1, 4, "num_blocks"), (8, 0, "block_size")]
)
def test_impossible_sizes_are_refused_by_name(num_blocks: int, block_size: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        BlockPool(num_blocks, block_size)


def test_names_of_blocks_are_the_chain_of_hash_block() -> None:
    pool = BlockPool(10, 16)
    request = Request("a", list(range(-50, 50)), lora_name="adapter", cache_salt="salt")
    names = [*pool.hashes_of(request, 2), *pool.hashes_of(request, 6)[2:]]
    parent = b""
    for index, name in enumerate(names):
        tokens = request.token_ids[16 * index : 16 * index + 16]
        parent = hash_block(parent, tokens, ("adapter", "salt"))
        assert name == parent
