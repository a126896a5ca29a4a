"""Conditions run by the engine itself: several `LLMEngine`s as the replicas of a fleet.

The replicas take turns on one machine, and each has the clock that it would have on a machine of
its own: a step is really computed, and takes as long as it kept the processor busy. So the clocks
run side by side, other programs of this machine do not slow them down, and what happens is what
the engine does, not what a model of it says. Weights of a cold replica are really loaded.
"""

import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from course_lib.classroom.incidents.conditions import BLOCK_SIZE, Condition
from course_lib.classroom.incidents.engine_pace import one_core
from course_lib.classroom.incidents.records import (
    DecisionLog,
    FleetRun,
    ReplicaLog,
    RequestLog,
)
from course_lib.classroom.incidents.simulated import autoscaler_of
from course_lib.data import DEFAULT_MODEL
from course_lib.engine.config import EngineConfig
from course_lib.engine.engine import LLMEngine
from course_lib.engine.request import RequestMetrics
from course_lib.engine.sampling_params import SamplingParams
from course_lib.traces.trace import TraceRequest, token_ids

#: Latencies of so many scrapes count in the fleet's p95.
P95_SCRAPES = 4


class _Attempt:
    """A request on its way."""

    def __init__(self, number: int, request: TraceRequest) -> None:
        self.number, self.request = number, request
        self.prompt = token_ids(request, -1 - number)
        self.retries = 0
        self.retried_s: float | None = None
        self.dispatched_s = 0.0
        self.metrics: RequestMetrics | None = None

    @property
    def key(self) -> str:
        """Unique, also in an engine that has had it before."""
        return f"{self.number}/{self.retries}"


class _Replica:
    """An engine and its clock."""

    def __init__(self, name: str, started_s: float, slowdown: float) -> None:
        self.name, self.started_s, self.slowdown = name, started_s, slowdown
        self.engine: LLMEngine | None = None
        self.now_s = started_s
        self.ready_s: float | None = None
        self.ended_s: float | None = None
        self.end_reason = ""
        self.draining = False
        self.stepping = False
        self.busy_s = 0.0
        self.attempts: dict[str, _Attempt] = {}
        self._begun: float | None = None

    def clock(self) -> float:
        """Its time: while it works, the processor's time counts."""
        if self._begun is None:
            return self.now_s
        return self.now_s + (time.thread_time() - self._begun) * self.slowdown

    def work(self, act: Callable[[], Any]) -> tuple[Any, float]:
        """Do something; what came of it, and when it is over."""
        self._begun = time.thread_time()
        try:
            result = act()
            return result, self.clock()
        finally:
            self._begun = None

    @property
    def in_rotation(self) -> bool:
        """Whether the gateway sends it requests."""
        return self.ready_s is not None and not self.draining and self.ended_s is None

    def gauges(self) -> tuple[int, int, float]:
        """Waiting, running, share of the KV cache in use."""
        assert self.engine is not None
        scheduler = self.engine.scheduler
        return len(scheduler.waiting), len(scheduler.running), self.engine.block_pool.usage


class RealFleet:
    """Runs a condition once; `run` gives the log of it."""

    def __init__(self, condition: Condition, seed: int) -> None:
        self.condition = condition
        self.settings = condition.settings
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.replicas: list[_Replica] = []
        self.held: deque[_Attempt] = deque()  # at the gateway, since no replica is there
        self.gateway_free_s = 0.0
        self.turn = itertools.count()
        self.num_unfinished = 0
        self.arrived: list[int] = []  # prompt tokens since the last scrape
        self.ended: list[int] = []  # output tokens
        self.latencies: dict[str, list[tuple[float, float]]] = {"ttft": [], "tpot": []}
        self.log = FleetRun(self.settings, [], [], [], [], {})
        self.autoscaler = autoscaler_of(
            condition.scaling, self.settings.scrape_interval_s, lambda: self.now_s
        )
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = itertools.count()

    def _plan(self, at_s: float, act: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (at_s, next(self._count), act, args))

    def run(self) -> FleetRun:
        """Serve the whole trace."""
        condition = self.condition
        for _ in range(condition.initial_replicas):
            self._start(warm=True)
        for number, request in enumerate(condition.trace.requests):
            self._plan(request.arrival_s, self._arrive, _Attempt(number, request))
        self._plan(0.0, self._scrape)
        end_s = condition.trace.duration_s
        while self._events and (self.num_unfinished or self._events[0][0] <= end_s):
            self.now_s, _, act, args = heapq.heappop(self._events)
            act(*args)
        self.log.replicas = [
            ReplicaLog(r.name, r.started_s, r.ready_s, r.ended_s, r.end_reason)
            for r in self.replicas
        ]
        return self.log

    # Requests.

    def _arrive(self, attempt: _Attempt) -> None:
        self.num_unfinished += 1
        self.arrived.append(attempt.request.prompt_tokens)
        self._enter(attempt)

    def _enter(self, attempt: _Attempt) -> None:
        """The gateway handles one after the other."""
        self.gateway_free_s = max(self.gateway_free_s, self.now_s) + self.condition.gateway_s
        self._plan(self.gateway_free_s, self._dispatch, attempt)

    def _dispatch(self, attempt: _Attempt) -> None:
        rotation = [replica for replica in self.replicas if replica.in_rotation]
        if not rotation:
            self.held.append(attempt)
            return
        replica = rotation[next(self.turn) % len(rotation)]
        attempt.dispatched_s = self.now_s
        params = SamplingParams(
            temperature=0, max_tokens=attempt.request.output_tokens, ignore_eos=True
        )
        assert replica.engine is not None
        replica.engine.add_request(
            attempt.key, {"prompt_token_ids": attempt.prompt}, params, arrival_time=self.now_s
        )
        replica.attempts[attempt.key] = attempt
        self._go_on(replica)

    def _go_on(self, replica: _Replica) -> None:
        """Compute the next step, if there is anything to do and none is running."""
        engine = replica.engine
        if engine is None or replica.stepping or not replica.attempts:
            return
        replica.now_s, replica.stepping = self.now_s, True
        outputs, end_s = replica.work(engine.step)
        replica.busy_s += end_s - self.now_s
        self._plan(end_s, self._stepped, replica, outputs)

    def _stepped(self, replica: _Replica, outputs: list[Any]) -> None:
        """The step is over now; its tokens arrive."""
        replica.stepping = False
        replica.now_s = self.now_s
        if replica.ended_s is not None:  # reclaimed in the middle of it
            return
        for output in outputs:
            attempt = replica.attempts[output.request_id]
            times = output.metrics.token_times
            if len(times) == 1:
                ttft_s = self.now_s - attempt.request.arrival_s
                self.latencies["ttft"].append((self.now_s, ttft_s))
            if output.finished:
                self._finish(attempt, replica, output)
        if replica.draining and not replica.attempts:
            self._end(replica, "scaled down")
        self._go_on(replica)

    def _finish(self, attempt: _Attempt, replica: _Replica, output: Any) -> None:
        del replica.attempts[attempt.key]
        self.num_unfinished -= 1
        metrics, request = output.metrics, attempt.request
        self.ended.append(request.output_tokens)
        if metrics.tpot_s is not None:
            self.latencies["tpot"].append((self.now_s, metrics.tpot_s))
        self.log.requests.append(
            RequestLog(
                str(attempt.number),
                request.arrival_s,
                attempt.retried_s,
                attempt.dispatched_s,
                metrics.first_scheduled_time,
                metrics.first_token_time,
                metrics.finished_time,
                request.prompt_tokens,
                request.output_tokens,
                output.num_cached_tokens,
                metrics.num_preemptions,
                attempt.retries,
                replica.name,
            )
        )

    # Replicas.

    def _start(self, warm: bool = False) -> None:
        number = len(self.replicas)
        slowdown = self.condition.slowdowns.get(number, 1.0)
        replica = _Replica(f"replica-{number}", self.now_s, slowdown)
        self.replicas.append(replica)
        if warm:
            self._load(replica)
            self._ready(replica)
        else:
            self._plan(self.now_s + self.condition.cold_start_s, self._load_then_ready, replica)

    def _load_then_ready(self, replica: _Replica) -> None:
        if replica.ended_s is None:
            replica.now_s = self.now_s
            _, ready_s = replica.work(lambda: self._load(replica))
            self._plan(ready_s, self._ready, replica)

    def _load(self, replica: _Replica) -> None:
        """Weights into memory, and a first request that warms the code up."""
        settings = self.settings
        longest = max(r.prompt_tokens + r.output_tokens for r in self.condition.trace.requests)
        replica.engine = LLMEngine(
            EngineConfig(
                DEFAULT_MODEL,
                max_model_len=min(4096, longest + 1),
                block_size=BLOCK_SIZE,
                num_gpu_blocks_override=settings.kv_cache_tokens // BLOCK_SIZE + 1,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
            ),
            clock=replica.clock,
        )
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        replica.engine.add_request("warm-up", {"prompt_token_ids": list(range(3, 12))}, params)
        while replica.engine.has_unfinished_requests():
            replica.engine.step()

    def _ready(self, replica: _Replica) -> None:
        if replica.ended_s is not None:
            return
        replica.ready_s = replica.now_s = self.now_s
        life_s = self.condition.spot_life_s
        if life_s is not None and replica.name != "replica-0":
            self._plan(self.now_s + self.rng.expovariate(1 / life_s), self._reclaim, replica)
        held, self.held = self.held, deque()
        for attempt in held:
            self._dispatch(attempt)

    def _reclaim(self, replica: _Replica) -> None:
        """The machine is gone; what it had not finished begins anew elsewhere."""
        if replica.ended_s is not None:
            return
        lost = list(replica.attempts.values())
        self._end(replica, "reclaimed")
        for attempt in lost:
            attempt.retries += 1
            attempt.retried_s = self.now_s
            self._enter(attempt)

    def _end(self, replica: _Replica, reason: str) -> None:
        replica.ended_s, replica.end_reason, replica.engine = self.now_s, reason, None
        replica.attempts = {}

    def _scale_to(self, wanted: int) -> None:
        current = [r for r in self.replicas if r.ended_s is None and not r.draining]
        for _ in range(wanted - len(current)):
            self._start()
        for replica in reversed(current[wanted:]):
            replica.draining = True
            if not replica.attempts:
                self._end(replica, "scaled down")

    # Metrics.

    def _scrape(self) -> None:
        interval_s = self.settings.scrape_interval_s
        serving = [r for r in self.replicas if r.ready_s is not None and r.ended_s is None]
        gauges = [replica.gauges() for replica in serving]
        busy = [min(1.0, replica.busy_s / interval_s) for replica in serving]
        for replica, (waiting, running, usage) in zip(serving, gauges, strict=True):
            assert replica.engine is not None
            stats = replica.engine.scheduler.stats
            self.log.engines.setdefault(replica.name, []).append(
                {
                    "time_s": self.now_s,
                    "vllm:num_requests_running": running,
                    "vllm:num_requests_waiting": waiting,
                    "vllm:kv_cache_usage_perc": usage,
                    "vllm:num_preemptions_total": stats.num_preemptions,
                    "vllm:prefix_cache_queries_total": stats.prefix_cache_queries,
                    "vllm:prefix_cache_hits_total": stats.prefix_cache_hits,
                    "vllm:generation_tokens_total": stats.num_generation_tokens,
                }
            )
            replica.busy_s = 0.0
        waiting_since = [a.request.arrival_s for a in self.held]
        for replica in serving:
            assert replica.engine is not None
            waiting_since += [r.metrics.arrival_time for r in replica.engine.scheduler.waiting]
        values = {
            "num_requests_waiting": float(sum(g[0] for g in gauges) + len(self.held)),
            "num_requests_running": float(sum(g[1] for g in gauges)),
            "kv_cache_utilization": _mean([g[2] for g in gauges]),
            "ttft_p95_ms": 1000 * self._p95("ttft"),
            "tpot_p95_ms": 1000 * self._p95("tpot"),
            "queue_age_s": max(0.0, self.now_s - min(waiting_since, default=self.now_s)),
            "request_rate_per_s": len(self.arrived) / interval_s,
            "prompt_tokens_mean": _mean(self.arrived),
            "output_tokens_mean": _mean(self.ended),
            "num_replicas_ready": float(sum(r.in_rotation for r in serving)),
            "gpu_utilization": _mean(busy),
            "cpu_utilization": _mean(busy),
        }
        self.arrived, self.ended = [], []
        self.log.fleet.append({"time_s": self.now_s, **values})
        current = sum(r.ended_s is None and not r.draining for r in self.replicas)
        decision = self.autoscaler.decide(values, current)
        if decision.replicas != current:
            self.log.decisions.append(
                DecisionLog(self.now_s, current, decision.replicas, decision.reason)
            )
            self._scale_to(decision.replicas)
        self._plan(self.now_s + interval_s, self._scrape)

    def _p95(self, name: str) -> float:
        since_s = self.now_s - P95_SCRAPES * self.settings.scrape_interval_s
        recent = sorted(value for at_s, value in self.latencies[name] if at_s >= since_s)
        return recent[int(0.95 * (len(recent) - 1))] if recent else 0.0


def run_real(condition: Condition, seed: int) -> FleetRun:
    """The condition on real engines, on one core."""
    with one_core():
        return RealFleet(condition, seed).run()


def _mean(values: list[Any]) -> float:
    return float(sum(values) / len(values)) if values else 0.0
