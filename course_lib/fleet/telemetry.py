"""What can be scraped of a simulated fleet: the metrics that its autoscalers decide by.

`Telemetry` sees the first tokens and the ends of a region's requests go by, and once an interval
turns them, and what the replicas report, into `FleetMetrics`.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from course_lib.fleet.capacity import Member, State
from course_lib.fleet.metrics import FleetMetrics, ReplicaMetrics

#: Latencies of so long ago still count, as in a PromQL query over [1m].
WINDOW_S = 60.0


class Telemetry:
    """The metrics of one region.

    Args:
        interval_s: between two scrapes.
        cpu_cores: of a replica's machine.
    """

    def __init__(self, interval_s: float, cpu_cores: int) -> None:
        self.interval_s = interval_s
        self.cpu_cores = cpu_cores
        self.arrived_prompt_tokens: list[int] = []  # since the last scrape
        self.finished_output_tokens: list[int] = []
        self.ttft_s: deque[tuple[float, float]] = deque()  # (when, how long)
        self.tpot_s: deque[tuple[float, float]] = deque()
        self._busy_s: dict[str, float] = {}  # of each replica at the last scrape

    def scrape(
        self, now_s: float, members: Sequence[Member], held_since_s: Sequence[float]
    ) -> FleetMetrics:
        """The metrics now; the next interval begins.

        Args:
            now_s: the time.
            members: replicas of the region.
            held_since_s: arrivals of the requests that wait at the gateway for a replica.
        """
        serving = [m for m in members if m.state in (State.READY, State.DRAINING)]
        ready = [m for m in serving if m.state is State.READY]
        reported = {m.replica.name: self._report(m) for m in serving}
        of_ready = [reported[m.replica.name] for m in ready]
        arrivals = [
            request.metrics.arrival_time for m in serving for request in m.replica.scheduler.waiting
        ]
        oldest_s = min([*arrivals, *held_since_s], default=now_s)
        values = {
            "num_requests_waiting": sum(r["num_requests_waiting"] for r in reported.values())
            + len(held_since_s),
            "num_requests_running": sum(r["num_requests_running"] for r in reported.values()),
            "kv_cache_utilization": _mean([r["kv_cache_utilization"] for r in of_ready]),
            "ttft_p95_ms": 1000 * _p95(self.ttft_s, now_s),
            "tpot_p95_ms": 1000 * _p95(self.tpot_s, now_s),
            "queue_age_s": now_s - oldest_s,
            "request_rate_per_s": len(self.arrived_prompt_tokens) / self.interval_s,
            "prompt_tokens_mean": _mean(self.arrived_prompt_tokens),
            "output_tokens_mean": _mean(self.finished_output_tokens),
            "num_replicas_ready": float(len(ready)),
            "gpu_utilization": _mean([r["gpu_utilization"] for r in of_ready]),
            "cpu_utilization": _mean([r["cpu_utilization"] for r in of_ready]),
        }
        self.arrived_prompt_tokens, self.finished_output_tokens = [], []
        replicas = [
            ReplicaMetrics(m.replica.name, m.state is State.READY, reported.get(m.replica.name, {}))
            for m in members
            if m.state in (State.LOADING, State.READY) and not m.for_standby
        ]
        return FleetMetrics(values, replicas)

    def _report(self, member: Member) -> dict[str, float]:
        replica = member.replica
        busy_s = replica.busy_s
        busy = (busy_s - self._busy_s.get(replica.name, 0.0)) / self.interval_s
        self._busy_s[replica.name] = busy_s
        return {
            "num_requests_waiting": float(replica.num_waiting),
            "num_requests_running": float(replica.num_running),
            "kv_cache_utilization": replica.kv_cache_usage,
            "gpu_utilization": min(1.0, busy),
            # The engine's loop keeps one core busy while it steps; the others hardly do a thing.
            "cpu_utilization": min(1.0, busy) / self.cpu_cores,
        }


def replica_row(now_s: float, member: Member, reported: ReplicaMetrics | None) -> dict[str, Any]:
    """One replica's line of a scrape: the metrics and the counters since its start."""
    stats = member.replica.scheduler.stats
    return {
        "time_s": now_s,
        "replica": member.replica.name,
        "region": member.replica.region,
        "state": member.state.value,
        **(reported.values if reported else {}),
        "num_preemptions": stats.num_preemptions,
        "prefix_cache_queries": stats.prefix_cache_queries,
        "prefix_cache_hits": stats.prefix_cache_hits,
        "generation_tokens": stats.num_generation_tokens,
        "scheduled_tokens": stats.num_scheduled_tokens,
        "steps": stats.num_steps,
    }


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0


def _p95(samples: deque[tuple[float, float]], now_s: float) -> float:
    while samples and samples[0][0] < now_s - WINDOW_S:
        samples.popleft()
    return float(np.percentile([value for _, value in samples], 95)) if samples else 0.0
