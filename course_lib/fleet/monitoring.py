"""What watches the server on Kubernetes: its scraping, its alerts and its dashboard.

All ask for the same series as the ScaledObject does. The Prometheus operator reads PodMonitor and
PrometheusRule, Grafana's sidecar the ConfigMap.
"""

import json
from typing import Any

from course_lib.fleet.manifest_base import Manifest
from course_lib.fleet.manifest_spec import DeploymentSpec
from course_lib.fleet.prometheus import promql, selector_of


def pod_monitor(spec: DeploymentSpec) -> Manifest:
    """Which pods Prometheus scrapes."""
    body = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": _picked_up(spec),
        "spec": {
            "selector": {"matchLabels": spec.labels},
            "jobLabel": "app.kubernetes.io/name",
            "podMetricsEndpoints": [{"port": "http", "path": "/metrics", "interval": "10s"}],
        },
    }
    return Manifest(
        "podmonitor.yaml",
        body,
        {
            "metadata.labels.release": "the Prometheus of that Helm release takes what has it.",
            "spec.jobLabel": "the series get the job that the queries ask for.",
            "spec.podMetricsEndpoints": "every 10 s: rates over a minute need several scrapes, "
            "and the autoscaler sees nothing sooner.",
        },
    )


def prometheus_rule(spec: DeploymentSpec) -> Manifest:
    """The alerts: objectives that are missed, and metrics that are lost."""
    up = f"up{selector_of(spec.series_labels)}"

    def alert(name: str, query: str, lasting: str, summary: str) -> dict[str, Any]:
        severity = "critical" if name == "MetricsLost" else "warning"
        return {
            "alert": name,
            "expr": query,
            "for": lasting,
            # Aggregates have no labels of their own, by which to send them to somebody.
            "labels": {"severity": severity, **spec.series_labels},
            "annotations": {"summary": f"{spec.name}: {summary}"},
        }

    def above(metric: str, limit: float) -> str:
        return f"{promql(metric, spec.series_labels)} > {limit:g}"

    rules = [
        alert(
            "TimeToFirstTokenHigh",
            above("ttft_p95_ms", spec.ttft_p95_ms),
            "2m",
            f'TTFT p95 is {{{{ printf "%.0f" $value }}}} ms, above {spec.ttft_p95_ms:g} ms',
        ),
        alert(
            "QueueTooOld",
            above("queue_age_s", spec.queue_age_s),
            "2m",
            f'a request has waited {{{{ printf "%.0f" $value }}}} s, above {spec.queue_age_s:g} s',
        ),
        alert(
            "KVCacheFull",
            above("kv_cache_utilization", spec.kv_cache_utilization),
            "2m",
            "the KV cache is {{ $value | humanizePercentage }} full on average; preemptions are "
            "near",
        ),
        alert(
            "MetricsLost",
            f"absent({up} == 1)",
            "1m",
            "no replica is scraped; the autoscaler is blind and keeps what runs",
        ),
        alert(
            "ReplicaNotScraped",
            f"{up} == 0",
            f"{spec.startup_s + 60}s",
            "{{ $labels.instance }} does not answer; the autoscaler does not see its requests",
        ),
    ]
    body = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": _picked_up(spec),
        "spec": {"groups": [{"name": spec.name, "rules": rules}]},
    }
    return Manifest(
        "prometheusrule.yaml",
        body,
        {
            "spec.groups.rules.for": f"MetricsLost is quick, as from then on nothing scales. "
            f"ReplicaNotScraped waits {spec.startup_s} s and a minute: a replica that loads does "
            "not answer yet.",
        },
    )


def _picked_up(spec: DeploymentSpec) -> dict[str, Any]:
    common = spec.metadata
    return {**common, "labels": {**common["labels"], "release": spec.prometheus_release}}


def dashboard(spec: DeploymentSpec) -> Manifest:
    """Grafana's picture of the fleet."""
    panels = [
        {
            "id": index + 1,
            "type": "timeseries",
            "title": title,
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "gridPos": {"x": 12 * (index % 2), "y": 8 * (index // 2), "w": 12, "h": 8},
            "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
            "targets": [
                {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend}
                for i, (legend, query) in enumerate(queries.items())
            ],
        }
        for index, (title, unit, queries) in enumerate(_panels(spec))
    ]
    picture = {
        "title": f"{spec.namespace}/{spec.name}",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
        },
        "panels": panels,
    }
    common = spec.metadata
    body = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            **common,
            "name": f"{spec.name}-dashboard",
            "labels": {**common["labels"], "grafana_dashboard": "1"},
        },
        "data": {f"{spec.name}.json": json.dumps(picture, indent=2) + "\n"},
    }
    return Manifest(
        "dashboard.yaml",
        body,
        {"metadata.labels.grafana_dashboard": "Grafana's sidecar loads what has this label."},
    )


def _panels(spec: DeploymentSpec) -> list[tuple[str, str, dict[str, str]]]:
    """Title, Grafana's unit, and a query for each legend."""
    series = spec.series_labels
    s = selector_of(series)

    def quantiles(histogram: str) -> dict[str, str]:
        buckets = f"sum by (le) (rate(vllm:{histogram}_bucket{s}[1m]))"
        return {f"p{q}": f"histogram_quantile(0.{q}, {buckets})" for q in (50, 95, 99)}

    return [
        (
            "Requests",
            "short",
            {
                "waiting": promql("num_requests_waiting", series),
                "running": promql("num_requests_running", series),
                "target": f"{spec.requests_per_replica} * {promql('num_replicas_ready', series)}",
            },
        ),
        (
            "Replicas",
            "short",
            {
                "answering": promql("num_replicas_ready", series),
                "all": f"count(up{s})",
            },
        ),
        ("Oldest waiting request", "s", {"age": promql("queue_age_s", series)}),
        (
            "KV cache in use",
            "percentunit",
            {"{{pod}}": f"vllm:kv_cache_usage_perc{s}"},
        ),
        ("Time to first token", "s", quantiles("time_to_first_token_seconds")),
        ("Time per output token", "s", quantiles("request_time_per_output_token_seconds")),
        (
            "Tokens a second",
            "short",
            {
                "prompt": f"sum(rate(vllm:prompt_tokens_total{s}[1m]))",
                "generated": f"sum(rate(vllm:generation_tokens_total{s}[1m]))",
            },
        ),
        (
            "Requests a second that ended or were refused",
            "reqps",
            {
                "{{finished_reason}}": (
                    f"sum by (finished_reason) (rate(vllm:request_success_total{s}[1m]))"
                ),
                "refused: {{reason}}": (
                    f"sum by (reason) (rate(vllm:admission_rejections_total{s}[1m]))"
                ),
            },
        ),
        (
            "Prompt tokens found in the prefix cache",
            "percentunit",
            {
                "share": f"sum(rate(vllm:prefix_cache_hits_total{s}[5m])) / "
                f"sum(rate(vllm:prefix_cache_queries_total{s}[5m]))"
            },
        ),
        (
            "Preemptions a minute",
            "short",
            {"{{pod}}": f"60 * rate(vllm:num_preemptions_total{s}[5m])"},
        ),
    ]
