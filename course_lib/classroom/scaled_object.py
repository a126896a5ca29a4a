"""The course's own answer to A4.4. All manifests of a cluster are in `course_lib.fleet`."""

import yaml


def scaled_object(
    name: str,
    prometheus: str,
    waiting: str,
    running: str,
    target: int,
    min_replicas: int,
    max_replicas: int,
    fallback_replicas: int,
    window_s: int,
) -> str:
    """A ScaledObject for a Deployment, as YAML.

    Args:
        name: of the Deployment, and of this.
        prometheus: where KEDA asks.
        waiting: the query of the requests that wait.
        running: that of those that run.
        target: requests for each replica.
        min_replicas: never fewer.
        max_replicas: never more.
        fallback_replicas: at least so many while the metrics are lost.
        window_s: what was needed counts so long before the fleet gets smaller.
    """
    trigger = {
        "type": "prometheus",
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": prometheus,
            "query": f"{waiting} + {running}",
            "threshold": str(target),
            "ignoreNullValues": "false",
        },
    }
    behavior = {"scaleDown": {"stabilizationWindowSeconds": window_s}}
    body = {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": name},
        "spec": {
            "scaleTargetRef": {"name": name},
            "minReplicaCount": min_replicas,
            "maxReplicaCount": max_replicas,
            "fallback": {
                "failureThreshold": 3,
                "replicas": fallback_replicas,
                "behavior": "currentReplicasIfHigher",
            },
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior}},
            "triggers": [trigger],
        },
    }
    return yaml.safe_dump(body, sort_keys=False)
