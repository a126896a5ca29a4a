"""A real Prometheus as the source of a fleet's metrics.

    source = PrometheusMetrics(Prometheus("http://127.0.0.1:9090"), {"job": "merchant-chat"})
    source.read()["num_requests_waiting"]

`QUERIES` says what each metric is in PromQL, for vLLM and for our server; a ScaledObject holds the
same texts, by `promql`. Prometheus must scrape at least every 30 s: rates are those of a minute.
"""

import json
import math
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit

from course_lib.fleet.metrics import FleetMetrics, ReplicaMetrics
from course_lib.validation import known_name, number

# Gauges that every replica has, and how those of several replicas become one number.
_GAUGES = {
    "num_requests_waiting": ("sum", "vllm:num_requests_waiting"),
    "num_requests_running": ("sum", "vllm:num_requests_running"),
    "kv_cache_utilization": ("avg", "vllm:kv_cache_usage_perc"),
}


def _p95_ms(histogram: str) -> str:
    """Of the last minute; without observations the quantile is NaN, which `>= 0` drops."""
    return (
        "(1000 * histogram_quantile(0.95, "
        f"sum by (le) (rate({histogram}_bucket{{selector}}[1m]))) >= 0 "
        f"or 0 * sum(rate({histogram}_count{{selector}}[1m])))"
    )


def _mean(histogram: str) -> str:
    count = f"sum(rate({histogram}_count{{selector}}[1m]))"
    return f"(sum(rate({histogram}_sum{{selector}}[1m])) / ({count} > 0) or 0 * {count})"


#: The PromQL of the names in `METRICS`; `{selector}` is where labels go, by `promql`. Where no
#: replica reports, each gives an empty result. How they differ from the simulator's:
#:
#: - `num_requests_waiting` and `queue_age_s` know nothing of a gateway's queue.
#: - `queue_age_s` is empty for vLLM, which does not export it.
#: - `request_rate_per_s` has no counter of its own: those that ended, were refused or have come to
#:   be in the replicas within the last minute. One that is refused and comes again counts twice.
#: - the means of tokens are of the requests that finished within the last minute.
#: - `num_replicas_ready` counts those that answered the last scrape.
#:
#: `gpu_utilization` and `cpu_utilization` have no query. An inference server reports neither; DCGM
#: and the machine do, if they are scraped too, under labels of their own.
QUERIES = {
    **{name: f"{how}({series}{{selector}})" for name, (how, series) in _GAUGES.items()},
    "ttft_p95_ms": _p95_ms("vllm:time_to_first_token_seconds"),
    "tpot_p95_ms": _p95_ms("vllm:request_time_per_output_token_seconds"),
    "queue_age_s": "max(course:oldest_waiting_request_age_seconds{selector})",
    "request_rate_per_s": (
        "clamp_min(sum(rate(vllm:request_success_total{selector}[1m])) "
        "+ (sum(rate(vllm:admission_rejections_total{selector}[1m])) or vector(0)) "
        "+ (sum(delta(vllm:num_requests_waiting{selector}[1m])) "
        "+ sum(delta(vllm:num_requests_running{selector}[1m]))) / 60, 0)"
    ),
    "prompt_tokens_mean": _mean("vllm:request_prompt_tokens"),
    "output_tokens_mean": _mean("vllm:request_generation_tokens"),
    "num_replicas_ready": "count(count by (instance) (vllm:num_requests_running{selector}))",
}


def promql(metric: str, labels: Mapping[str, str] | None = None) -> str:
    """The query of a metric, as a ScaledObject holds it.

    Args:
        metric: of `QUERIES`, or several joined by `" + "`.
        labels: that the series must have, such as a job or a model_name.

    Raises:
        ValueError: there is no query for it.
    """
    names = [known_name("metric in PromQL", name, QUERIES) for name in metric.split(" + ")]
    return " + ".join(QUERIES[name].format(selector=selector_of(labels)) for name in names)


def selector_of(labels: Mapping[str, str] | None) -> str:
    """The labels as PromQL writes them behind a series' name; nothing if there are none."""
    if not labels:
        return ""
    # PromQL writes texts as Go does, and JSON's are a part of Go's.
    matchers = (f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in labels.items())
    return f"{{{','.join(matchers)}}}"


class PrometheusError(RuntimeError):
    """Prometheus gave no answer that can be used; the message says why."""


class Prometheus:
    """A Prometheus server, or what speaks its HTTP API.

    Args:
        url: such as http://127.0.0.1:9090.
        timeout_s: for each answer.

    Raises:
        ValueError: the URL is of another kind, or the time-out is not above 0.
    """

    def __init__(self, url: str, timeout_s: float = 5.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must be like http://127.0.0.1:9090, got {url!r}")
        self.url = url.rstrip("/")
        self.timeout_s = number("timeout_s", timeout_s, above=0)

    def query(self, query: str) -> float | None:
        """One number: a scalar, or a vector of one series; None for an empty result.

        Raises:
            PrometheusError: Prometheus does not answer, refuses the query or knows but a part of
                the answer, there are several series, or the number is NaN or infinite.
        """
        series = self._ask(query)
        if len(series) > 1:
            raise PrometheusError(
                f"{query} gives {len(series)} series, expected one; aggregate them, as by sum()"
            )
        return series[0][1] if series else None

    def query_by(self, query: str, label: str) -> dict[str, float]:
        """A number for each value of a label.

        Raises:
            PrometheusError: as for `query`, or the label does not tell the series apart.
        """
        series = self._ask(query)
        found = {labels.get(label): value for labels, value in series}
        if None in found or len(found) < len(series):
            raise PrometheusError(
                f"{query} does not give one series for each {label}; add by ({label})"
            )
        return {str(name): value for name, value in found.items()}

    def _ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        """The series of an instant query: labels and value."""
        url = f"{self.url}/api/v1/query?{urlencode({'query': query})}"
        try:
            with urllib.request.urlopen(url, timeout=self.timeout_s) as response:
                answer = json.load(response)
        except HTTPError as error:
            raise PrometheusError(f"{query}: {self.url} answers {_refusal(error)}") from error
        except (OSError, HTTPException, ValueError) as error:
            raise PrometheusError(f"{self.url} does not answer: {error}") from error
        try:
            data, warnings = answer["data"], answer.get("warnings", [])
            scalar = data["resultType"] == "scalar"
            rows = [({}, data["result"])] if scalar else [_row(row) for row in data["result"]]
            series = [(labels, float(value)) for labels, (_, value) in rows]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PrometheusError(
                f"{query}: expected a scalar or an instant vector from {self.url}, "
                f"got {str(answer)[:200]}"
            ) from error
        # What a federation says when one of its Prometheus is gone. Remarks on the query itself
        # begin with PromQL.
        partial = [warning for warning in warnings if not warning.startswith("PromQL")]
        if partial:
            raise PrometheusError(f"{query}: a part is missing, {'; '.join(partial)}")
        for labels, value in series:
            if not math.isfinite(value):
                raise PrometheusError(f"{query} is {value} {labels or ''}".rstrip())
        return series


def _row(row: dict[str, Any]) -> tuple[dict[str, str], list[Any]]:
    return row["metric"], row["value"]


def _refusal(error: HTTPError) -> str:
    """The status and, if Prometheus itself answered, what it says."""
    try:
        return f"{error.code}, {json.load(error)['error']}"
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"


class PrometheusMetrics:
    """A fleet's metrics, with those of each replica, as a Prometheus sees them.

    A replica is an `instance`, and is ready if it answered the last scrape. One that did not is
    known from `up`, so that the labels should be those of the targets, not of the server's series.

    Args:
        prometheus: where to ask.
        labels: of the fleet's targets, such as a job; none for all that this Prometheus scrapes.
        max_age_s: of the latest scrape. Prometheus itself goes back up to five minutes, and so
            tells after an outage of its own, until it has scraped, what was before.
    """

    def __init__(
        self,
        prometheus: Prometheus,
        labels: Mapping[str, str] | None = None,
        max_age_s: float = 60.0,
    ) -> None:
        self.prometheus = prometheus
        self.labels = dict(labels or {})
        self.max_age_s = number("max_age_s", max_age_s, above=0)

    def read(self) -> FleetMetrics:
        """The metrics now. A name whose query is empty is absent.

        Raises:
            PrometheusError: one of them could not be asked for, or they are too old.
        """
        scraped = f"max(timestamp(vllm:num_requests_running{selector_of(self.labels)}))"
        age_s = self.prometheus.query(f"time() - {scraped}")
        if age_s is not None and age_s > self.max_age_s:
            raise PrometheusError(f"the last scrape was {age_s:.0f} s ago")
        asked = {name: self.prometheus.query(promql(name, self.labels)) for name in QUERIES}
        values = {name: value for name, value in asked.items() if value is not None}
        return FleetMetrics(values, self._replicas())

    def _replicas(self) -> list[ReplicaMetrics]:
        selector = selector_of(self.labels)
        up = self._by_instance("max", f"up{selector}")
        gauges = {
            name: self._by_instance(how, f"{series}{selector}")
            for name, (how, series) in _GAUGES.items()
        }
        reporting = {instance for found in gauges.values() for instance in found}
        return [
            ReplicaMetrics(
                instance,
                instance in reporting,
                {name: found[instance] for name, found in gauges.items() if instance in found},
            )
            for instance in sorted(reporting | up.keys())
        ]

    def _by_instance(self, how: str, series: str) -> dict[str, float]:
        return self.prometheus.query_by(f"{how} by (instance) ({series})", "instance")
