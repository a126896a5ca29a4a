"""Who gets in: a bounded queue, priority classes, and limits for each tenant.

Without a limit the queue grows under overload until every answer comes too late to be of use.
Refusing early keeps those that are admitted fast, and tells the others when to come back. Each
refusal carries its reason.

The protocol of a part that replaces `AdmissionPolicy`: it derives from `AdmissionBase`, and
`decide(arrival, load)` returns an `AdmissionDecision`.
"""

import math

from course_lib.serving.admission_base import (
    AdmissionBase,
    AdmissionDecision,
    Arrival,
    EngineLoad,
    TokenBucket,
    virtual_arrival_ms,
)


class AdmissionPolicy(AdmissionBase):
    """The server's own policy.

    Interactive requests go before batch requests, but not for ever: the scheduler serves in the
    order of arrival, and a batch request is taken to have arrived `batch_delay_s` later. So nobody
    starves, and a batch request waits at most that much longer than an interactive one.
    """

    def decide(self, arrival: Arrival, load: EngineLoad) -> AdmissionDecision:
        """Admit or refuse. Only a request that is admitted counts against its tenant's limits."""
        refusal = self._overload(arrival, load) or self._over_tenant_limits(arrival)
        if refusal is not None:
            return refusal
        priority = virtual_arrival_ms(arrival.priority_class, self.clock(), self.batch_delay_s)
        return AdmissionDecision(True, priority)

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
        num_present = load.num_running + load.num_waiting
        num_queued = num_present + arrival.num_sequences - load.max_num_seqs
        if num_queued <= 0 or num_present == 0:  # it will run in the next step
            return None
        if num_queued > room:
            return _overloaded(
                "max_num_queued_reqs",
                f"all {load.max_num_seqs} slots are taken, {load.num_queued} requests wait, and "
                f"at most {room} may when one is {arrival.priority_class}",
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

    def _over_tenant_limits(self, arrival: Arrival) -> AdmissionDecision | None:
        """Take from all buckets of the tenant, or from none and say for which one to wait."""
        if arrival.tenant not in self.buckets:
            self.buckets[arrival.tenant] = {
                reason: TokenBucket(rate, max(1.0, rate * self.tenant.burst_s), self.clock)
                for reason, rate in self.tenant.rates.items()
            }
        buckets, costs = self.buckets[arrival.tenant], arrival.costs
        waits_s = {reason: bucket.wait_s(costs[reason]) for reason, bucket in buckets.items()}
        reason = max(waits_s, key=waits_s.__getitem__, default="")
        if reason and waits_s[reason] > 0:
            return AdmissionDecision(
                False,
                reason=reason,
                message=f"tenant {arrival.tenant!r} has used up its {reason.replace('_', ' ')}",
                status=429,
                retry_after_s=max(1, math.ceil(waits_s[reason])),
            )
        for reason, bucket in buckets.items():
            bucket.take(costs[reason])
        return None


def _overloaded(reason: str, message: str, load: EngineLoad) -> AdmissionDecision:
    """A refusal that asks to come back when about half of the queue should be gone."""
    wait_s = min(60, max(1, math.ceil(load.oldest_waiting_age_s / 2)))
    return AdmissionDecision(False, 0, reason, f"{message}; try again later", 503, wait_s)
