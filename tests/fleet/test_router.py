import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.fleet.router import (
    RECENT_PROMPTS,
    KvAware,
    LeastOutstanding,
    PowerOfTwoChoices,
    PrefixAwareRouter,
    RoundRobin,
    SessionAffinity,
)
from tests.fleet.views import FakeReplica, FakeRequest, fleet

loads = st.lists(st.integers(0, 9), min_size=1, max_size=8)


def names(router, replicas, count, request=None):
    """Who is chosen, so many times."""
    return [router.choose(request or FakeRequest(), replicas).name for _ in range(count)]


# By load.


def test_round_robin_takes_turns_whatever_the_load():
    assert names(RoundRobin(), fleet(9, 0, 5), 5) == ["r0", "r1", "r2", "r0", "r1"]


def test_round_robin_goes_on_with_those_that_are_left():
    router, replicas = RoundRobin(), fleet(0, 0, 0)
    assert names(router, replicas, 2) == ["r0", "r1"]
    assert names(router, replicas[:2], 2) == ["r0", "r1"]


def test_the_least_outstanding_counts_those_that_wait_and_those_that_run():
    replicas = [FakeReplica("a", 0, 5), FakeReplica("b", 3, 1), FakeReplica("c", 5, 0)]
    assert names(LeastOutstanding(), replicas, 1) == ["b"]


def test_of_several_least_outstanding_the_first_is_taken():
    assert names(LeastOutstanding(), fleet(2, 1, 1), 1) == ["r1"]


class Watched(list):
    """Replicas that remember which of them were looked at."""

    def __init__(self, replicas):
        super().__init__(replicas)
        self.seen = []

    def __getitem__(self, index):
        self.seen.append(super().__getitem__(index))
        return self.seen[-1]


@given(loads, st.integers(0, 1000))
def test_power_of_two_never_picks_the_more_loaded_of_its_pair(loads, seed):
    replicas = Watched(fleet(*loads))
    chosen = PowerOfTwoChoices(seed).choose(FakeRequest(), replicas)
    pair = {replica.name: replica.num_running for replica in replicas.seen}
    assert len(pair) == min(2, len(loads))
    assert chosen.num_running == min(pair.values())


def test_power_of_two_draws_all_pairs_equally_often():
    router, counts = PowerOfTwoChoices(), dict[frozenset[str], int]()
    for _ in range(6000):
        replicas = Watched(fleet(0, 0, 0, 0))
        router.choose(FakeRequest(), replicas)
        pair = frozenset(replica.name for replica in replicas.seen)
        counts[pair] = counts.get(pair, 0) + 1
    assert len(counts) == 6
    assert all(abs(count - 1000) < 120 for count in counts.values())  # 4 standard deviations


def test_power_of_two_depends_on_its_seed_only():
    replicas = fleet(*[0] * 9)
    draws = names(PowerOfTwoChoices(3), replicas, 50)
    random.seed(1)
    assert names(PowerOfTwoChoices(3), replicas, 50) == draws
    assert names(PowerOfTwoChoices(4), replicas, 50) != draws


# By what the KV caches hold.

PROMPT = tuple(range(320))  # 20 blocks


def kv_replica(name, cached_tokens=0, active_blocks=0, **attributes):
    return FakeReplica(
        name, kv_cache_usage=active_blocks / 1000, cached={PROMPT: cached_tokens}, **attributes
    )


@given(
    st.lists(st.tuples(st.integers(0, 19), st.integers(0, 40)), min_size=1, max_size=6),
    st.sampled_from([0, 0.5, 1, 2]),
)
def test_kv_aware_takes_the_least_of_prefill_blocks_and_active_blocks(states, weight):
    replicas = [
        kv_replica(f"r{i}", 16 * cached, active) for i, (cached, active) in enumerate(states)
    ]
    chosen = KvAware(weight).choose(FakeRequest(PROMPT), replicas)
    costs = [weight * (20 - cached) + active for cached, active in states]
    assert costs[replicas.index(chosen)] == pytest.approx(min(costs))


def test_kv_aware_leaves_a_cached_prefix_when_that_replica_is_busier_than_it_saves():
    for active, choice in ((9, "warm"), (11, "cold")):
        replicas = [kv_replica("warm", 160, active), kv_replica("cold")]
        assert names(KvAware(), replicas, 1, FakeRequest(PROMPT)) == [choice]


def test_kv_aware_breaks_ties_by_requests():
    replicas = [kv_replica("busy", num_running=3), kv_replica("free", num_running=2)]
    assert names(KvAware(), replicas, 1, FakeRequest(PROMPT)) == ["free"]


def test_kv_aware_counts_a_waiting_request_as_the_mean_one():
    for active, choice in ((79, "active"), (81, "waiting")):
        router = KvAware(overlap_weight=2)
        # 320 tokens of which 160 are computed: 2 x 10 + 20 = 40 blocks for each that waits.
        router.choose(FakeRequest(PROMPT), [kv_replica("r", 160)])
        replicas = [kv_replica("waiting", num_waiting=2), kv_replica("active", 0, active)]
        assert names(router, replicas, 1, FakeRequest(PROMPT)) == [choice]


def test_a_weight_below_zero_is_refused():
    with pytest.raises(ValueError, match="overlap_weight"):
        KvAware(-1)


# By what was sent where.


def prefix_router(**arguments):
    return PrefixAwareRouter(chunk_tokens=4, **arguments)


def prompt(*words, own=0):
    """Each word is four tokens, one chunk."""
    return FakeRequest([word for word in words for _ in range(4)] + [-1] * own)


def test_a_prompt_follows_the_one_that_it_continues():
    router, replicas = prefix_router(), fleet(0, 0, 0)
    first = router.choose(prompt(1, 2), replicas)
    others = [replica for replica in replicas if replica is not first]
    first.num_running = 5
    assert router.choose(prompt(1, 2, 3), replicas) is first
    assert router.choose(prompt(7, 8), replicas) in others


def test_the_longest_match_wins():
    router, (a, b) = prefix_router(), fleet(0, 0)
    router.remember(prompt(1, 2).prompt_token_ids, a)
    router.remember(prompt(1, 2, 3).prompt_token_ids, b)
    b.num_running = 10
    assert router.choose(prompt(1, 2, 3, 4), [a, b]) is b


def test_of_equal_matches_the_less_loaded_wins():
    router, (a, b, c) = prefix_router(), fleet(4, 3, 0)
    for replica in (a, b):
        router.remember(prompt(1, 2).prompt_token_ids, replica)
    assert router.choose(prompt(1, 2), [a, b, c]) is b


def test_of_equal_matches_equally_loaded_the_new_one_wins():
    router, (a, b) = prefix_router(), fleet(0, 0)
    for tenant in (1, 2):
        router.remember(prompt(tenant, tenant).prompt_token_ids, a)
    router.remember(prompt(1, 1).prompt_token_ids, b)  # warmed up with what is hot
    assert router.choose(prompt(1, 1, 5), [a, b]) is b


def test_a_match_must_be_more_than_the_threshold():
    for own, matches in ((3, True), (4, False)):
        router, (a, b) = prefix_router(cache_threshold=0.5), fleet(1, 0)
        router.remember(prompt(1).prompt_token_ids, a)
        assert (router.choose(prompt(1, own=own), [a, b]) is a) == matches


@pytest.mark.parametrize(
    ("load", "least", "stays"),
    [
        (10, 0, True),  # not more than 10 above
        (11, 0, False),
        (40, 20, True),  # not more than twice as many
        (41, 20, False),
        (30, 25, True),
    ],
)
def test_a_match_is_left_when_load_is_uneven_in_both_ways(load, least, stays):
    router = prefix_router(balance_abs_threshold=10, balance_rel_threshold=2.0)
    busy, free = fleet(load, least)
    router.remember(prompt(1, 2).prompt_token_ids, busy)
    assert router.choose(prompt(1, 2), [busy, free]) is (busy if stays else free)


def test_a_prefix_in_demand_spreads():
    router = prefix_router(balance_abs_threshold=2)
    replicas = fleet(0, 0, 0)
    for _ in range(30):
        router.choose(prompt(1, 2), replicas).num_running += 1
    counts = [replica.num_running for replica in replicas]
    assert min(counts) >= 8
    for replica in replicas:
        replica.num_running = 0
    replicas.append(FakeReplica("r3"))
    assert router.choose(prompt(1, 2), replicas).name != "r3"  # all the others have it


def test_without_a_match_idle_replicas_get_the_prompts_by_how_little_they_were_sent():
    router, replicas = prefix_router(), fleet(0, 0, 0)
    chosen = [router.choose(prompt(10 * n, 10 * n + 1), replicas).name for n in range(1, 7)]
    assert sorted(chosen) == ["r0", "r0", "r1", "r1", "r2", "r2"]


def test_a_replica_that_has_left_matches_no_more():
    router, (a, b) = prefix_router(), fleet(5, 0)
    router.remember(prompt(1, 2).prompt_token_ids, a)
    router.forget("r0")
    assert router.choose(prompt(1, 2), [a, b]) is b


def test_a_replica_out_of_rotation_is_not_waited_for():
    router, (a, b, c) = prefix_router(), fleet(0, 5, 0)
    router.remember(prompt(1, 2, 3).prompt_token_ids, a)
    router.remember(prompt(1, 2).prompt_token_ids, b)
    assert router.choose(prompt(1, 2, 3), [b, c]) is b


def test_what_a_cache_cannot_hold_is_not_counted_on():
    router = prefix_router()
    a, b = fleet(5, 0, num_blocks=3, block_size=4)
    router.remember(prompt(1, 2).prompt_token_ids, a)
    router.remember(prompt(3, 4).prompt_token_ids, a)  # takes the place of 2
    assert router.choose(prompt(3, 4), [a, b]) is a
    assert router.choose(prompt(1, 2, own=1), [a, b]) is a  # 1 of 9 tokens in 2 chunks is left
    a, b = fleet(5, 0, num_blocks=1, block_size=3)
    router = prefix_router()
    router.remember(prompt(1, 2).prompt_token_ids, a)
    assert router.choose(prompt(1, 2), [a, b]) is b


def test_hot_prefixes_are_what_most_prompts_begin_with():
    router, replicas = prefix_router(), fleet(0)
    for turn in range(5):
        router.choose(prompt(1, 2, 100 + turn), replicas)
    for turn in range(3):
        router.choose(prompt(7, 8, 200 + turn, own=2), replicas)
    router.choose(prompt(9, 9), replicas)
    shared = [[1] * 4 + [2] * 4, [7] * 4 + [8] * 4]
    assert router.hot_prefixes(5) == shared
    assert router.hot_prefixes(1) == shared[:1]
    assert router.hot_prefixes(0) == []


def test_hot_prefixes_are_those_of_late():
    router, replicas = prefix_router(), fleet(0)
    for _ in range(50):
        router.choose(prompt(1, 2), replicas)
    for own in range(RECENT_PROMPTS):
        router.choose(prompt(7, 1000 + own), replicas)
    assert router.hot_prefixes(5) == [[7] * 4]


def test_a_warm_up_makes_no_prefix_hot():
    router, (a,) = prefix_router(), fleet(0)
    for _ in range(3):
        router.remember(prompt(1, 2).prompt_token_ids, a)
    assert router.hot_prefixes(5) == []


def test_token_ids_may_be_any_that_fit_64_bits():
    router, (a, b) = prefix_router(), fleet(5, 0)
    ids = [2**63 - 1] * 4 + [-(2**63)] * 4
    router.remember(ids, a)
    assert router.choose(FakeRequest(ids), [a, b]) is a
    assert router.choose(FakeRequest(ids), [a, b]) is a
    assert router.hot_prefixes(1) == [ids]


@pytest.mark.parametrize(
    "arguments",
    [
        {"cache_threshold": 1.1},
        {"balance_abs_threshold": -1},
        {"balance_rel_threshold": 0.9},
        {"chunk_tokens": 0},
    ],
)
def test_thresholds_out_of_range_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        PrefixAwareRouter(**arguments)


# By session.

sessions = st.lists(st.text(max_size=8), unique=True, min_size=1, max_size=30)


@given(sessions, st.integers(1, 8))
def test_a_new_replica_moves_only_the_sessions_that_go_to_it(sessions, count):
    router, replicas = SessionAffinity(), fleet(*[0] * count)
    added = FakeReplica("new")
    for session in sessions:
        request = FakeRequest(session=session)
        before = router.choose(request, replicas)
        assert router.choose(request, [added, *replicas]) in (before, added)


@given(sessions, st.integers(2, 8))
def test_a_replica_that_leaves_moves_only_its_own_sessions(sessions, count):
    router, replicas = SessionAffinity(), fleet(*[0] * count)
    for session in sessions:
        request = FakeRequest(session=session)
        before = router.choose(request, replicas)
        if before is not replicas[0]:
            assert router.choose(request, replicas[1:]) is before


def test_sessions_spread_evenly_and_a_new_replica_gets_its_share():
    router, replicas = SessionAffinity(), fleet(0, 0, 0, 0)
    counts = dict.fromkeys((replica.name for replica in replicas), 0)
    for n in range(4000):
        counts[router.choose(FakeRequest(session=f"0/{n}"), replicas).name] += 1
    assert all(abs(count - 1000) < 110 for count in counts.values())  # 4 standard deviations


@given(st.text(), st.permutations(range(5)), loads)
def test_a_session_stays_whatever_the_order_and_the_load(session, order, loads):
    request = FakeRequest(session=session)
    expected = SessionAffinity().choose(request, fleet(*[0] * 5)).name
    replicas = fleet(*(loads * 5)[:5])
    assert SessionAffinity().choose(request, [replicas[i] for i in order]).name == expected


def test_a_session_has_the_same_replica_in_every_process():
    choices = [
        SessionAffinity().choose(FakeRequest(session=name), fleet(*[0] * 4)).name
        for name in ("a", "b", "c", "d", "e", "f")
    ]
    assert choices == ["r0", "r1", "r1", "r3", "r3", "r2"]


def test_a_request_without_a_session_goes_to_the_least_loaded():
    assert names(SessionAffinity(), fleet(3, 1, 2), 2) == ["r1", "r1"]


@pytest.mark.parametrize(
    "router",
    [
        RoundRobin(),
        LeastOutstanding(),
        PowerOfTwoChoices(),
        KvAware(),
        PrefixAwareRouter(),
        SessionAffinity(),
    ],
    ids=lambda router: type(router).__name__,
)
def test_every_router_serves_an_empty_prompt_and_a_lone_replica(router):
    (replica,) = fleet(5)
    assert router.choose(FakeRequest(()), [replica]) is replica
    router.remember([1, 2], replica)
    router.forget("never heard of")
    assert router.hot_prefixes(3) == []
