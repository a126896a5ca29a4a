"""What an autoscaler sees: the fleet's metrics by name, and those of each replica.

`FleetMetrics` is a mapping: a rule reads `metrics["num_requests_waiting"]`, and takes a plain dict
as well. A name that is absent could not be measured.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

#: Every name that the simulator, Prometheus and Ray Serve give, with its meaning over the fleet.
METRICS = {
    "num_requests_waiting": "requests in a queue: those of the replicas and that of the gateway",
    "num_requests_running": "requests in a batch",
    "kv_cache_utilization": "mean over the replicas in rotation, 0 to 1",
    "ttft_p95_ms": "of the first tokens in the last minute; 0 if there were none",
    "tpot_p95_ms": "of the requests finished in the last minute; 0 if there were none",
    "queue_age_s": "how long the oldest waiting request has waited",
    "request_rate_per_s": "arrivals since the last scrape",
    "prompt_tokens_mean": "of the requests that arrived since the last scrape; 0 if none did",
    "output_tokens_mean": "of the requests that finished since the last scrape; 0 if none did",
    "num_replicas_ready": "in rotation",
    "gpu_utilization": "share of the time in which a kernel ran, mean over the replicas, 0 to 1",
    "cpu_utilization": "of the replicas' processors, mean, 0 to 1",
}


@dataclass(frozen=True)
class ReplicaMetrics:
    """What one replica reports.

    Args:
        name: unique in the fleet.
        ready: in rotation. One that is loading has no values yet.
        values: by the names of `METRICS` that make sense for one replica; empty if the scrape
            failed.
    """

    name: str
    ready: bool
    values: Mapping[str, float] = field(default_factory=dict)


class FleetMetrics(Mapping[str, float]):
    """The metrics of a fleet at one moment.

    Args:
        values: by the names of `METRICS`.
        replicas: those there are, loading ones included, draining ones not.
    """

    def __init__(
        self, values: Mapping[str, float], replicas: Sequence[ReplicaMetrics] = ()
    ) -> None:
        self.values_by_name = dict(values)
        self.replicas = tuple(replicas)

    def __getitem__(self, name: str) -> float:
        return self.values_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value:g}" for name, value in self.items())
        return f"FleetMetrics({values}, {len(self.replicas)} replicas)"


def measured(metrics: Mapping[str, float], name: str) -> float | None:
    """The metric, or the sum of several joined by `" + "`.

    None if one of them is absent, NaN or infinite.
    """
    values = [metrics.get(part, math.nan) for part in name.split(" + ")]
    return sum(values) if all(math.isfinite(value) for value in values) else None


def replicas_in(metrics: Mapping[str, float]) -> Sequence[ReplicaMetrics]:
    """The replicas' own metrics; none in a plain dict."""
    return metrics.replicas if isinstance(metrics, FleetMetrics) else ()
