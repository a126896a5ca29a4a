"""Answers to the exercises of A3: right ones in several styles, and wrong ones of typical kinds."""

import math
import time
from collections import deque

from course_lib.fleet.autoscaler import GPUAutoscalerBase, ScalingDecision
from course_lib.fleet.proportional_base import (
    ProportionalBase,
    StabilizationWindow,
    StabilizationWindowBase,
    replicas_for_load,
)


class PlainRule(GPUAutoscalerBase):
    """Right: small methods, each of which a wrong version below replaces."""

    def decide(self, metrics, current_replicas):
        now = self.clock()
        step = self.step(metrics, current_replicas)
        if self.holds(now, step):
            step = 0
        replicas = self.clamp(current_replicas + step)
        self.note(now, step, replicas, current_replicas)
        return ScalingDecision(replicas, f"step {step}")

    def step(self, metrics, current):
        if self.high(metrics):
            return 1
        return -1 if self.quiet(metrics, current) else 0

    def high(self, metrics):
        return (
            metrics["num_requests_waiting"] > 10
            or metrics["kv_cache_utilization"] > 0.85
            or metrics["ttft_p95_ms"] > 1500
        )

    def quiet(self, metrics, current):
        return (
            metrics["num_requests_waiting"] == 0
            and metrics["num_requests_running"] <= self.few(current)
            and metrics["kv_cache_utilization"] < 0.20
        )

    def few(self, current):
        return max(1, current // 2)

    def holds(self, now, step):
        return self.last_change_s is not None and now - self.last_change_s < self.cooldown_s

    def clamp(self, replicas):
        return max(self.min_replicas, min(self.max_replicas, replicas))

    def note(self, now, step, replicas, current):
        if replicas != current:
            self.last_change_s = now


class NextChangeRule(GPUAutoscalerBase):
    """Right: keeps the moment from which on it may change again."""

    free_from_s = -math.inf

    def decide(self, metrics, current_replicas):
        limits = {"num_requests_waiting": 10, "kv_cache_utilization": 0.85, "ttft_p95_ms": 1500}
        over = [name for name, limit in limits.items() if metrics[name] > limit]
        wanted, reason = current_replicas, "calm"
        if self.clock() < self.free_from_s:
            reason = "cooling down"
        elif over:
            wanted, reason = current_replicas + 1, f"{over[0]} is high"
        elif (
            not metrics["num_requests_waiting"]
            and metrics["num_requests_running"] <= (current_replicas // 2 or 1)
            and metrics["kv_cache_utilization"] < 0.2
        ):
            wanted, reason = current_replicas - 1, "quiet"
        wanted = min(max(wanted, self.min_replicas), self.max_replicas)
        if wanted != current_replicas:
            self.free_from_s = self.clock() + self.cooldown_s
        return ScalingDecision(wanted, reason)


class SignalsAtTheLimit(PlainRule):
    def high(self, metrics):
        return (
            metrics["num_requests_waiting"] >= 10
            or metrics["kv_cache_utilization"] >= 0.85
            or metrics["ttft_p95_ms"] >= 1500
        )


class QueueAndCacheOnly(PlainRule):
    def high(self, metrics):
        return metrics["num_requests_waiting"] > 10 or metrics["kv_cache_utilization"] > 0.85


class NoCache(PlainRule):
    def high(self, metrics):
        return metrics["num_requests_waiting"] > 10 or metrics["ttft_p95_ms"] > 1500


class AllSignals(PlainRule):
    def high(self, metrics):
        return (
            metrics["num_requests_waiting"] > 10
            and metrics["kv_cache_utilization"] > 0.85
            and metrics["ttft_p95_ms"] > 1500
        )


class DownWhenNobodyWaits(PlainRule):
    def quiet(self, metrics, current):
        return metrics["num_requests_waiting"] == 0


class QuietFirst(PlainRule):
    def step(self, metrics, current):
        return -1 if self.quiet(metrics, current) else int(self.high(metrics))


class NoCooldown(PlainRule):
    def holds(self, now, step):
        return False


class CooldownTooLong(PlainRule):
    def holds(self, now, step):
        return self.last_change_s is not None and now - self.last_change_s <= self.cooldown_s


class CooldownDownOnly(PlainRule):
    def holds(self, now, step):
        return step < 0 and super().holds(now, step)


class CooldownSinceALook(PlainRule):
    def note(self, now, step, replicas, current):
        self.last_change_s = now


class CooldownSinceAWish(PlainRule):
    def note(self, now, step, replicas, current):
        if step or replicas != current:
            self.last_change_s = now


class CooldownFromTheStart(PlainRule):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.last_change_s = self.clock()


class NoLimits(PlainRule):
    def clamp(self, replicas):
        return replicas


class NoMaximum(PlainRule):
    def clamp(self, replicas):
        return max(self.min_replicas, replicas)


class RealTimeRule(PlainRule):
    def decide(self, metrics, current_replicas):
        self.clock = time.time
        return super().decide(metrics, current_replicas)


class TwoAtOnce(PlainRule):
    def step(self, metrics, current):
        return 2 * super().step(metrics, current)


class NumberAlone(PlainRule):
    def decide(self, metrics, current_replicas):
        return super().decide(metrics, current_replicas).replicas


class NoReason(PlainRule):
    def decide(self, metrics, current_replicas):
        return ScalingDecision(super().decide(metrics, current_replicas).replicas, "")


def load_in_steps(metrics, current_replicas, target, target_kv_cache, tolerance):
    """Right: one thing after the other."""
    by_requests = (metrics["num_requests_waiting"] + metrics["num_requests_running"]) / target
    by_cache = metrics["kv_cache_utilization"] * metrics["num_replicas_ready"] / target_kv_cache
    load = max(by_requests, by_cache)
    if current_replicas > 0:
        ratio = load / current_replicas
        if 1 - tolerance <= ratio <= 1 + tolerance:
            return current_replicas
    return math.ceil(load)


def load_by_ratios(metrics, current, target, cache_target, tolerance):
    """Right: as the HPA has it, ratio times current."""
    if current == 0:
        return load_in_steps(metrics, current, target, cache_target, tolerance)
    requests = metrics["num_requests_waiting"] + metrics["num_requests_running"]
    share = metrics["num_replicas_ready"] / current
    ratios = [requests / current / target, share * metrics["kv_cache_utilization"] / cache_target]
    if abs(max(ratios) - 1) <= tolerance:
        return current
    return -int(-max(ratios) * current // 1)


def _without(name):
    def answer(metrics, current, *settings):
        return load_in_steps({**metrics, name: 0.0}, current, *settings)

    return answer


load_waiting_only = _without("num_requests_running")
load_running_only = _without("num_requests_waiting")
load_without_cache = _without("kv_cache_utilization")


def load_cache_of_all(metrics, current, *settings):
    return load_in_steps({**metrics, "num_replicas_ready": current}, current, *settings)


def load_summed(metrics, current, target, cache_target, tolerance):
    requests = metrics["num_requests_waiting"] + metrics["num_requests_running"]
    cache = metrics["num_replicas_ready"] * metrics["kv_cache_utilization"]
    load = requests / target + cache / cache_target
    if current and abs(load / current - 1) <= tolerance:
        return current
    return math.ceil(load)


def load_without_tolerance(metrics, current, target, cache_target, tolerance):
    return load_in_steps(metrics, 0, target, cache_target, tolerance)


def load_rounded_down(metrics, current, target, cache_target, tolerance):
    requests = metrics["num_requests_waiting"] + metrics["num_requests_running"]
    cache = metrics["num_replicas_ready"] * metrics["kv_cache_utilization"]
    load = max(requests / target, cache / cache_target)
    return current if current and abs(load / current - 1) <= tolerance else int(load)


def load_one_more(metrics, current, *settings):
    requests = metrics["num_requests_waiting"] + metrics["num_requests_running"]
    cache = metrics["num_replicas_ready"] * metrics["kv_cache_utilization"]
    load = max(requests / settings[0], cache / settings[1])
    return current if current and abs(load / current - 1) <= settings[2] else int(load) + 1


def load_one_step(metrics, current, *settings):
    wanted = load_in_steps(metrics, current, *settings)
    return current + (wanted > current) - (wanted < current)


def load_divides_by_zero(metrics, current, target, cache_target, tolerance):
    requests = metrics["num_requests_waiting"] + metrics["num_requests_running"]
    cache = metrics["num_replicas_ready"] * metrics["kv_cache_utilization"]
    load = max(requests / target, cache / cache_target)
    return current if abs(load / current - 1) <= tolerance else math.ceil(load)


class PlainWindow(StabilizationWindowBase):
    """Right: the window's own list, pruned each time."""

    def stabilize(self, wanted, current_replicas):
        now = self.clock()
        self.recommendations.append((now, wanted))
        self.forget(now)
        if wanted >= current_replicas:
            return wanted
        return min(current_replicas, self.of([n for _, n in self.recommendations] or [wanted]))

    def forget(self, now):
        self.recommendations = [
            r for r in self.recommendations if now - r[0] < self.window_s or r[0] == now
        ]

    def of(self, recent):
        return max(recent)


class DecreasingWindow:
    """Right: a queue that keeps only what may be the highest one day, without the base."""

    def __init__(self, window_s, clock=time.monotonic):
        self.window_s, self.clock, self.queue = window_s, clock, deque()

    def stabilize(self, wanted, current_replicas):
        now = self.clock()
        while self.queue and self.queue[-1][1] <= wanted:
            self.queue.pop()
        self.queue.append((now, wanted))
        while self.queue[0][0] + self.window_s <= now < now + 1 and len(self.queue) > 1:
            self.queue.popleft()
        highest = self.queue[0][1]
        return wanted if wanted > current_replicas else min(current_replicas, highest)


class NoWindow(PlainWindow):
    def stabilize(self, wanted, current_replicas):
        return wanted


class CooldownWindow(PlainWindow):
    changed_s = -math.inf

    def stabilize(self, wanted, current_replicas):
        now = self.clock()
        if wanted < current_replicas and now - self.changed_s < self.window_s:
            return current_replicas
        if wanted != current_replicas:
            self.changed_s = now
        return wanted


class LowestOfTheWindow(PlainWindow):
    def of(self, recent):
        return min(recent)


class DelaysGoingUp(PlainWindow):
    def stabilize(self, wanted, current_replicas):
        down = super().stabilize(wanted, current_replicas)
        if wanted > current_replicas:
            return max(current_replicas, min(n for _, n in self.recommendations))
        return down


class ForgetsGoingUp(PlainWindow):
    def stabilize(self, wanted, current_replicas):
        if wanted >= current_replicas:
            return wanted
        return super().stabilize(wanted, current_replicas)


class RemembersResults(PlainWindow):
    def stabilize(self, wanted, current_replicas):
        result = super().stabilize(wanted, current_replicas)
        self.recommendations[-1] = (self.recommendations[-1][0], result)
        return result


class NeverForgets(PlainWindow):
    def forget(self, now):
        pass


class KeepsOneTooOld(PlainWindow):
    def forget(self, now):
        self.recommendations = [r for r in self.recommendations if now - r[0] <= self.window_s]


class LastFive(PlainWindow):
    def forget(self, now):
        self.recommendations = self.recommendations[-5:]


class BeyondCurrent(PlainWindow):
    def stabilize(self, wanted, current_replicas):
        result = super().stabilize(wanted, current_replicas)
        highest = max(n for _, n in self.recommendations)
        return result if wanted >= current_replicas else highest


class RealTimeWindow(PlainWindow):
    def stabilize(self, wanted, current_replicas):
        self.clock = time.monotonic
        return super().stabilize(wanted, current_replicas)


class PlainAutoscaler(ProportionalBase):
    """Right: small methods, each of which a wrong version below replaces."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.window = self.make_window()

    def make_window(self):
        return StabilizationWindow(self.window_s, self.clock)

    def decide(self, metrics, current_replicas):
        names = (
            "num_requests_waiting",
            "num_requests_running",
            "kv_cache_utilization",
            "num_replicas_ready",
        )
        filled = {name: metrics.get(name, 0.0) for name in names}
        wanted = self.wanted(filled, current_replicas)
        if not all(name in metrics for name in names):
            wanted = self.with_gaps(wanted, current_replicas)
        replicas = self.clamp(self.window.stabilize(wanted, current_replicas))
        return ScalingDecision(replicas, f"{wanted} needed")

    def wanted(self, metrics, current):
        return replicas_for_load(
            metrics, current, self.target_per_replica, self.target_kv_cache, self.tolerance
        )

    def with_gaps(self, wanted, current):
        return max(wanted, current)

    def clamp(self, replicas):
        return min(max(replicas, self.min_replicas), self.max_replicas)


class SelfContainedAutoscaler(ProportionalBase):
    """Right: without the helpers, with a list of its own that is made when it is needed."""

    past = ()

    def decide(self, metrics, current_replicas):
        now = self.clock()
        get = metrics.get
        load = (get("num_requests_waiting", 0) + get("num_requests_running", 0)) / (
            self.target_per_replica
        )
        cache = get("num_replicas_ready", 0) * get("kv_cache_utilization", 0)
        load = max(load, cache / self.target_kv_cache)
        needed = math.ceil(load - 1e-12)
        if current_replicas and abs(load - current_replicas) <= self.tolerance * current_replicas:
            needed = current_replicas
        seen = {"num_requests_waiting", "num_requests_running", "kv_cache_utilization"}
        if not (seen | {"num_replicas_ready"}) <= set(metrics):
            needed = max(needed, current_replicas)
        self.past = [(t, n) for t, n in self.past if t > now - self.window_s] + [(now, needed)]
        if needed < current_replicas:
            needed = min(current_replicas, max(n for _, n in self.past))
        return ScalingDecision(
            max(self.min_replicas, min(needed, self.max_replicas)), f"load of {load:.1f} replicas"
        )


class WaitingOnly(PlainAutoscaler):
    def wanted(self, metrics, current):
        return super().wanted({**metrics, "num_requests_running": 0.0}, current)


class NoCacheAtAll(PlainAutoscaler):
    def wanted(self, metrics, current):
        return super().wanted({**metrics, "kv_cache_utilization": 0.0}, current)


class CacheOfAll(PlainAutoscaler):
    def wanted(self, metrics, current):
        return super().wanted({**metrics, "num_replicas_ready": current}, current)


class OneStepAtATime(PlainAutoscaler):
    def wanted(self, metrics, current):
        wanted = super().wanted(metrics, current)
        return current + (wanted > current) - (wanted < current)


class NeverMissing(PlainAutoscaler):
    def with_gaps(self, wanted, current):
        return wanted


class HoldsWhenMissing(PlainAutoscaler):
    def with_gaps(self, wanted, current):
        return current


class AutoscalerWithoutWindow(PlainAutoscaler):
    def make_window(self):
        return NoWindow(self.window_s, self.clock)


class AutoscalerWithACooldown(PlainAutoscaler):
    """The old flaw: nothing moves for a while after a change, up or down."""

    changed_s = -math.inf

    def decide(self, metrics, current_replicas):
        wanted = super().decide(metrics, current_replicas)
        if self.clock() - self.changed_s < self.window_s:
            return ScalingDecision(self.clamp(current_replicas), "cooldown")
        if wanted.replicas != current_replicas:
            self.changed_s = self.clock()
        return wanted

    def make_window(self):
        return NoWindow(self.window_s, self.clock)


class AutoscalerThatDelaysGoingUp(PlainAutoscaler):
    def make_window(self):
        return DelaysGoingUp(self.window_s, self.clock)


class AutoscalerThatForgets(PlainAutoscaler):
    def make_window(self):
        return ForgetsGoingUp(self.window_s, self.clock)


class AutoscalerWithoutLimits(PlainAutoscaler):
    def clamp(self, replicas):
        return replicas


class AutoscalerWithoutMaximum(PlainAutoscaler):
    def clamp(self, replicas):
        return max(self.min_replicas, replicas)


class AutoscalerInRealTime(PlainAutoscaler):
    def make_window(self):
        return StabilizationWindow(self.window_s, time.monotonic)


class AutoscalerThatReads(PlainAutoscaler):
    def decide(self, metrics, current_replicas):
        self.wanted({name: metrics[name] for name in metrics}, current_replicas)
        return super().decide(metrics, current_replicas)


class AutoscalerOfNumbers(PlainAutoscaler):
    def decide(self, metrics, current_replicas):
        return super().decide(metrics, current_replicas).replicas


RIGHT = {
    "A3.1": [PlainRule, NextChangeRule],
    "A3.2": [load_in_steps, load_by_ratios],
    "A3.3": [PlainWindow, DecreasingWindow],
    "A3.4": [PlainAutoscaler, SelfContainedAutoscaler],
}
WRONG = {
    "A3.1": [
        SignalsAtTheLimit,
        QueueAndCacheOnly,
        NoCache,
        AllSignals,
        DownWhenNobodyWaits,
        QuietFirst,
        NoCooldown,
        CooldownTooLong,
        CooldownDownOnly,
        CooldownSinceALook,
        CooldownSinceAWish,
        CooldownFromTheStart,
        NoLimits,
        NoMaximum,
        RealTimeRule,
        TwoAtOnce,
        NumberAlone,
        NoReason,
    ],
    "A3.2": [
        load_waiting_only,
        load_running_only,
        load_without_cache,
        load_cache_of_all,
        load_summed,
        load_without_tolerance,
        load_rounded_down,
        load_one_more,
        load_one_step,
        load_divides_by_zero,
    ],
    "A3.3": [
        NoWindow,
        CooldownWindow,
        LowestOfTheWindow,
        DelaysGoingUp,
        ForgetsGoingUp,
        RemembersResults,
        NeverForgets,
        KeepsOneTooOld,
        LastFive,
        BeyondCurrent,
        RealTimeWindow,
    ],
    "A3.4": [
        WaitingOnly,
        NoCacheAtAll,
        CacheOfAll,
        OneStepAtATime,
        NeverMissing,
        HoldsWhenMissing,
        AutoscalerWithoutWindow,
        AutoscalerWithACooldown,
        AutoscalerThatDelaysGoingUp,
        AutoscalerThatForgets,
        AutoscalerWithoutLimits,
        AutoscalerWithoutMaximum,
        AutoscalerInRealTime,
        AutoscalerThatReads,
        AutoscalerOfNumbers,
        PlainRule,
    ],
}
