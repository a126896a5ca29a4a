"""Our autoscaler as Ray Serve's policy, fed by what the engines report of themselves.

Each replica tells `ReplicaReport.read()` to the controller, which calls `ServePolicy` ten times a
second. Once an interval the policy makes a step of `ControlLoop`: the reports become
`FleetMetrics`, the autoscaler decides, the very object that the simulator takes, and Ray starts or
drains replicas.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry

from course_lib.fleet.control_loop import Clock, ControlLoop, LoopDecision, SafeAutoscaler
from course_lib.fleet.metrics import FleetMetrics, ReplicaMetrics
from course_lib.fleet.telemetry import WINDOW_S
from course_lib.serving.scrape import Scrape, histogram_quantile

#: Time from the gateway to the first event of a stream. The engine's own begins later: it does not
#: see what a request has waited at the gateway.
TTFT = "course:gateway_time_to_first_event_seconds"
#: Requests for completions that have come to a replica.
RECEIVED = "course:requests_received"

_GAUGES = {
    "num_requests_waiting": "vllm:num_requests_waiting",
    "num_requests_running": "vllm:num_requests_running",
    "kv_cache_utilization": "vllm:kv_cache_usage_perc",
    "queue_age_s": "course:oldest_waiting_request_age_seconds",
}
_COUNTERS = {
    "received": f"{RECEIVED}_total",
    "prompts": "vllm:request_prompt_tokens_count",
    "prompt_tokens": "vllm:request_prompt_tokens_sum",
    "replies": "vllm:request_generation_tokens_count",
    "reply_tokens": "vllm:request_generation_tokens_sum",
}
_HISTOGRAMS = {
    "ttft_p95_ms": TTFT,
    "tpot_p95_ms": "vllm:request_time_per_output_token_seconds",
}


class ReplicaReport:
    """What one replica says to the controller: gauges of now, and what the last minute added.

    Args:
        registry: of its metrics.
        clock: returns seconds.
    """

    def __init__(
        self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.registry = registry
        self.clock = clock
        self._scrapes: deque[tuple[float, Scrape]] = deque([(clock(), self._scrape())])

    def read(self) -> dict[str, float]:
        """Numbers by name, as Ray wants them; an edge of a histogram has a name of its own."""
        now_s, now = self.clock(), self._scrape()
        self._scrapes.append((now_s, now))
        while self._scrapes[1][0] <= now_s - WINDOW_S:
            self._scrapes.popleft()
        before_s, before = self._scrapes[0]
        report = {name: now.value(sample) for name, sample in _GAUGES.items()}
        for name, sample in _COUNTERS.items():
            report[name] = now.value(sample) - before.value(sample)
        for name, histogram in _HISTOGRAMS.items():
            for edge, count in now.buckets(histogram, before):
                report[f"{name}<={edge}"] = count
        report["window_s"] = now_s - before_s
        return report

    def _scrape(self) -> Scrape:
        families = self.registry.collect()
        return Scrape([(s.name, s.labels, s.value) for family in families for s in family.samples])


def fleet_metrics(
    reports: Mapping[str, Mapping[str, float]], silent: Iterable[str], at_gateway: float
) -> FleetMetrics:
    """The fleet's metrics from the reports of its replicas.

    Args:
        reports: by replica; at least one.
        silent: replicas that there should be and that report nothing, as those that load.
        at_gateway: requests that wait there.
    """
    found = list(reports.values())
    total = {name: sum(report[name] for report in found) for name in found[0]}
    window_s = max(report["window_s"] for report in found)
    values = {
        "num_requests_waiting": total["num_requests_waiting"] + at_gateway,
        "num_requests_running": total["num_requests_running"],
        "kv_cache_utilization": total["kv_cache_utilization"] / len(found),
        "ttft_p95_ms": _p95_ms("ttft_p95_ms", total),
        "tpot_p95_ms": _p95_ms("tpot_p95_ms", total),
        "request_rate_per_s": _ratio(total["received"], window_s),
        "prompt_tokens_mean": _ratio(total["prompt_tokens"], total["prompts"]),
        "output_tokens_mean": _ratio(total["reply_tokens"], total["replies"]),
        "num_replicas_ready": float(len(found)),
    }
    if at_gateway == 0:  # nobody tells how old the requests there are
        values["queue_age_s"] = max(report["queue_age_s"] for report in found)
    replicas = [
        ReplicaMetrics(
            name,
            True,
            {
                **{gauge: report[gauge] for gauge in _GAUGES},
                **{name: _p95_ms(name, report) for name in _HISTOGRAMS},
            },
        )
        for name, report in reports.items()
    ]
    return FleetMetrics(values, replicas + [ReplicaMetrics(name, False) for name in silent])


def _p95_ms(name: str, report: Mapping[str, float]) -> float:
    """0 if nothing was observed, as everywhere."""
    prefix = f"{name}<="
    buckets = sorted(
        (float(key.removeprefix(prefix)), count)
        for key, count in report.items()
        if key.startswith(prefix)
    )
    p95_s = histogram_quantile(0.95, buckets)
    return 0.0 if math.isnan(p95_s) else 1000 * p95_s


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class ServeContext(Protocol):
    """What of Ray's `AutoscalingContext` is read."""

    running_replicas: list[Any]
    target_num_replicas: int
    raw_metrics: Mapping[str, Mapping[Any, Any]]
    total_queued_requests: float


class ServePolicy:
    """A policy for Ray Serve: a control loop whose fleet is a deployment.

    Args:
        make_autoscaler: makes it with the loop's clock.
        interval_s: from one decision to the next.
        tell: is told of each decision, with its metrics and its reason.
        clock: returns seconds.
    """

    def __init__(
        self,
        make_autoscaler: Callable[[Clock], SafeAutoscaler],
        interval_s: float,
        tell: Callable[[LoopDecision], None],
        clock: Clock = time.time,
    ) -> None:
        self.interval_s = interval_s
        self.clock = clock
        self.tell = tell
        self._loop = ControlLoop(self, make_autoscaler, self, clock)
        self._next_s: float | None = None  # None: until the first replica reports
        self._context: ServeContext
        self._wanted = 0

    def __call__(self, context: ServeContext) -> tuple[int, dict[str, Any]]:
        """The replicas that there should be, and no state: the object lives on."""
        self._context = context
        self._wanted = context.target_num_replicas
        now_s = self.clock()
        if self._next_s is None and context.raw_metrics:
            self._next_s = now_s
        if self._next_s is not None and now_s >= self._next_s:
            self._next_s = now_s + self.interval_s
            self.tell(self._loop.step())
        return self._wanted, {}

    def current_replicas(self) -> int:
        """Those that Ray keeps up: running, starting, or to be started anew."""
        return self._context.target_num_replicas

    def scale_to(self, replicas: int) -> None:
        """Ray is told when the call returns."""
        self._wanted = replicas

    def read(self) -> FleetMetrics:
        """The reports that are fresh.

        Raises:
            RuntimeError: there are none.
        """
        context = self._context
        oldest_s = self.clock() - 3 * self.interval_s
        reports: dict[str, dict[str, float]] = {}
        for name, by_replica in context.raw_metrics.items():
            for replica, series in by_replica.items():
                if series and series[-1].timestamp >= oldest_s:
                    reports.setdefault(replica.unique_id, {})[name] = series[-1].value
        if not reports:
            raise RuntimeError(f"no replica has reported in the last {3 * self.interval_s:g} s")
        silent = [r.unique_id for r in context.running_replicas if r.unique_id not in reports]
        loading = context.target_num_replicas - len(context.running_replicas)
        silent += [f"loading-{index}" for index in range(loading)]
        return fleet_metrics(reports, silent, context.total_queued_requests)
