"""Who gets in: a bounded queue, priority classes, and limits for each tenant.

Without a limit the queue grows under overload until every answer comes too late to be of use.
Refusing early keeps those that are admitted fast, and tells the others when to come back. Each
refusal carries its reason.

The protocol of a part that replaces `AdmissionPolicy`: `decide(arrival, load)` returns an
`AdmissionDecision`.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from course_lib.validation import number, whole_number

PriorityClass = Literal["interactive", "batch"]

#: Tenants that are remembered; the one that has been silent longest is forgotten first.
MAX_TENANTS = 10_000


@dataclass(frozen=True)
class EngineLoad:
    """How busy the engine is, as admission and metrics see it."""

    num_running: int
    max_num_seqs: int  # that may run at once
    num_waiting: int
    num_waiting_tokens: int  # of the prompts that wait
    oldest_waiting_age_s: float
    kv_cache_usage: float  # 0 to 1

    @property
    def is_full(self) -> bool:
        """Whether one more request would have to wait for a slot."""
        return self.num_running + self.num_waiting >= self.max_num_seqs

    @property
    def num_queued(self) -> int:
        """Requests that wait for a slot; those that only wait for the next step are not counted."""
        return max(0, self.num_running + self.num_waiting - self.max_num_seqs)


@dataclass(frozen=True)
class Arrival:
    """A request at the door."""

    tenant: str
    priority_class: PriorityClass
    prompt_tokens: int
    max_tokens: int  # longest reply


@dataclass(frozen=True)
class AdmissionDecision:
    """Whether the request may queue, and why not."""

    admitted: bool
    priority: int = 0  # for the scheduler: smaller is served first
    reason: str = ""  # a metric's label, such as "max_num_queued_reqs"
    message: str = ""
    status: int = 200  # 429: this tenant has had its share; 503: the server is overloaded
    retry_after_s: int = 0


@dataclass(frozen=True)
class TenantLimits:
    """Rates that each tenant may keep up, and how much it may save up for a burst."""

    requests_per_s: float = math.inf
    prompt_tokens_per_s: float = math.inf
    generation_tokens_per_s: float = math.inf  # by the longest reply that was asked for
    burst_s: float = 10.0  # a full bucket holds this many seconds of each rate

    def __post_init__(self) -> None:
        for name in ("requests_per_s", "prompt_tokens_per_s", "generation_tokens_per_s"):
            if getattr(self, name) != math.inf:
                number(name, getattr(self, name), above=0)
        number("burst_s", self.burst_s, above=0)


class AdmissionPolicy:
    """Decides on each request when it arrives.

    Interactive requests go before batch requests, but not for ever: the scheduler serves in the
    order of arrival, and a batch request is taken to have arrived `batch_delay_s` later. So nobody
    starves, and a batch request waits at most that much longer than an interactive one.

    Args:
        max_num_queued_reqs: requests that may wait; batch may fill `batch_queue_share` of it.
        max_num_queued_tokens: prompt tokens that may wait.
        max_queue_age_s: refuse while the oldest one has waited longer than this.
        kv_high_watermark: refuse what would have to wait while the KV cache is fuller than this.
        batch_queue_share: of the queue that batch requests may fill, 0 to 1.
        batch_delay_s: how much later a batch request counts as arrived.
        tenant: limits of each tenant.
        clock: returns seconds.

    Raises:
        ValueError: a limit is not a positive number.
    """

    def __init__(
        self,
        *,
        max_num_queued_reqs: int = 256,
        max_num_queued_tokens: float = math.inf,
        max_queue_age_s: float = 30.0,
        kv_high_watermark: float = 0.95,
        batch_queue_share: float = 0.5,
        batch_delay_s: float = 10.0,
        tenant: TenantLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_num_queued_reqs = whole_number(
            "max_num_queued_reqs", max_num_queued_reqs, at_least=0
        )
        if max_num_queued_tokens != math.inf:
            number("max_num_queued_tokens", max_num_queued_tokens, above=0)
        self.max_num_queued_tokens = max_num_queued_tokens
        self.max_queue_age_s = number("max_queue_age_s", max_queue_age_s, above=0)
        self.kv_high_watermark = number("kv_high_watermark", kv_high_watermark, above=0, at_most=1)
        self.batch_queue_share = number(
            "batch_queue_share", batch_queue_share, at_least=0, at_most=1
        )
        self.batch_delay_s = number("batch_delay_s", batch_delay_s, at_least=0)
        self.tenant = tenant or TenantLimits()
        self.clock = clock
        self._buckets: OrderedDict[str, _TenantBuckets] = OrderedDict()

    def decide(self, arrival: Arrival, load: EngineLoad) -> AdmissionDecision:
        """Admit or refuse. Only a request that is admitted counts against its tenant's limits."""
        now = self.clock()
        refusal = self._overload(arrival, load) or self._over_tenant_limits(arrival, now)
        if refusal is not None:
            return refusal
        delay_s = self.batch_delay_s if arrival.priority_class == "batch" else 0.0
        return AdmissionDecision(True, priority=round(1000 * (now + delay_s)))

    def _overload(self, arrival: Arrival, load: EngineLoad) -> AdmissionDecision | None:
        """A refusal because of what is in the engine already, or None."""
        share = self.batch_queue_share if arrival.priority_class == "batch" else 1.0
        room = int(self.max_num_queued_reqs * share)
        if load.oldest_waiting_age_s > self.max_queue_age_s:
            return _overloaded(
                "queue_age",
                f"the oldest request has waited {load.oldest_waiting_age_s:.1f} s, and "
                f"{self.max_queue_age_s:g} s is the limit",
                load,
            )
        if not load.is_full:  # it will run in the next step
            return None
        if load.num_queued >= room:
            return _overloaded(
                "max_num_queued_reqs",
                f"{load.num_queued} requests wait, and this is the limit for "
                f"{arrival.priority_class} ones"
                if room
                else f"all slots are taken, and {arrival.priority_class} requests may not wait",
                load,
            )
        if load.num_waiting_tokens + arrival.prompt_tokens > self.max_num_queued_tokens:
            return _overloaded(
                "max_num_queued_tokens",
                f"{load.num_waiting_tokens} prompt tokens wait, and at most "
                f"{self.max_num_queued_tokens:.0f} may",
                load,
            )
        if load.kv_cache_usage > self.kv_high_watermark:
            return _overloaded(
                "kv_cache_usage",
                f"the KV cache is {load.kv_cache_usage:.0%} full, above the watermark of "
                f"{self.kv_high_watermark:.0%}",
                load,
            )
        return None

    def _over_tenant_limits(self, arrival: Arrival, now: float) -> AdmissionDecision | None:
        buckets = self._buckets.get(arrival.tenant)
        if buckets is None:
            buckets = self._buckets[arrival.tenant] = _TenantBuckets(self.tenant, now)
            if len(self._buckets) > MAX_TENANTS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(arrival.tenant)
        costs = {
            "tenant_requests": 1,
            "tenant_prompt_tokens": arrival.prompt_tokens,
            "tenant_generation_tokens": arrival.max_tokens,
        }
        wait_s, reason = buckets.take(costs, now)
        if wait_s == 0:
            return None
        return AdmissionDecision(
            False,
            reason=reason,
            message=f"tenant {arrival.tenant!r} has used up its {reason.replace('_', ' ')}",
            status=429,
            retry_after_s=max(1, math.ceil(wait_s)),
        )


def _overloaded(reason: str, message: str, load: EngineLoad) -> AdmissionDecision:
    """A refusal that asks to come back when about half of the queue should be gone."""
    wait_s = min(60, max(1, math.ceil(load.oldest_waiting_age_s / 2)))
    return AdmissionDecision(False, 0, reason, f"{message}; try again later", 503, wait_s)


@dataclass
class _TenantBuckets:
    """Token buckets of one tenant: each fills at its rate up to `burst_s` seconds of it.

    A cost above a bucket's size is let through by a full bucket, which then owes the rest:
    otherwise it could never pass.
    """

    limits: TenantLimits
    updated: float
    levels: dict[str, float] = field(default_factory=dict)

    def take(self, costs: dict[str, int], now: float) -> tuple[float, str]:
        """Take from all buckets or from none. Returns seconds to wait, and for which bucket."""
        rates = {
            "tenant_requests": self.limits.requests_per_s,
            "tenant_prompt_tokens": self.limits.prompt_tokens_per_s,
            "tenant_generation_tokens": self.limits.generation_tokens_per_s,
        }
        elapsed_s, self.updated = now - self.updated, now
        longest = (0.0, "")
        for name, rate in rates.items():
            if rate == math.inf:
                continue
            size = max(1.0, rate * self.limits.burst_s)
            self.levels[name] = min(size, self.levels.get(name, size) + elapsed_s * rate)
            missing = min(costs[name], size) - self.levels[name]
            if missing > 1e-9:
                longest = max(longest, (missing / rate, name))
        if longest[0] == 0:
            for name in self.levels:
                self.levels[name] -= costs[name]
        return longest
