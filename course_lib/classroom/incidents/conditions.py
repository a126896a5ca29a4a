"""Trouble for a fleet: for each cause a workload and a fleet in which it happens.

    condition = make_condition("kv_exhaustion", rng, engine_pace(), held_out=False)

The same conditions are made for the simulator and for real engines, whose paces differ by a factor
of ten, so all is sized by the pace: how long a step, a prompt, a whole reply takes. Held-out
conditions come from ranges that do not overlap with those of the incidents for practice.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from course_lib.classroom.incidents.records import FleetRun, RequestLog, Settings
from course_lib.classroom.incidents.symptoms import (
    before_first_token,
    preempted_near,
    queued,
    replica_of,
    turns_before,
)
from course_lib.traces.trace import Segment, Trace, TraceRequest

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Pace:
    """How fast one replica is, roughly; and how long prompts may be there.

    Args:
        step_s: of a step that decodes one request.
        decode_s: more for each further one.
        prefill_token_s: of each token of a prompt.
        chat_tokens: range of what a user adds to the system prompt.
        reply_tokens: range of the replies.
        max_model_len: longest sequence, in tokens.
        seats: choices of `max_num_seqs`, for practice and held out.
        long_tokens: range of the long prompts, for practice and held out.
    """

    step_s: float
    decode_s: float
    prefill_token_s: float
    chat_tokens: tuple[int, int]
    reply_tokens: tuple[int, int]
    max_model_len: int
    seats: tuple[Sequence[int], Sequence[int]]
    long_tokens: tuple[tuple[int, int], tuple[int, int]]

    def reply_s(self, tokens: float, batch: int) -> float:
        """Of a whole reply in a batch of that size."""
        return tokens * (self.step_s + self.decode_s * batch)

    def capacity_per_s(self, seats: int, prompt: float, reply: float) -> float:
        """Requests a replica with full seats finishes in a second; `prompt` without cached ones."""
        return seats / (self.reply_s(reply, seats) + seats * prompt * self.prefill_token_s)


@dataclass(frozen=True)
class Scaling:
    """A HorizontalPodAutoscaler on waiting + running requests.

    Args:
        minimum: replicas.
        maximum: replicas.
        per_replica: the target, in requests.
        down_window: in scrapes; 0 scales down at the first lull.
    """

    minimum: int
    maximum: int
    per_replica: float = 1.0
    down_window: int = 60


@dataclass(frozen=True)
class Condition:
    """A fleet, a workload, and which of its requests may stand for the cause.

    Args:
        cause: the label.
        trace: what arrives.
        settings: of the replicas.
        scaling: the autoscaler's.
        initial_replicas: warm at the beginning.
        cold_start_s: a new replica is ready after this; with real engines, this much after its
            weights have been loaded.
        gateway_s: it is busy with each request.
        slowdowns: factor on the step times of the n-th replica.
        spot_life_s: mean life of a machine beyond the first; None for ever.
        least_ttft_s: a request with less is not slow.
        fits: whether a request shows the cause, given the whole run.
    """

    cause: str
    trace: Trace
    settings: Settings
    scaling: Scaling
    initial_replicas: int
    cold_start_s: float
    gateway_s: float
    fits: Callable[[RequestLog, FleetRun], bool]
    least_ttft_s: float
    slowdowns: Mapping[int, float] = field(default_factory=dict)
    spot_life_s: float | None = None


class _Maker:
    """What all conditions begin with: a healthy fleet under a healthy load."""

    def __init__(self, rng: random.Random, pace: Pace, held_out: bool) -> None:
        self.rng, self.pace, self.held_out = rng, pace, held_out
        self.seats = rng.choice(pace.seats[held_out])
        self.replicas = rng.randint(2, 3)
        self.reply = rng.uniform(*pace.reply_tokens)  # mean
        self.chat = rng.uniform(*pace.chat_tokens)
        self.system = int(self.chat * rng.uniform(1.5, 3.0)) // BLOCK_SIZE * BLOCK_SIZE
        self.tenants = rng.randint(2, 4)
        self.unit_s = pace.reply_s(self.reply, self.seats)
        self.scrape_s = round(self.unit_s * rng.uniform(0.8, 1.2), 3 if self.unit_s < 1 else 0)
        self.gateway_s = pace.step_s * rng.uniform(0.02, 0.1)
        self.chunk = rng.choice((256, 512))
        self.cold_start_s = self.unit_s * self.between((3, 6), (7, 10))
        self.requests: list[TraceRequest] = []
        self._contents = rng.randrange(1 << 30)

    def between(self, practice: tuple[float, float], held_out: tuple[float, float]) -> float:
        """A number from the range of this split."""
        return self.rng.uniform(*(held_out if self.held_out else practice))

    @property
    def capacity_per_s(self) -> float:
        """Of one replica with chats, in requests/s."""
        return self.pace.capacity_per_s(self.seats, self.chat, self.reply)

    def chats(self, start_s: float, end_s: float, rate_per_s: float) -> None:
        """Chats of a few tenants, whose system prompts are shared."""
        now_s = start_s
        while (now_s := now_s + self.rng.expovariate(rate_per_s)) < end_s:
            own = max(4, int(self.chat * self.rng.uniform(0.6, 1.4)))
            reply = max(4, int(self.reply * self.rng.uniform(0.5, 1.5)))
            self.add(now_s, own, reply, self.rng.randrange(self.tenants))

    def add(self, at_s: float, own: int, reply: int, tenant: int | None = None) -> None:
        """One request; without a tenant there is no system prompt."""
        if tenant is None:
            self.requests.append(TraceRequest(at_s, own, reply))
            return
        system = Segment(self._contents + tenant, self.system)
        self.requests.append(TraceRequest(at_s, self.system + own, reply, segments=(system,)))

    def documents(self, start_s: float, end_s: float, every_s: float) -> None:
        """A long prompt now and then."""
        at_s = start_s + self.rng.uniform(0, every_s)
        while at_s < end_s:
            tokens = self.rng.randint(*self.pace.long_tokens[self.held_out])
            self.add(at_s, tokens, max(4, int(self.reply / 4)))
            at_s += every_s * self.rng.uniform(0.7, 1.3)

    def settings(self, kv_tokens: float | None = None, budget: int | None = None) -> Settings:
        """Of the replicas; by default the KV cache has ample room for full seats."""
        longest = self.system + 1.4 * self.chat + 1.5 * self.reply + BLOCK_SIZE
        kv_tokens = 1.1 * self.seats * longest + self.tenants * self.system + 4 * self.chat \
            if kv_tokens is None else kv_tokens  # fmt: skip
        longest_request = max(r.prompt_tokens + r.output_tokens for r in self.requests)
        kv_tokens = max(kv_tokens, longest_request + 2 * BLOCK_SIZE)
        blocks = -(-int(kv_tokens) // BLOCK_SIZE)
        return Settings(self.seats, budget or self.chunk, blocks * BLOCK_SIZE, self.scrape_s)

    def condition(
        self,
        cause: str,
        fits: Callable[[RequestLog, FleetRun], bool],
        settings: Settings | None = None,
        scaling: Scaling | None = None,
        slow_s: float | None = None,
        **other: object,
    ) -> Condition:
        """The fleet as it has been described."""
        trace = Trace(cause, tuple(sorted(self.requests, key=lambda r: r.arrival_s)))
        # A healthy request computes its prompt beside a full batch, in a few steps.
        healthy_s = 3 * self.pace.reply_s(1, self.seats) + self.pace.prefill_token_s * self.chat
        return Condition(
            cause,
            trace,
            settings or self.settings(),
            scaling or Scaling(self.replicas, self.replicas),
            fits=fits,
            least_ttft_s=max(5 * healthy_s, slow_s or 0.0),
            **{
                "initial_replicas": self.replicas,
                "cold_start_s": self.cold_start_s,
                "gateway_s": self.gateway_s,
                **other,
            },  # type: ignore[arg-type]
        )


def make_condition(cause: str, rng: random.Random, pace: Pace, held_out: bool) -> Condition:
    """A fleet with that trouble.

    Args:
        cause: one of `CAUSES`.
        rng: of all that is random.
        pace: of the replicas.
        held_out: draw from the ranges that are not for practice.
    """
    return _MAKERS[cause](_Maker(rng, pace, held_out))


def _cold_replica(m: _Maker) -> Condition:
    """Scaled to zero in a quiet time; then somebody comes."""
    quiet_s = m.unit_s * m.rng.uniform(9, 14)
    m.chats(0, 2 * m.unit_s, 0.3 * m.capacity_per_s)
    m.chats(quiet_s, quiet_s + 12 * m.unit_s, m.rng.uniform(0.2, 0.5) * m.capacity_per_s)
    scaling = Scaling(0, 2, per_replica=m.seats * 0.8, down_window=2)

    def fits(request: RequestLog, run: FleetRun) -> bool:
        replica = replica_of(request, run)
        assert replica.ready_s is not None
        waited_s = min(request.dispatched_s, replica.ready_s) - max(
            request.arrival_s, replica.started_s
        )
        return waited_s > 0.6 * request.ttft_s and turns_before(request, run) <= 1

    return m.condition("cold_replica", fits, scaling=scaling, initial_replicas=1)


def _cache_blind_replica(m: _Maker) -> Condition:
    """Long system prompts, and a scale-up that sends users to an empty cache at once."""
    pace = m.pace
    m.tenants = m.rng.randint(4, 7)
    m.chunk *= 4
    work_s = m.unit_s * m.between((0.3, 0.45), (0.55, 0.8))  # to compute one system prompt
    m.system = int(min(work_s / pace.prefill_token_s, 0.8 * pace.max_model_len)) // 16 * 16
    calm_s = 6 * m.unit_s + m.tenants * m.system * pace.prefill_token_s
    m.chats(0, calm_s, 0.35 * m.replicas * m.capacity_per_s)
    m.chats(calm_s, calm_s + m.cold_start_s + 3 * m.unit_s, 0.75 * m.replicas * m.capacity_per_s)
    kv_tokens = (m.tenants + 1) * m.system + 2 * m.seats * (2 * m.chat + 2 * m.reply)
    scaling = Scaling(m.replicas, m.replicas + 1, per_replica=0.5 * m.seats)

    def fits(request: RequestLog, run: FleetRun) -> bool:
        replica = replica_of(request, run)
        shared = request.prompt_tokens > m.system
        new = replica.started_s > 0
        in_prefill = request.first_token_s - request.scheduled_s > 0.5 * request.ttft_s
        return new and shared and request.cached_tokens < 0.1 * m.system and in_prefill

    return m.condition(
        "cache_blind_replica",
        fits,
        m.settings(kv_tokens),
        scaling,
        slow_s=0.5 * m.system * pace.prefill_token_s,
    )


def _queue_overflow(m: _Maker) -> Condition:
    """More requests than seats, and no replica may be added."""
    load = m.between((1.3, 1.7), (1.8, 2.3)) * m.replicas * m.capacity_per_s
    m.chats(0, 3 * m.unit_s, 0.5 * m.replicas * m.capacity_per_s)
    m.chats(3 * m.unit_s, 9 * m.unit_s, load)
    longest = m.system + 1.4 * m.chat + 1.5 * m.reply
    # Full seats may nearly fill the cache; that is no trouble by itself.
    kv_tokens = m.seats * longest * m.rng.uniform(0.95, 1.4) + m.tenants * m.system
    return m.condition("queue_overflow", queued(0.7), m.settings(kv_tokens), slow_s=0.8 * m.unit_s)


def _long_prompt(m: _Maker) -> Condition:
    """The budget of a step is as large as the longest prompt, so nothing is chunked."""
    m.chats(0, 12 * m.unit_s, m.rng.uniform(0.35, 0.6) * m.replicas * m.capacity_per_s)
    longest = m.pace.long_tokens[m.held_out][1]
    m.documents(2 * m.unit_s, 12 * m.unit_s, 5 * m.unit_s)
    kv_tokens = m.settings().kv_cache_tokens + 1.5 * longest
    shortest = m.pace.long_tokens[m.held_out][0]

    def fits(request: RequestLog, run: FleetRun) -> bool:
        if request.prompt_tokens >= shortest:
            return False
        for other in run.requests:
            if other.prompt_tokens >= shortest and other.replica == request.replica:
                behind = min(request.first_token_s, other.first_token_s) - max(
                    request.dispatched_s, other.scheduled_s
                )
                if behind > 0.7 * request.ttft_s:
                    return True
        return False

    return m.condition("long_prompt", fits, m.settings(kv_tokens, budget=longest))


def _preemption_storm(m: _Maker) -> Condition:
    """Short prompts are admitted, long replies outgrow the cache."""
    m.reply = 2 * m.pace.reply_tokens[1]
    m.chat = m.pace.chat_tokens[0]
    m.system = BLOCK_SIZE
    share = m.between((0.55, 0.7), (0.4, 0.52))  # of what full seats would need
    kv_tokens = m.seats * (m.chat + m.reply) * share
    load = 1.7 * m.replicas * m.capacity_per_s * share
    span_s = m.pace.reply_s(m.reply, m.seats)
    m.chats(0, 3 * span_s, load)

    def fits(request: RequestLog, run: FleetRun) -> bool:
        return preempted_near(request, run) >= 0.5 and before_first_token(request) > 0.7

    return m.condition("preemption_storm", fits, m.settings(kv_tokens), slow_s=0.1 * span_s)


def _kv_exhaustion(m: _Maker) -> Condition:
    """Long contexts fill the cache while seats stay free."""
    pace = m.pace
    context = int(min(0.2 * m.unit_s / pace.prefill_token_s, 0.3 * pace.max_model_len, 40 * m.chat))
    places = max(2, int(m.seats * m.between((0.35, 0.5), (0.2, 0.32))))
    m.reply = 0.7 * m.reply
    kv_tokens = places * (context * 1.05 + 1.2 * m.reply + BLOCK_SIZE) + 0.4 * context
    each_s = pace.reply_s(m.reply, places) + places * context * pace.prefill_token_s
    load = m.between((1.25, 1.5), (1.55, 1.9)) * m.replicas * places / each_s
    now_s = 0.0
    while (now_s := now_s + m.rng.expovariate(load)) < 7 * m.unit_s:
        reply = int(m.reply * m.rng.uniform(0.8, 1.2))
        m.add(now_s, int(context * m.rng.uniform(0.95, 1.05)), reply)

    def fits(request: RequestLog, run: FleetRun) -> bool:
        return queued(0.7)(request, run) and preempted_near(request, run) < 0.1

    return m.condition("kv_exhaustion", fits, m.settings(kv_tokens), slow_s=0.5 * m.unit_s)


def _flapping(m: _Maker) -> Condition:
    """Bursts and lulls, and an autoscaler that believes each of them."""
    high = m.between((2.2, 2.6), (2.8, 3.4)) * m.capacity_per_s
    burst_s, period_s = 0.5 * m.cold_start_s, 1.25 * m.cold_start_s + 2 * m.unit_s
    for start_s in (0.0, period_s, 2 * period_s):
        m.chats(start_s, start_s + burst_s, high)
        m.chats(start_s + burst_s, start_s + period_s, 0.1 * m.capacity_per_s)
    scaling = Scaling(1, 4, per_replica=0.7 * m.seats, down_window=0)

    def fits(request: RequestLog, run: FleetRun) -> bool:
        down = any(d.wanted < d.current and d.time_s < request.arrival_s for d in run.decisions)
        return turns_before(request, run) >= 2 and down and before_first_token(request) > 0.6

    return m.condition("flapping", fits, scaling=scaling, initial_replicas=1, slow_s=0.6 * m.unit_s)


def _slow_replica(m: _Maker) -> Condition:
    """One replica takes several times as long for each step."""
    factor = m.between((3.0, 4.2), (4.5, 7.0))
    m.chats(0, 9 * m.unit_s, m.rng.uniform(0.5, 0.7) * m.replicas * m.capacity_per_s)
    slow = m.rng.randrange(m.replicas)

    def fits(request: RequestLog, run: FleetRun) -> bool:
        return request.replica == f"replica-{slow}" and before_first_token(request) > 0.6

    return m.condition("slow_replica", fits, slowdowns={slow: factor})


def _gateway_overload(m: _Maker) -> Condition:
    """The gateway takes longer for a request than requests are apart."""
    rate = m.rng.uniform(0.4, 0.65) * m.replicas * m.capacity_per_s
    m.chats(0, 10 * m.unit_s, rate)
    gateway_s = m.between((1.15, 1.4), (1.5, 1.9)) / rate

    def fits(request: RequestLog, run: FleetRun) -> bool:
        return request.dispatched_s - request.arrival_s > 0.7 * request.ttft_s

    return m.condition("gateway_overload", fits, gateway_s=gateway_s, slow_s=0.3 * m.unit_s)


def _spot_reclaim(m: _Maker) -> Condition:
    """Machines are taken back in the middle of replies."""
    m.replicas = 3
    m.chats(0, 12 * m.unit_s, m.rng.uniform(0.4, 0.6) * m.replicas * m.capacity_per_s)
    life_s = m.unit_s * m.between((6, 9), (3.5, 5.5))

    def fits(request: RequestLog, run: FleetRun) -> bool:
        if request.retried_s is None:
            return False
        return request.retried_s - request.arrival_s > 0.5 * request.ttft_s

    return m.condition("spot_reclaim", fits, spot_life_s=life_s)


_MAKERS: dict[str, Callable[[_Maker], Condition]] = {
    "cold_replica": _cold_replica,
    "cache_blind_replica": _cache_blind_replica,
    "queue_overflow": _queue_overflow,
    "long_prompt": _long_prompt,
    "preemption_storm": _preemption_storm,
    "kv_exhaustion": _kv_exhaustion,
    "flapping": _flapping,
    "slow_replica": _slow_replica,
    "gateway_overload": _gateway_overload,
    "spot_reclaim": _spot_reclaim,
}


def choose(
    condition: Condition, run: FleetRun, rng: random.Random, count: int = 1
) -> list[RequestLog]:
    """Slow requests that show the cause, at most so many, in the order of arrival."""
    slow = [
        request
        for request in run.requests
        if request.ttft_s >= condition.least_ttft_s and condition.fits(request, run)
    ]
    slow.sort(key=lambda request: request.arrival_s)
    chosen = rng.sample(slow, min(count, len(slow)))
    return sorted(chosen, key=lambda request: request.arrival_s)
