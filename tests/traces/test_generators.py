"""Made-up traces: rates and spreads are those of theory, prompts share what they should.

Bounds are five standard errors or more, so that another version of numpy may draw other numbers.
"""

import itertools
import math

import numpy as np
import pytest

from course_lib.traces.generators import (
    azure_shaped,
    bursty,
    concurrent_users,
    diurnal,
    in_region,
    long_prompt_surge,
    merge,
    morning_spike,
    shared_prefix_sessions,
    steady,
)
from course_lib.traces.trace import Trace, TraceRequest, content_ids, prompt_contents

SHORT = {"prompt_tokens": 10, "output_tokens": 5}
SPIKE = {"night_rate_per_s": 1.0, "peak_rate_per_s": 20.0, "day_s": 2400.0}
DAY = {"trough_rate_per_s": 2.0, "peak_rate_per_s": 10.0, "day_s": 2400.0}
SURGE = {
    "chat_rate_per_s": 2.0,
    "surge_rate_per_s": 4.0,
    "surge_start_s": 300.0,
    "surge_duration_s": 100.0,
    "duration_s": 1000.0,
}
SESSIONS = {"session_rate_per_s": 0.5, "duration_s": 1000.0}

GENERATORS = {
    "steady": lambda **options: steady(2.0, 500.0, **options),
    "bursty": lambda **options: bursty(2.0, 500.0, cv=3.0, **options),
    "morning_spike": lambda **options: morning_spike(**SPIKE, **options),
    "diurnal": lambda **options: diurnal(**DAY, **options),
    "long_prompt_surge": lambda **options: long_prompt_surge(**SURGE, **options),
    "concurrent_users": lambda **options: concurrent_users(100, **options),
    "shared_prefix_sessions": lambda **options: shared_prefix_sessions(**SESSIONS, **options),
    "azure_shaped": lambda **options: azure_shaped(1.0, 1000.0, **options),
}
every = pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS)


def arrivals(trace: Trace) -> np.ndarray:
    return np.array([request.arrival_s for request in trace.requests])


def between(trace: Trace, start_s: float, end_s: float) -> int:
    return int(((arrivals(trace) >= start_s) & (arrivals(trace) < end_s)).sum())


def about(expected: float) -> object:
    """What a Poisson count of this mean is, all but once in a million times."""
    return pytest.approx(expected, abs=5 * math.sqrt(expected) + 1)


# All


@every
def test_a_seed_names_a_trace(make):
    assert make(seed=3) == make(seed=3)
    assert make(seed=3) != make(seed=4)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        make(seed=-1)


@every
def test_requests_are_in_order_and_have_lengths(make):
    trace = make()
    assert trace.name and len(trace.requests) > 50
    assert arrivals(trace)[0] >= 0 and (np.diff(arrivals(trace)) >= 0).all()
    for request in trace.requests:
        assert request.prompt_tokens >= 1 and request.output_tokens >= 1


@pytest.mark.parametrize("name", sorted(GENERATORS.keys() - {"azure_shaped"}))
def test_lengths_do_not_change_the_arrivals(name):
    make = GENERATORS[name]
    assert (arrivals(make(output_tokens=7)) == arrivals(make(output_tokens=(1, 900)))).all()


# Rates and spreads


def test_steady_is_a_poisson_process():
    trace = steady(5.0, 4000.0, **SHORT)
    assert len(trace.requests) == about(20_000)
    assert arrivals(trace).max() < 4000
    counts = np.histogram(arrivals(trace), 4000, (0, 4000))[0]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=5 * math.sqrt(2 / 4000))
    gaps_s = np.diff(arrivals(trace))
    for time_s in (0.05, 0.2, 0.5):
        assert np.mean(gaps_s > time_s) == pytest.approx(math.exp(-5 * time_s), abs=0.02)


@pytest.mark.parametrize("cv", [0.3, 1.0, 4.0])
def test_bursty_has_the_rate_and_the_variation_asked_for(cv):
    trace = bursty(5.0, 20_000.0, cv=cv, **SHORT)
    # The number of renewals varies as cv times the square root of the mean.
    assert len(trace.requests) == pytest.approx(100_000, abs=6 * cv * math.sqrt(100_000))
    assert arrivals(trace).max() < 20_000
    gaps_s = np.diff(arrivals(trace))
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.1)


def test_a_variation_of_one_is_poisson_and_less_is_nearly_a_clock():
    gaps_s = np.diff(arrivals(bursty(5.0, 4000.0, cv=1.0, **SHORT)))
    assert np.median(gaps_s) == pytest.approx(math.log(2) / 5, rel=0.05)
    even = arrivals(bursty(5.0, 4000.0, cv=0.01, **SHORT))
    assert np.diff(even) == pytest.approx(0.2, rel=0.1)


def test_a_morning_spike_by_hand():
    # An hour is 100 s: night to 900, up to 925, peak to 1025, down to 1050, night again.
    trace = morning_spike(**SPIKE, **SHORT)
    assert between(trace, 0, 900) == about(900)
    assert between(trace, 900, 925) == about(25 * 10.5)
    assert between(trace, 900, 912.5) == about(12.5 * (1 + 10.5) / 2)
    assert between(trace, 925, 1025) == about(2000)
    assert between(trace, 1025, 1050) == about(25 * 10.5)
    assert between(trace, 1050, 2400) == about(1350)
    assert trace.duration_s < 2400


def test_a_spike_may_come_at_another_hour_and_out_of_silence():
    trace = morning_spike(
        night_rate_per_s=0.0, peak_rate_per_s=1.0, spike_hour=6.0, ramp_hours=1.0, spike_hours=2.0
    )
    assert len(trace.requests) == about(3 * 3600)
    assert arrivals(trace).min() >= 6 * 3600 and arrivals(trace).max() <= 10 * 3600


def test_a_smooth_day_by_hand():
    # An hour is 100 s; 2 to 10 requests/s around a mean of 6, and 6 at 9 and at 21 o'clock.
    trace = diurnal(**DAY, noise=0.0, days=2, **SHORT)
    for start_s in (0, 2400):
        assert between(trace, start_s, start_s + 2400) == about(6 * 2400)
        assert between(trace, start_s + 1495, start_s + 1505) == about(100)
        assert between(trace, start_s + 295, start_s + 305) == about(20)
        assert between(trace, start_s + 850, start_s + 950) == about(600)
        # Half of a cosine around its peak: 6 + 4 x 2/pi on the mean of twelve hours.
        assert between(trace, start_s + 900, start_s + 2100) == about(1200 * (6 + 8 / math.pi))
    late = diurnal(**DAY, noise=0.0, peak_hour=3.0, **SHORT)
    assert between(late, 295, 305) == about(100) and between(late, 1495, 1505) == about(20)


def test_noise_changes_the_rate_each_quarter_of_an_hour_and_not_its_mean():
    trace = diurnal(
        trough_rate_per_s=200.0, peak_rate_per_s=200.0, noise=0.3, days=10, day_s=96.0, **SHORT
    )
    counts = np.histogram(arrivals(trace), 960, (0, 960))[0]  # 1 s each, 200 requests
    assert counts.mean() == pytest.approx(200, rel=0.05)
    assert counts.std() / 200 == pytest.approx(math.hypot(0.3, math.sqrt(1 / 200)), rel=0.15)
    halves = np.histogram(arrivals(trace), 1920, (0, 960))[0].reshape(-1, 2)
    assert np.corrcoef(halves.T)[0, 1] > 0.8


def test_an_azure_shaped_day_has_the_mean_rate_and_a_night():
    trace = azure_shaped(10.0, 4800.0, seed=5)
    # The noise of 10 % of 96 quarters leaves 1 % on the mean.
    assert len(trace.requests) == pytest.approx(48_000, rel=0.05)
    assert trace.duration_s < 4800
    day, night = between(trace, 2800, 3200), between(trace, 400, 800)  # 14 to 16, 2 to 4 o'clock
    assert 3 < day / night < 5
    prompts = [request.prompt_tokens for request in trace.requests]
    assert np.mean(prompts) == pytest.approx(1154.7, rel=0.05)  # of the published trace
    assert np.mean([request.output_tokens for request in trace.requests]) == pytest.approx(
        211.1, rel=0.05
    )


def test_long_prompts_come_in_the_surge_alone_and_chats_go_on():
    chats = {"prompt_tokens": (10, 99), "output_tokens": 20}
    trace = long_prompt_surge(**SURGE, **chats, long_prompt_tokens=(5000, 6000))
    long = [request for request in trace.requests if request.prompt_tokens >= 5000]
    assert len(long) == about(400)
    assert all(300 <= request.arrival_s < 400 for request in long)
    assert all(100 <= request.output_tokens <= 300 for request in long)
    others = tuple(request for request in trace.requests if request.prompt_tokens < 5000)
    assert others == steady(2.0, 1000.0, **chats).requests


def test_users_come_together():
    trace = concurrent_users(100, at_s=32_400.0, within_s=5.0, **SHORT)
    assert len(trace.requests) == 100
    assert arrivals(trace).min() >= 32_400 and arrivals(trace).max() <= 32_405
    assert between(trace, 32_400, 32_402.5) == pytest.approx(50, abs=25)
    assert set(arrivals(concurrent_users(10, at_s=7.0, within_s=0.0))) == {7.0}


# Sessions


def sessions_of(trace: Trace) -> dict[str, list[TraceRequest]]:
    found: dict[str, list[TraceRequest]] = {}
    for request in trace.requests:
        found.setdefault(request.session or "", []).append(request)
    return found


def test_each_turn_begins_with_the_last_prompt_and_its_reply():
    trace = shared_prefix_sessions(**SESSIONS, turns=(2, 6), user_tokens=(5, 9))
    sessions = sessions_of(trace)
    assert len(sessions) == about(500) and trace.has_shared_prefixes
    assert {len(turns) for turns in sessions.values()} == {2, 3, 4, 5, 6}
    for turns in list(sessions.values())[:50]:
        assert len({turn.tenant for turn in turns}) == 1
        for before, after in itertools.pairwise(turns):
            assert before.reply is not None
            said = content_ids(prompt_contents(before, -1)) + [before.reply] * before.output_tokens
            asked = content_ids(prompt_contents(after, -2))
            assert asked[: len(said)] == said
            assert 5 <= len(asked) - len(said) <= 9
            assert -2 not in asked  # the whole prompt is named, since the next turn repeats it
        assert turns[-1].reply is not None


def test_sessions_share_the_system_prompt_of_their_tenant_and_nothing_else():
    trace = shared_prefix_sessions(**SESSIONS, tenants=3, system_prompt_tokens=(100, 200))
    systems = {(turns[0].tenant, turns[0].segments[0]) for turns in sessions_of(trace).values()}
    assert len(systems) == 3
    assert len({tenant for tenant, _ in systems}) == len({system for _, system in systems}) == 3
    assert all(100 <= system.tokens <= 200 for _, system in systems)
    own: list[set[int]] = []
    for turns in sessions_of(trace).values():
        own.append({content for content, _ in turns[-1].segments[1:]} | {turns[-1].reply or -1})
    assert sum(map(len, own)) == len(set.union(*own))
    assert not set.union(*own) & {system.content for _, system in systems}


def test_sessions_begin_in_time_and_pause_as_long_as_asked():
    trace = shared_prefix_sessions(**SESSIONS, turns=(4, 4), mean_pause_s=10.0)
    starts_s = [turns[0].arrival_s for turns in sessions_of(trace).values()]
    assert max(starts_s) < 1000
    pauses_s = np.concatenate([np.diff(arrivals(Trace("", tuple(turns))))
                               for turns in sessions_of(trace).values()])  # fmt: skip
    error = 5 / math.sqrt(len(pauses_s))
    assert pauses_s.mean() == pytest.approx(10, rel=error)
    assert pauses_s.std() == pytest.approx(10, rel=2 * error)


def test_sessions_of_two_seeds_share_nothing():
    one, other = (shared_prefix_sessions(**SESSIONS, seed=seed) for seed in (1, 2))
    contents = [
        {content for request in trace.requests for content, _ in request.segments}
        for trace in (one, other)
    ]
    assert not contents[0] & contents[1]
    assert not sessions_of(one).keys() & sessions_of(other).keys()


# Together


def test_merged_traces_keep_all_requests_in_order():
    one = in_region(steady(2.0, 100.0, seed=1), "eu")
    other = in_region(concurrent_users(20, at_s=50.0, seed=2), "us")
    both = merge(one, other, name="both")
    assert both.name == "both"
    assert (np.diff(arrivals(both)) >= 0).all()
    assert tuple(r for r in both.requests if r.region == "eu") == one.requests
    assert tuple(r for r in both.requests if r.region == "us") == other.requests
    assert len(both.requests) == len(one.requests) + 20
    assert merge().requests == ()


def test_a_region_is_all_that_is_changed():
    trace = shared_prefix_sessions(**SESSIONS)
    assert in_region(in_region(trace, "eu"), "us") == in_region(trace, "us")
    tagged = in_region(trace, "eu").requests[7]
    plain = trace.requests[7]
    assert tagged.region == "eu" and plain.region is None
    assert (tagged.session, tagged.segments) == (plain.session, plain.segments)


# Refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: steady(0, 10.0), "rate_per_s must be a number above 0"),
        (lambda: steady(1.0, math.inf), "duration_s must be a number above 0"),
        (lambda: steady(1.0, 10.0, prompt_tokens=0), "prompt_tokens must be a whole number"),
        (lambda: steady(1.0, 10.0, output_tokens=(3, 1)), r"output_tokens\[1\] must be"),
        (lambda: steady(1e6, 86_400.0), "about 8.64e.10 requests, and at most 10000000 fit"),
        (lambda: bursty(1e6, 86_400.0, cv=2.0), "at most 10000000 fit"),
        (lambda: bursty(math.nan, 10.0, cv=2.0), "rate_per_s must be"),
        (lambda: bursty(1.0, -1.0, cv=2.0), "duration_s must be"),
        (lambda: bursty(1.0, 10.0, cv=0.0), "cv must be a number at least 0.01"),
        (lambda: morning_spike(**{**SPIKE, "peak_rate_per_s": 0.5}), "peak_rate_per_s must be"),
        (lambda: morning_spike(**{**SPIKE, "night_rate_per_s": -1}), "night_rate_per_s must be"),
        (lambda: morning_spike(**SPIKE, ramp_hours=0), "ramp_hours must be"),
        (lambda: morning_spike(**SPIKE, spike_hours=-1), "spike_hours must be"),
        (lambda: morning_spike(**SPIKE, spike_hour=23), "the spike ends at hour 24.5 of a day"),
        (lambda: morning_spike(**{**SPIKE, "day_s": 0}), "day_s must be"),
        (lambda: diurnal(**{**DAY, "trough_rate_per_s": 11.0}), "peak_rate_per_s must be"),
        (lambda: diurnal(**DAY, peak_hour=25), "peak_hour must be"),
        (lambda: diurnal(**DAY, days=0), "days must be"),
        (lambda: diurnal(**DAY, noise=-0.1), "noise must be"),
        (lambda: azure_shaped(0.0), "rate_per_s must be"),
        (lambda: azure_shaped(1.0, 0.0), "duration_s must be"),
        (lambda: long_prompt_surge(**{**SURGE, "surge_start_s": 950.0}), "surge ends at 1050 s"),
        (lambda: long_prompt_surge(**{**SURGE, "surge_rate_per_s": 0}), "surge_rate_per_s must"),
        (lambda: long_prompt_surge(**SURGE, long_prompt_tokens=0), "long_prompt_tokens must be"),
        (lambda: concurrent_users(0), "users must be"),
        (lambda: concurrent_users(5, at_s=-1.0), "at_s must be"),
        (lambda: concurrent_users(5, within_s=math.nan), "within_s must be"),
        (lambda: shared_prefix_sessions(**SESSIONS, tenants=0), "tenants must be"),
        (lambda: shared_prefix_sessions(**SESSIONS, turns=0), "turns must be"),
        (lambda: shared_prefix_sessions(**SESSIONS, user_tokens=(0, 3)), r"user_tokens\[0\] must"),
        (lambda: shared_prefix_sessions(**SESSIONS, mean_pause_s=-1), "mean_pause_s must be"),
        (lambda: shared_prefix_sessions(**SESSIONS, turns=10**8), "at most 10000000 fit"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_seed_whose_contents_no_hash_could_take_is_refused() -> None:
    with pytest.raises(ValueError, match="seed must be a whole number from 0 to 2147483647"):
        steady(1, 10, seed=2**40)
    sessions = {"session_rate_per_s": 5, "duration_s": 2}
    trace = shared_prefix_sessions(**sessions, seed=2**31 - 1)
    assert all(s.content < 2**63 for request in trace.requests for s in request.segments)
