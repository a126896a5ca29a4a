"""Traces made up, each with one trouble in it: a morning spike, bursts, long prompts, sessions.

    trace = morning_spike(night_rate_per_s=0.2, peak_rate_per_s=5.0, day_s=2400.0, seed=1)

The same arguments give the same trace. Arrivals depend on the seed but not on the lengths, and the
other way round, so that one can be varied alone. Traces to be merged need seeds of their own.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from course_lib.traces.lengths import (
    AZURE_CHAT_PROMPTS,
    AZURE_CHAT_REPLIES,
    Lengths,
    Quantiles,
    draw_lengths,
)
from course_lib.traces.trace import Segment, Trace, TraceRequest
from course_lib.validation import number, whole_number

DAY_S = 86_400.0

#: More would not fit the memory of a small machine, so a unit was mistaken.
MAX_REQUESTS = 10_000_000

#: Contents of sessions are numbered from `seed << 32`, which has to fit 64 bits.
MAX_SEED = 2**31 - 1

#: Noise of `diurnal` changes so often in a day: every quarter of an hour.
NOISE_STEPS = 96

#: Lowest and highest rate of `azure_shaped`, as a share of the mean. Our assumption: the published
#: trace lasts an hour and does not say.
AZURE_TROUGH, AZURE_PEAK = 0.4, 1.6

#: From times in seconds to rates in requests/s.
Rate = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def steady(
    rate_per_s: float,
    duration_s: float,
    *,
    prompt_tokens: Lengths | Quantiles = AZURE_CHAT_PROMPTS,
    output_tokens: Lengths | Quantiles = AZURE_CHAT_REPLIES,
    seed: int = 0,
) -> Trace:
    """Many users who know nothing of each other: Poisson arrivals.

    Args:
        rate_per_s: mean rate, requests/s.
        duration_s: the last request comes before it.
        prompt_tokens: lengths of the prompts.
        output_tokens: lengths of the replies.
        seed: of all that is random.

    Raises:
        ValueError: an argument is out of range.
    """
    number("rate_per_s", rate_per_s, above=0)
    arrivals_s = _steady_arrivals(_rng(seed, "arrivals"), rate_per_s, duration_s)
    return _trace("steady", arrivals_s, prompt_tokens, output_tokens, seed)


def bursty(
    rate_per_s: float,
    duration_s: float,
    *,
    cv: float,
    prompt_tokens: Lengths | Quantiles = AZURE_CHAT_PROMPTS,
    output_tokens: Lengths | Quantiles = AZURE_CHAT_REPLIES,
    seed: int = 0,
) -> Trace:
    """Requests in bursts with lulls between them, as programs send them.

    The times between arrivals have a gamma distribution, as Wang et al. found in production
    (BurstGPT, 2024).

    Args:
        rate_per_s: mean rate, requests/s.
        duration_s: the last request comes before it.
        cv: coefficient of variation of the times between arrivals, their standard deviation over
            their mean, from 0.01 to 100. 1 is `steady`, more is burstier, less is more even.
        prompt_tokens: lengths of the prompts.
        output_tokens: lengths of the replies.
        seed: of all that is random.

    Raises:
        ValueError: an argument is out of range.
    """
    number("rate_per_s", rate_per_s, above=0)
    number("duration_s", duration_s, above=0)
    number("cv", cv, at_least=0.01, at_most=100)
    _check_count(rate_per_s * duration_s)
    rng = _rng(seed, "arrivals")
    arrivals_s = np.zeros(1)
    while arrivals_s[-1] < duration_s:
        gaps_s = rng.gamma(cv**-2, cv**2 / rate_per_s, 1 + int(rate_per_s * duration_s))
        arrivals_s = np.concatenate([arrivals_s, arrivals_s[-1] + np.cumsum(gaps_s)])
    arrivals_s = arrivals_s[1:]
    return _trace("bursty", arrivals_s[arrivals_s < duration_s], prompt_tokens, output_tokens, seed)


def morning_spike(
    *,
    night_rate_per_s: float,
    peak_rate_per_s: float,
    spike_hour: float = 9.0,
    ramp_hours: float = 0.25,
    spike_hours: float = 1.0,
    day_s: float = DAY_S,
    prompt_tokens: Lengths | Quantiles = AZURE_CHAT_PROMPTS,
    output_tokens: Lengths | Quantiles = AZURE_CHAT_REPLIES,
    seed: int = 0,
) -> Trace:
    """A flat night, then all merchants open: a day from midnight with one spike.

    Args:
        night_rate_per_s: rate before and after the spike, requests/s; may be 0.
        peak_rate_per_s: rate at its height.
        spike_hour: hour of the day at which the rate begins to rise.
        ramp_hours: it rises so long, in a straight line, and falls as long.
        spike_hours: it stays at the peak so long.
        day_s: seconds that the 24 hours last; fewer than 86,400 compress the day.
        prompt_tokens: lengths of the prompts.
        output_tokens: lengths of the replies.
        seed: of all that is random.

    Raises:
        ValueError: an argument is out of range, or the spike does not end on its day.
    """
    night = number("night_rate_per_s", night_rate_per_s, at_least=0)
    peak = number("peak_rate_per_s", peak_rate_per_s, above=0, at_least=night)
    number("spike_hour", spike_hour, at_least=0)
    number("ramp_hours", ramp_hours, above=0)
    number("spike_hours", spike_hours, at_least=0)
    number("day_s", day_s, above=0)
    lasting = (0.0, ramp_hours, spike_hours, ramp_hours)
    hours = spike_hour + np.cumsum(lasting)
    if hours[-1] > 24:
        raise ValueError(
            f"the spike ends at hour {hours[-1]:g} of a day of 24; begin it earlier or shorten it"
        )
    rates = [night, peak, peak, night]
    arrivals_s = _poisson(
        _rng(seed, "arrivals"),
        lambda at_s: np.interp(at_s, hours * day_s / 24, rates),
        peak,
        day_s,
    )
    return _trace("morning spike", arrivals_s, prompt_tokens, output_tokens, seed)


def diurnal(
    *,
    trough_rate_per_s: float,
    peak_rate_per_s: float,
    peak_hour: float = 15.0,
    days: int = 1,
    noise: float = 0.1,
    day_s: float = DAY_S,
    prompt_tokens: Lengths | Quantiles = AZURE_CHAT_PROMPTS,
    output_tokens: Lengths | Quantiles = AZURE_CHAT_REPLIES,
    seed: int = 0,
) -> Trace:
    """People who sleep and work: a rate that goes up and down each day as a cosine does.

    Args:
        trough_rate_per_s: lowest rate, 12 hours before the highest, requests/s; may be 0.
        peak_rate_per_s: highest rate, apart from the noise.
        peak_hour: hour of the day at which it is reached. Regions in other time zones have others.
        days: so many, from midnight to midnight.
        noise: the rate of each quarter of an hour is off by so much: standard deviation over mean.
            0 for a smooth day.
        day_s: seconds that the 24 hours last; fewer than 86,400 compress the day.
        prompt_tokens: lengths of the prompts.
        output_tokens: lengths of the replies.
        seed: of all that is random.

    Raises:
        ValueError: an argument is out of range.
    """
    trough = number("trough_rate_per_s", trough_rate_per_s, at_least=0)
    peak = number("peak_rate_per_s", peak_rate_per_s, above=0, at_least=trough)
    number("peak_hour", peak_hour, at_least=0, at_most=24)
    whole_number("days", days)
    number("noise", noise, at_least=0, at_most=1)
    number("day_s", day_s, above=0)
    spread = np.sqrt(np.log1p(noise**2))  # a lognormal factor of mean 1
    steps = days * NOISE_STEPS
    factors = np.exp(_rng(seed, "noise").normal(-(spread**2) / 2, spread, steps))

    def rate_per_s(at_s: NDArray[np.float64]) -> NDArray[np.float64]:
        wave = np.cos(2 * np.pi * (at_s / day_s - peak_hour / 24))
        step = np.minimum((at_s * (NOISE_STEPS / day_s)).astype(np.int64), steps - 1)
        return (trough + (peak - trough) * (1 + wave) / 2) * factors[step]

    highest = peak * float(factors.max())
    arrivals_s = _poisson(_rng(seed, "arrivals"), rate_per_s, highest, days * day_s)
    return _trace("diurnal", arrivals_s, prompt_tokens, output_tokens, seed)


def azure_shaped(rate_per_s: float, duration_s: float = DAY_S, seed: int = 0) -> Trace:
    """A day of chats whose lengths are those of Azure's published hour of them.

    Prompts and replies are drawn apart: in the published trace their lengths have a rank
    correlation of 0.07. The course of the day is that of `diurnal`; its depth is our assumption.

    Args:
        rate_per_s: mean rate of the day, requests/s.
        duration_s: the day is stretched or compressed to this.
        seed: of all that is random.

    Raises:
        ValueError: an argument is out of range.
    """
    number("rate_per_s", rate_per_s, above=0)
    number("duration_s", duration_s, above=0)
    day = diurnal(
        trough_rate_per_s=AZURE_TROUGH * rate_per_s,
        peak_rate_per_s=AZURE_PEAK * rate_per_s,
        day_s=duration_s,
        seed=seed,
    )
    return replace(day, name="azure-shaped day")


def long_prompt_surge(
    *,
    chat_rate_per_s: float,
    surge_rate_per_s: float,
    surge_start_s: float,
    surge_duration_s: float,
    duration_s: float,
    long_prompt_tokens: Lengths | Quantiles = (8_000, 16_000),
    long_output_tokens: Lengths | Quantiles = (100, 300),
    prompt_tokens: Lengths | Quantiles = AZURE_CHAT_PROMPTS,
    output_tokens: Lengths | Quantiles = AZURE_CHAT_REPLIES,
    seed: int = 0,
) -> Trace:
    """Steady chats, and for a while documents to summarise among them.

    The rate of requests hardly moves, the tokens to prefill do.

    Args:
        chat_rate_per_s: rate of the chats, all the time, requests/s.
        surge_rate_per_s: rate of the long prompts during the surge.
        surge_start_s: when it begins.
        surge_duration_s: how long it lasts.
        duration_s: the last request comes before it.
        long_prompt_tokens: lengths of the long prompts.
        long_output_tokens: lengths of the replies to them.
        prompt_tokens: lengths of the chats' prompts.
        output_tokens: lengths of the chats' replies.
        seed: of all that is random.

    Raises:
        ValueError: an argument is out of range, or the surge does not end within the trace.
    """
    number("chat_rate_per_s", chat_rate_per_s, above=0)
    number("surge_rate_per_s", surge_rate_per_s, above=0)
    number("surge_start_s", surge_start_s, at_least=0)
    number("surge_duration_s", surge_duration_s, above=0)
    if surge_start_s + surge_duration_s > number("duration_s", duration_s, above=0):
        raise ValueError(
            f"the surge ends at {surge_start_s + surge_duration_s:g} s, after the trace of "
            f"{duration_s:g} s; begin it earlier or shorten it"
        )
    chats = steady(
        chat_rate_per_s,
        duration_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seed=seed,
    )
    arrivals_s = surge_start_s + _steady_arrivals(
        _rng(seed, "long_arrivals"), surge_rate_per_s, surge_duration_s
    )
    surge = _trace("surge", arrivals_s, long_prompt_tokens, long_output_tokens, seed, "long_")
    return merge(chats, surge, name="long-prompt surge")


def concurrent_users(
    users: int,
    *,
    at_s: float = 0.0,
    within_s: float = 5.0,
    prompt_tokens: Lengths | Quantiles = AZURE_CHAT_PROMPTS,
    output_tokens: Lengths | Quantiles = AZURE_CHAT_REPLIES,
    seed: int = 0,
) -> Trace:
    """Users who all come within a few seconds, as 100 at 9 AM, with one request each.

    Args:
        users: so many requests.
        at_s: when the first ones come.
        within_s: all come within this time, evenly spread by chance; 0 for all at once.
        prompt_tokens: lengths of the prompts.
        output_tokens: lengths of the replies.
        seed: of all that is random.

    Raises:
        ValueError: an argument is out of range.
    """
    whole_number("users", users, at_most=MAX_REQUESTS)
    number("at_s", at_s, at_least=0)
    number("within_s", within_s, at_least=0)
    arrivals_s = np.sort(at_s + within_s * _rng(seed, "arrivals").random(users))
    return _trace(f"{users} users", arrivals_s, prompt_tokens, output_tokens, seed)


def shared_prefix_sessions(
    *,
    session_rate_per_s: float,
    duration_s: float,
    tenants: int = 4,
    turns: Lengths = (2, 8),
    mean_pause_s: float = 30.0,
    system_prompt_tokens: Lengths | Quantiles = (500, 2_000),
    user_tokens: Lengths | Quantiles = (20, 200),
    output_tokens: Lengths | Quantiles = (50, 400),
    seed: int = 0,
) -> Trace:
    """Conversations: each turn repeats the system prompt and all that was said, and adds to it.

    Tenants are equally busy. All conversations of a tenant begin with the same system prompt.

    Args:
        session_rate_per_s: conversations that begin, Poisson, 1/s.
        duration_s: they begin before it, and go on to their ends.
        tenants: each has a system prompt of its own.
        turns: requests of a conversation.
        mean_pause_s: from one turn to the next, the reply included; exponential.
        system_prompt_tokens: length of each tenant's system prompt.
        user_tokens: what the user adds in a turn.
        output_tokens: lengths of the replies.
        seed: of all that is random.

    Raises:
        ValueError: an argument is out of range.
    """
    number("session_rate_per_s", session_rate_per_s, above=0)
    whole_number("tenants", tenants)
    number("mean_pause_s", mean_pause_s, at_least=0)
    starts_s = _steady_arrivals(_rng(seed, "arrivals"), session_rate_per_s, duration_s)

    def draw(what: str, lengths: Lengths | Quantiles, count: int) -> Iterator[int]:
        return iter(draw_lengths(_rng(seed, what), what, lengths, count).tolist())

    contents = itertools.count(seed << 32)  # other seeds have others
    prompts = [
        Segment(next(contents), tokens)
        for tokens in draw("system_prompt_tokens", system_prompt_tokens, tenants)
    ]
    turns_of = list(draw("turns", turns, len(starts_s)))
    total = sum(turns_of)
    _check_count(total)
    user = draw("user_tokens", user_tokens, total)
    output = draw("output_tokens", output_tokens, total)
    pauses_s = iter(_rng(seed, "pauses").exponential(mean_pause_s, total).tolist())
    tenant_of = _rng(seed, "tenants").integers(tenants, size=len(starts_s)).tolist()
    requests = []
    for session, arrival_s in enumerate(starts_s.tolist()):
        tenant = tenant_of[session]
        said = [prompts[tenant]]
        for _ in range(turns_of[session]):
            said.append(Segment(next(contents), next(user)))
            reply = Segment(next(contents), next(output))
            requests.append(
                TraceRequest(
                    arrival_s,
                    sum(tokens for _, tokens in said),
                    reply.tokens,
                    segments=tuple(said),
                    reply=reply.content,
                    session=f"{seed}/{session}",
                    tenant=f"tenant-{tenant}",
                )
            )
            said.append(reply)
            arrival_s += next(pauses_s)
    requests.sort(key=lambda request: request.arrival_s)
    return Trace("shared-prefix sessions", tuple(requests))


def merge(*traces: Trace, name: str = "merged") -> Trace:
    """All requests of the traces in the order of arrival; equal contents are the same text."""
    requests = itertools.chain.from_iterable(trace.requests for trace in traces)
    return Trace(name, tuple(sorted(requests, key=lambda request: request.arrival_s)))


def in_region(trace: Trace, region: str) -> Trace:
    """The same trace, coming from a region."""
    return replace(
        trace, requests=tuple(replace(request, region=region) for request in trace.requests)
    )


def _rng(seed: int, what: str) -> np.random.Generator:
    """A stream of random numbers for each purpose, so that one does not shift another."""
    whole_number("seed", seed, at_least=0, at_most=MAX_SEED)
    return np.random.default_rng([seed, *what.encode()])


def _check_count(count: float) -> None:
    if count > MAX_REQUESTS:
        raise ValueError(
            f"these are about {count:.3g} requests, and at most {MAX_REQUESTS} fit the memory; "
            "ask for a lower rate or a shorter time"
        )


def _steady_arrivals(
    rng: np.random.Generator, rate_per_s: float, duration_s: float
) -> NDArray[np.float64]:
    return _poisson(rng, lambda at_s: np.full_like(at_s, rate_per_s), rate_per_s, duration_s)


def _poisson(
    rng: np.random.Generator, rate_per_s: Rate, highest_per_s: float, duration_s: float
) -> NDArray[np.float64]:
    """Arrivals of a Poisson process whose rate changes, by thinning (Lewis and Shedler, 1979).

    As many as at the highest rate all the time, of which each is kept with the share that the rate
    at its time has of the highest.
    """
    number("duration_s", duration_s, above=0)
    _check_count(highest_per_s * duration_s)
    count = rng.poisson(highest_per_s * duration_s)
    arrivals_s = np.sort(duration_s * rng.random(count))
    kept = highest_per_s * rng.random(count) < rate_per_s(arrivals_s)
    return arrivals_s[kept]


def _trace(
    name: str,
    arrivals_s: NDArray[np.float64],
    prompt_tokens: Lengths | Quantiles,
    output_tokens: Lengths | Quantiles,
    seed: int,
    part: str = "",
) -> Trace:
    """`part` begins the names of the lengths, each of which is drawn from a stream of its own."""

    def draw(what: str, lengths: Lengths | Quantiles) -> list[int]:
        return draw_lengths(_rng(seed, what), what, lengths, len(arrivals_s)).tolist()

    prompts = draw(f"{part}prompt_tokens", prompt_tokens)
    outputs = draw(f"{part}output_tokens", output_tokens)
    return Trace(name, tuple(map(TraceRequest, arrivals_s.tolist(), prompts, outputs)))
