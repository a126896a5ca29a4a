"""Reading `/metrics` of any server that speaks Prometheus' text format: vLLM, or ours.

    before = scrape(url)
    ...
    print(quantile(scrape(url), "vllm:time_to_first_token_seconds", 0.95, before))

`Watch` reads it again and again while something else runs.
"""

import math
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scrape:
    """What `/metrics` said at one moment: (sample, its labels but the common ones, value)."""

    samples: Sequence[tuple[str, dict[str, str], float]]

    def value(self, name: str) -> float:
        """A gauge or a counter, summed over its labels; 0 if it is not there."""
        return math.fsum(value for sample, _, value in self.samples if sample == name)

    def by_label(self, name: str, label: str) -> dict[str, float]:
        """The values of a gauge or a counter, by one of its labels."""
        return {labels[label]: value for sample, labels, value in self.samples if sample == name}

    def buckets(self, name: str, before: "Scrape | None" = None) -> list[tuple[float, float]]:
        """A histogram as (upper edge, observations up to it), the last edge infinite.

        Args:
            name: of the histogram, without `_bucket`.
            before: count only what came after this scrape.
        """
        edges = self.by_label(f"{name}_bucket", "le")
        earlier = before.by_label(f"{name}_bucket", "le") if before else {}
        found = [(float(edge), count - earlier.get(edge, 0.0)) for edge, count in edges.items()]
        return sorted(found)


def scrape(url: str) -> Scrape:
    """Read the metrics of a server.

    Raises:
        OSError: it does not answer.
    """
    from prometheus_client.parser import text_string_to_metric_families  # of the extra "serve"

    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    return Scrape(
        [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]
    )


def histogram_quantile(q: float, buckets: Sequence[tuple[float, float]]) -> float:
    """Prometheus' estimate of a quantile: linear within the bucket in which it lies.

    https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile

    Args:
        q: above 0, up to 1.
        buckets: (upper edge, observations up to it), the last edge infinite.

    Returns:
        NaN if nothing was observed; the last finite edge if the quantile lies above it.
    """
    rank = q * buckets[-1][1]
    if rank == 0:
        return math.nan
    lower, below = 0.0, 0.0
    for edge, count in buckets:
        if count >= rank:
            break
        lower, below = edge, count
    if edge == math.inf:
        return lower
    return lower + (edge - lower) * (rank - below) / (count - below)


def quantile(after: Scrape, name: str, q: float, before: Scrape | None = None) -> float:
    """A quantile of a histogram of `/metrics`, of what came between two scrapes."""
    return histogram_quantile(q, after.buckets(name, before))


@dataclass(frozen=True)
class QueueSample:
    """The queue at one moment."""

    time_s: float  # since the watch began
    num_running: int
    num_waiting: int
    oldest_waiting_s: float | None  # vLLM does not say
    kv_cache_usage: float  # 0 to 1


class Watch:
    """Reads a server's gauges from a thread, while inside a `with` block.

    Args:
        url: of the server.
        interval_s: between two readings.
    """

    def __init__(self, url: str, interval_s: float = 0.1) -> None:
        self.url = url
        self.interval_s = interval_s
        self.samples: list[QueueSample] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        start_s = time.perf_counter()
        while not self._ended.is_set():
            try:
                found = scrape(self.url)
            except OSError:
                return  # the server has gone
            ages = found.by_label("course:oldest_waiting_request_age_seconds", "model_name")
            self.samples.append(
                QueueSample(
                    time.perf_counter() - start_s,
                    int(found.value("vllm:num_requests_running")),
                    int(found.value("vllm:num_requests_waiting")),
                    max(ages.values(), default=None),
                    found.value("vllm:kv_cache_usage_perc"),
                )
            )
            self._ended.wait(self.interval_s)
