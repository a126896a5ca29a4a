"""What admission decides on, and the tools it decides with.

`AdmissionBase` keeps the limits and each tenant's token buckets and decides nothing. An admission
policy derives from it and implements `decide(arrival, load)`, out of `TokenBucket` and
`virtual_arrival_ms`; the server's own is in `admission`.
"""

import math
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from course_lib.validation import number, whole_number

PriorityClass = Literal["interactive", "batch"]
V = TypeVar("V")

#: Tenants that are remembered; the one that has been silent longest is forgotten first.
MAX_TENANTS = 10_000


@dataclass(frozen=True)
class EngineLoad:
    """How busy the engine is, as admission and metrics see it.

    For a batch request at the door only batch requests count as waiting.
    """

    num_running: int
    max_num_seqs: int  # that may run at once
    num_waiting: int
    num_waiting_tokens: int  # of the prompts that wait
    oldest_waiting_age_s: float
    kv_cache_usage: float  # 0 to 1

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
    max_tokens: int  # longest reply, of all sequences together
    num_sequences: int = 1  # that need a slot each: `n` times the number of prompts

    @property
    def costs(self) -> dict[str, int]:
        """What it takes from each bucket of its tenant."""
        return {
            "tenant_requests": 1,
            "tenant_prompt_tokens": self.prompt_tokens,
            "tenant_generation_tokens": self.max_tokens,
        }


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

    @property
    def rates(self) -> dict[str, float]:
        """The rates that are limited, by the reason of a refusal."""
        rates = {
            "tenant_requests": self.requests_per_s,
            "tenant_prompt_tokens": self.prompt_tokens_per_s,
            "tenant_generation_tokens": self.generation_tokens_per_s,
        }
        return {reason: rate for reason, rate in rates.items() if rate != math.inf}


class TokenBucketBase:
    """A bucket that fills at a rate up to its size, and is full at first.

    Not abstract: a method that a student has not written yet says so when it is called.

    Args:
        rate_per_s: tokens that flow in.
        size: tokens that it holds at most.
        clock: returns seconds.
    """

    def __init__(
        self, rate_per_s: float, size: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rate_per_s = rate_per_s
        self.size = size
        self.clock = clock
        self.level = size  # below 0: it owes something
        self.updated_s = clock()  # when the level was right

    def wait_s(self, cost: float) -> float:
        """Seconds until it can pay; 0 if it can now. Nothing is taken."""
        raise NotImplementedError

    def take(self, cost: float) -> None:
        """Pay, at once after `wait_s` has returned 0."""
        raise NotImplementedError


class TokenBucket(TokenBucketBase):
    """The server's own bucket.

    A cost above its size is let through by a full bucket, which then owes the rest: otherwise it
    could never pass.
    """

    def wait_s(self, cost: float) -> float:
        """Seconds until it can pay; 0 if it can now. Nothing is taken."""
        now_s = self.clock()
        self.level = min(self.size, self.level + (now_s - self.updated_s) * self.rate_per_s)
        self.updated_s = now_s
        missing = min(cost, self.size) - self.level
        return missing / self.rate_per_s if missing > 1e-9 else 0.0

    def take(self, cost: float) -> None:
        """Pay, at once after `wait_s` has returned 0."""
        self.level -= cost


def virtual_arrival_ms(priority_class: PriorityClass, now_s: float, batch_delay_s: float) -> int:
    """The scheduler's priority of a request that arrives now: smaller is served first.

    A batch request counts as arrived `batch_delay_s` later. So interactive ones go before it, but
    only those of that time, and nobody starves.
    """
    delay_s = batch_delay_s if priority_class == "batch" else 0.0
    return round(1000 * (now_s + delay_s))


class Recent(OrderedDict[str, V], Generic[V]):
    """A dict that keeps the entries that were used last.

    Args:
        max_entries: how many.
    """

    def __init__(self, max_entries: int) -> None:
        super().__init__()
        self.max_entries = max_entries

    def __getitem__(self, key: str) -> V:
        """The value, which is now the one used last."""
        self.move_to_end(key)
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: V) -> None:
        """Add it, and forget the entry unused longest if there are too many."""
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > self.max_entries:
            del self[next(iter(self))]


class AdmissionBase(ABC):
    """The limits, and the buckets of each tenant: `buckets` maps tenant to reason to bucket.

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
        self.buckets: dict[str, dict[str, TokenBucketBase]] = Recent(MAX_TENANTS)

    @abstractmethod
    def decide(self, arrival: Arrival, load: EngineLoad) -> AdmissionDecision:
        """Admit or refuse. Only a request that is admitted counts against its tenant's limits."""
