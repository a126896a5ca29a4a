"""Answers to the exercises of A2: right ones in several styles, and wrong ones of typical kinds."""

import math
import time
from bisect import bisect_left

from course_lib.serving.admission_base import (
    AdmissionBase,
    AdmissionDecision,
    TokenBucket,
    TokenBucketBase,
    virtual_arrival_ms,
)


class PlainBucket(TokenBucketBase):
    """Right: refill when asked."""

    def refill(self, now):
        self.level = min(self.size, self.level + (now - self.updated_s) * self.rate_per_s)
        self.updated_s = now

    def wait_s(self, cost):
        self.refill(self.clock())
        return max(0, min(cost, self.size) - self.level) / self.rate_per_s

    def take(self, cost):
        self.level = self.level - cost


class SpentBucket:
    """Right: keeps what was spent and when that will have flowed back, without the base."""

    def __init__(self, rate_per_s, size, clock=time.monotonic):
        self.rate, self.size, self.clock = rate_per_s, size, clock
        self.spent, self.at = 0.0, clock()

    def wait_s(self, cost):
        spent_now = max(0.0, self.spent - (self.clock() - self.at) * self.rate)
        too_much = spent_now + min(cost, self.size) - self.size
        return too_much / self.rate if too_much > 0 else 0

    def take(self, cost):
        now = self.clock()
        self.spent = max(0.0, self.spent - (now - self.at) * self.rate) + cost
        self.at = now


class NeverRefills(PlainBucket):
    def refill(self, now):
        pass


class RefillsBeyondItsSize(PlainBucket):
    def refill(self, now):
        self.level += (now - self.updated_s) * self.rate_per_s
        self.updated_s = now


class RefillsTheSameTimeTwice(PlainBucket):
    def refill(self, now):
        self.level = min(self.size, self.level + (now - self.updated_s) * self.rate_per_s)


class CountsWholeSeconds(PlainBucket):
    def refill(self, now):
        elapsed = int(now - self.updated_s)
        self.level = min(self.size, self.level + elapsed * self.rate_per_s)
        self.updated_s = now


class EmptyAtFirst(PlainBucket):
    def __init__(self, rate_per_s, size, clock):
        super().__init__(rate_per_s, size, clock)
        self.level = 0


class LargeCostsNeverPass(PlainBucket):
    def wait_s(self, cost):
        self.refill(self.clock())
        return max(0, cost - self.level) / self.rate_per_s


class AskingTakes(PlainBucket):
    def wait_s(self, cost):
        wait = super().wait_s(cost)
        if wait == 0:
            self.level -= cost
        return wait

    def take(self, cost):
        pass


class RefusedPays(PlainBucket):
    def wait_s(self, cost):
        wait = super().wait_s(cost)
        if wait > 0:
            self.level -= cost
        return wait


class ForgivesDebts(PlainBucket):
    def take(self, cost):
        self.level = max(0, self.level - cost)


class TakesNothing(PlainBucket):
    def take(self, cost):
        pass


class WaitsInTokens(PlainBucket):
    def wait_s(self, cost):
        return super().wait_s(cost) * self.rate_per_s


class SaysYesOrNo(PlainBucket):
    def wait_s(self, cost):
        return super().wait_s(cost) > 0


class RealTime(PlainBucket):
    def wait_s(self, cost):
        self.refill(time.monotonic())
        return max(0, min(cost, self.size) - self.level) / self.rate_per_s


def bucket_function(rate_per_s, size, clock):
    return PlainBucket(rate_per_s, size, clock)


def arrival_rounded(priority_class, now_s, batch_delay_s):
    """Right: seconds first."""
    if priority_class == "batch":
        now_s = now_s + batch_delay_s
    return round(now_s * 1000)


def arrival_in_milliseconds(priority_class, now_s, batch_delay_s):
    """Right: milliseconds first, cut off."""
    delays_ms = {"interactive": 0, "batch": int(1000 * batch_delay_s)}
    return int(1000 * now_s) + delays_ms[priority_class]


def arrival_strict(priority_class, now_s, batch_delay_s):
    return 1 if priority_class == "batch" else 0


def arrival_strict_then_time(priority_class, now_s, batch_delay_s):
    return round(1000 * now_s) + 10**12 * (priority_class == "batch")


def arrival_of_all_alike(priority_class, now_s, batch_delay_s):
    return round(1000 * now_s)


def arrival_batch_earlier(priority_class, now_s, batch_delay_s):
    return round(1000 * (now_s - batch_delay_s * (priority_class == "batch")))


def arrival_of_the_others(priority_class, now_s, batch_delay_s):
    return round(1000 * (now_s + batch_delay_s * (priority_class != "batch")))


def arrival_of_mixed_units(priority_class, now_s, batch_delay_s):
    return round(1000 * now_s + batch_delay_s * (priority_class == "batch"))


def arrival_in_seconds(priority_class, now_s, batch_delay_s):
    return int(now_s + batch_delay_s * (priority_class == "batch"))


def arrival_latest_first(priority_class, now_s, batch_delay_s):
    return -arrival_rounded(priority_class, now_s, batch_delay_s)


def arrival_in_fractions(priority_class, now_s, batch_delay_s):
    return 1000 * (now_s + batch_delay_s * (priority_class == "batch"))


class PlainPolicy(AdmissionBase):
    """Right: many small methods, each of which a wrong version below replaces."""

    def decide(self, arrival, load):
        reason = self.too_old(load) or self.overload(arrival, load)
        if reason:
            return self.refuse(reason, 503, 1)
        waits = self.waits(arrival)
        longest = max(waits.values(), default=0)
        if longest > 0:
            reason = max(waits, key=waits.get)
            return self.refuse(reason, 429, longest)
        self.pay(arrival)
        return AdmissionDecision(True, self.order(arrival))

    def refuse(self, reason, status, wait_s):
        seconds = max(1, math.ceil(wait_s))
        return AdmissionDecision(False, 0, reason, f"refused: {reason}", status, seconds)

    def too_old(self, load):
        return "queue_age" if load.oldest_waiting_age_s > self.max_queue_age_s else ""

    def queued(self, arrival, load):
        present = load.num_running + load.num_waiting
        return present + arrival.num_sequences - load.max_num_seqs if present else 0

    def room(self, arrival):
        if arrival.priority_class == "interactive":
            return self.max_num_queued_reqs
        return int(self.max_num_queued_reqs * self.batch_queue_share)

    def overload(self, arrival, load):
        if self.queued(arrival, load) <= 0:
            return ""
        if self.queued(arrival, load) > self.room(arrival):
            return "max_num_queued_reqs"
        return self.too_many_tokens(arrival, load) or self.too_much_kv(load)

    def too_many_tokens(self, arrival, load):
        tokens = load.num_waiting_tokens + arrival.prompt_tokens
        return "max_num_queued_tokens" if tokens > self.max_num_queued_tokens else ""

    def too_much_kv(self, load):
        return "kv_cache_usage" if load.kv_cache_usage > self.kv_high_watermark else ""

    def tenant_of(self, arrival):
        return arrival.tenant

    def size(self, rate):
        return max(1, rate * self.tenant.burst_s)

    def buckets_of(self, arrival):
        tenant = self.tenant_of(arrival)
        if tenant not in self.buckets:
            self.buckets[tenant] = {
                reason: TokenBucket(rate, self.size(rate), self.clock)
                for reason, rate in self.tenant.rates.items()
            }
        return self.buckets[tenant]

    def waits(self, arrival):
        buckets = self.buckets_of(arrival)
        return {reason: buckets[reason].wait_s(arrival.costs[reason]) for reason in buckets}

    def pay(self, arrival):
        for reason, bucket in self.buckets_of(arrival).items():
            bucket.take(arrival.costs[reason])

    def order(self, arrival):
        return virtual_arrival_ms(arrival.priority_class, self.clock(), self.batch_delay_s)


class OneMethodPolicy(AdmissionBase):
    """Right: the rules one below the other, with buckets and a dict of its own."""

    def __init__(self, **limits):
        super().__init__(**limits)
        self.levels = {}

    def decide(self, arrival, load):
        now = self.clock()
        full = self.max_num_queued_reqs
        if arrival.priority_class == "batch":
            full = math.floor(full * self.batch_queue_share)
        present = load.num_waiting + load.num_running
        behind = present + arrival.num_sequences - load.max_num_seqs
        must_wait = behind > 0 and present > 0
        tokens = load.num_waiting_tokens + arrival.prompt_tokens
        for reason, refused in [
            ("queue_age", load.oldest_waiting_age_s > self.max_queue_age_s),
            ("max_num_queued_reqs", must_wait and behind > full),
            ("max_num_queued_tokens", must_wait and tokens > self.max_num_queued_tokens),
            ("kv_cache_usage", must_wait and load.kv_cache_usage > self.kv_high_watermark),
        ]:
            if refused:
                return AdmissionDecision(
                    False, reason=reason, message="busy", status=503, retry_after_s=2
                )
        levels, late = {}, []
        for reason, rate in self.tenant.rates.items():
            size = max(1.0, self.tenant.burst_s * rate)
            level, since = self.levels.get((arrival.tenant, reason), (size, now))
            level = min(size, level + rate * (now - since))
            late.append(((min(size, arrival.costs[reason]) - level) / rate, reason))
            levels[arrival.tenant, reason] = (level - arrival.costs[reason], now)
        if late and max(late)[0] > 0:
            seconds, reason = max(late)
            return AdmissionDecision(
                False, reason=reason, message="slow down", status=429,
                retry_after_s=max(1, math.ceil(seconds)),
            )  # fmt: skip
        self.levels |= levels
        delay = self.batch_delay_s if arrival.priority_class == "batch" else 0
        return AdmissionDecision(admitted=True, priority=round((now + delay) * 1000))


class OneTooMany(PlainPolicy):
    def room(self, arrival):
        return super().room(arrival) + 1


class OneTooFew(PlainPolicy):
    def room(self, arrival):
        return super().room(arrival) - 1


class WaitingInsteadOfQueued(PlainPolicy):
    def queued(self, arrival, load):
        return load.num_waiting + arrival.num_sequences if super().queued(arrival, load) > 0 else 0


class CountsOneReply(PlainPolicy):
    def queued(self, arrival, load):
        return load.num_running + load.num_waiting + 1 - load.max_num_seqs


class BatchFillsTheQueue(PlainPolicy):
    def room(self, arrival):
        return self.max_num_queued_reqs


class EverybodyHasTheShareOfBatch(PlainPolicy):
    def room(self, arrival):
        return int(self.max_num_queued_reqs * self.batch_queue_share)


class NoQueueAge(PlainPolicy):
    def too_old(self, load):
        return ""


class QueueAgeOnlyWhenFull(PlainPolicy):
    def decide(self, arrival, load):
        self.age = super().too_old(load)
        return super().decide(arrival, load)

    def too_old(self, load):
        return ""

    def overload(self, arrival, load):
        return (self.age and self.queued(arrival, load) > 0 and self.age) or super().overload(
            arrival, load
        )


class NoTokenLimit(PlainPolicy):
    def too_many_tokens(self, arrival, load):
        return ""


class TokensWithoutThisPrompt(PlainPolicy):
    def too_many_tokens(self, arrival, load):
        too_many = load.num_waiting_tokens > self.max_num_queued_tokens
        return "max_num_queued_tokens" if too_many else ""


class NoWatermark(PlainPolicy):
    def too_much_kv(self, load):
        return ""


class WatermarkReachedIsTooMuch(PlainPolicy):
    def too_much_kv(self, load):
        return "kv_cache_usage" if load.kv_cache_usage >= self.kv_high_watermark else ""


class FreeSeatsDoNotMatter(PlainPolicy):
    def overload(self, arrival, load):
        if self.queued(arrival, load) > self.room(arrival):
            return "max_num_queued_reqs"
        return self.too_many_tokens(arrival, load) or self.too_much_kv(load)


class OneBucketForAll(PlainPolicy):
    def tenant_of(self, arrival):
        return "everybody"


class NoTenantLimits(PlainPolicy):
    def waits(self, arrival):
        return {}


class RequestsOnly(PlainPolicy):
    def buckets_of(self, arrival):
        found = super().buckets_of(arrival)
        return {k: bucket for k, bucket in found.items() if k == "tenant_requests"}


class RefusedByTheBucketPays(PlainPolicy):
    def waits(self, arrival):
        found = super().waits(arrival)
        if any(found.values()):
            self.pay(arrival)
        return found


class SomeBucketsPay(PlainPolicy):
    """Takes from each bucket that can pay, one after the other."""

    def waits(self, arrival):
        found = super().waits(arrival)
        if any(found.values()):
            for reason, wait in found.items():
                if wait == 0:
                    self.buckets_of(arrival)[reason].take(arrival.costs[reason])
        return found


class OverloadPays(PlainPolicy):
    """Pays first, then looks whether there is room."""

    def overload(self, arrival, load):
        reason = super().overload(arrival, load)
        if reason and not any(self.waits(arrival).values()):
            self.pay(arrival)
        return reason


class TenantsFirst(PlainPolicy):
    def decide(self, arrival, load):
        waits = self.waits(arrival)
        if max(waits.values(), default=0) > 0:
            return self.refuse(max(waits, key=waits.get), 429, max(waits.values()))
        return super().decide(arrival, load)


class NobodyPays(PlainPolicy):
    def pay(self, arrival):
        pass


class NoBurst(PlainPolicy):
    def size(self, rate):
        return max(1, rate)


class NamesTheFirstBucket(PlainPolicy):
    def waits(self, arrival):
        found = super().waits(arrival)
        late = [(reason, wait) for reason, wait in found.items() if wait > 0]
        return dict(late[:1])


class AlwaysTooManyRequests(PlainPolicy):
    def refuse(self, reason, status, wait_s):
        return super().refuse(reason, 429, wait_s)


class StatusesMixedUp(PlainPolicy):
    def refuse(self, reason, status, wait_s):
        return super().refuse(reason, {429: 503, 503: 429}[status], wait_s)


class NoRetryAfter(PlainPolicy):
    def refuse(self, reason, status, wait_s):
        return AdmissionDecision(False, reason=reason, message="no", status=status)


class RetryRoundedDown(PlainPolicy):
    def refuse(self, reason, status, wait_s):
        return AdmissionDecision(False, 0, reason, "no", status, max(1, int(wait_s)))


class RetryInFractions(PlainPolicy):
    def refuse(self, reason, status, wait_s):
        return AdmissionDecision(False, 0, reason, "no", status, max(1.0, wait_s))


class RetryNextHour(PlainPolicy):
    def refuse(self, reason, status, wait_s):
        return AdmissionDecision(False, 0, reason, "no", status, 3600)


class SaysNothing(PlainPolicy):
    def refuse(self, reason, status, wait_s):
        return AdmissionDecision(False, 0, reason, "", status, max(1, math.ceil(wait_s)))


class StrictPriority(PlainPolicy):
    def order(self, arrival):
        return 1 if arrival.priority_class == "batch" else 0


class NoPriority(PlainPolicy):
    def order(self, arrival):
        return 0


class TimeOfItsOwn(PlainPolicy):
    def order(self, arrival):
        return virtual_arrival_ms(arrival.priority_class, time.monotonic(), self.batch_delay_s)


class ReturnsTruth(PlainPolicy):
    def decide(self, arrival, load):
        return super().decide(arrival, load).admitted


class AdmitsEverybody(AdmissionBase):
    def decide(self, arrival, load):
        return AdmissionDecision(True)


def quantile_in_a_loop(q, buckets):
    """Right: from edge to edge."""
    total = buckets[-1][1]
    if not total:
        return float("nan")
    last_edge = last_count = 0
    for edge, count in buckets:
        if count >= q * total:
            if edge == float("inf"):
                return last_edge
            return last_edge + (q * total - last_count) / (count - last_count) * (edge - last_edge)
        last_edge, last_count = edge, count


def quantile_by_bisection(q, buckets):
    """Right: lists and a search."""
    edges, counts = [0.0], [0.0]
    for edge, count in buckets:
        edges.append(edge)
        counts.append(count)
    if counts[-1] == 0:
        return math.nan
    rank = q * counts[-1]
    at = bisect_left(counts, rank)
    if math.isinf(edges[at]):
        return edges[at - 1]
    width, num = edges[at] - edges[at - 1], counts[at] - counts[at - 1]
    return edges[at - 1] + width * (rank - counts[at - 1]) / num


def quantile_upper_edge(q, buckets):
    total = buckets[-1][1]
    return next(e for e, n in buckets if n >= q * total) if total else math.nan


def quantile_lower_edge(q, buckets):
    total, lower = buckets[-1][1], 0.0
    for edge, count in buckets:
        if count >= q * total:
            return lower if total else math.nan
        lower = edge


def quantile_middle(q, buckets):
    total, lower = buckets[-1][1], 0.0
    for edge, count in buckets:
        if count >= q * total:
            return (lower + edge) / 2 if total else math.nan
        lower = edge


def quantile_not_cumulative(q, buckets):
    rank, seen, lower = q * sum(n for _, n in buckets), 0.0, 0.0
    for edge, count in buckets:
        if count and seen + count >= rank:
            return lower if edge == math.inf else lower + (edge - lower) * (rank - seen) / count
        seen, lower = seen + count, edge
    return math.nan


def quantile_from_the_first_edge(q, buckets):
    if buckets[-1][1] and q * buckets[-1][1] <= buckets[0][1]:
        return buckets[0][0]
    return quantile_in_a_loop(q, buckets)


def quantile_infinite(q, buckets):
    found = quantile_in_a_loop(q, buckets)
    return math.inf if buckets[-1][1] and q * buckets[-1][1] > buckets[-2][1] else found


def quantile_percent(q, buckets):
    return quantile_in_a_loop(q / 100, buckets)


def quantile_zero_without_observations(q, buckets):
    return quantile_in_a_loop(q, buckets) if buckets[-1][1] else 0.0


def quantile_of_the_finite_ones(q, buckets):
    """Leaves out what lies above the last edge."""
    return quantile_in_a_loop(q, buckets[:-1])


RIGHT = {
    "A2.1": [PlainBucket, SpentBucket],
    "A2.2": [arrival_rounded, arrival_in_milliseconds],
    "A2.3": [PlainPolicy, OneMethodPolicy],
    "A2.4": [quantile_in_a_loop, quantile_by_bisection],
}
WRONG = {
    "A2.1": [
        NeverRefills,
        RefillsBeyondItsSize,
        RefillsTheSameTimeTwice,
        CountsWholeSeconds,
        EmptyAtFirst,
        LargeCostsNeverPass,
        AskingTakes,
        RefusedPays,
        ForgivesDebts,
        TakesNothing,
        WaitsInTokens,
        SaysYesOrNo,
        RealTime,
        bucket_function,
    ],
    "A2.2": [
        arrival_strict,
        arrival_strict_then_time,
        arrival_of_all_alike,
        arrival_batch_earlier,
        arrival_of_the_others,
        arrival_of_mixed_units,
        arrival_in_seconds,
        arrival_latest_first,
        arrival_in_fractions,
    ],
    "A2.3": [
        OneTooMany,
        OneTooFew,
        WaitingInsteadOfQueued,
        CountsOneReply,
        BatchFillsTheQueue,
        EverybodyHasTheShareOfBatch,
        NoQueueAge,
        QueueAgeOnlyWhenFull,
        NoTokenLimit,
        TokensWithoutThisPrompt,
        NoWatermark,
        WatermarkReachedIsTooMuch,
        FreeSeatsDoNotMatter,
        OneBucketForAll,
        NoTenantLimits,
        RequestsOnly,
        RefusedByTheBucketPays,
        SomeBucketsPay,
        OverloadPays,
        TenantsFirst,
        NobodyPays,
        NoBurst,
        NamesTheFirstBucket,
        AlwaysTooManyRequests,
        StatusesMixedUp,
        NoRetryAfter,
        RetryRoundedDown,
        RetryInFractions,
        RetryNextHour,
        SaysNothing,
        StrictPriority,
        NoPriority,
        TimeOfItsOwn,
        ReturnsTruth,
        AdmitsEverybody,
        PlainBucket,
    ],
    "A2.4": [
        quantile_upper_edge,
        quantile_lower_edge,
        quantile_middle,
        quantile_not_cumulative,
        quantile_from_the_first_edge,
        quantile_infinite,
        quantile_percent,
        quantile_zero_without_observations,
        quantile_of_the_finite_ones,
    ],
}
