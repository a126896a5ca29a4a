"""Kubernetes manifests for the server, from one `DeploymentSpec`.

    write_manifests(read_spec(Path("llm.yaml")), Path("k8s"))  # then: kubectl apply -f k8s

KEDA scales the pods by the same PromQL that the fleet's own autoscalers read, Karpenter brings the
machines. What watches them is in `monitoring`. Each file begins with why its unusual values are so.
"""

import math
from pathlib import Path
from typing import Any

from course_lib.fleet.manifest_base import Manifest
from course_lib.fleet.manifest_spec import (
    KARPENTER_GPUS,
    PRE_STOP_S,
    SHUTDOWN_S,
    STARTUP_PERIOD_S,
    DeploymentSpec,
)
from course_lib.fleet.monitoring import dashboard, pod_monitor, prometheus_rule
from course_lib.fleet.prometheus import promql

#: What a replica is scaled by. Waiting alone asks for the minimum while all are full.
LOAD = "num_requests_waiting + num_requests_running"

# Pods that a rolling update has beyond those that serve.
MAX_SURGE = 1

# GPUs of the largest machine. Karpenter's limit counts whole machines.
GPUS_OF_A_MACHINE = 8


def manifests(spec: DeploymentSpec) -> list[Manifest]:
    """All that a cluster with KEDA, Karpenter and the Prometheus operator needs."""
    serving = [deployment(spec), service(spec), disruption_budget(spec), scaled_object(spec)]
    machines = [] if spec.gpu is None else [node_pool(spec)]
    return [*serving, *machines, pod_monitor(spec), prometheus_rule(spec), dashboard(spec)]


def write_manifests(spec: DeploymentSpec, out: Path) -> list[Path]:
    """Write each to a file of its own; those that are there are replaced.

    Raises:
        OSError: they cannot be written.
    """
    texts = {out / manifest.file_name: manifest.text() for manifest in manifests(spec)}
    out.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)


def deployment(spec: DeploymentSpec) -> Manifest:
    """The replicas."""
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": spec.termination_grace_s,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(spec)],
    }
    if spec.gpu is not None:
        pod["nodeSelector"] = {"karpenter.sh/nodepool": spec.name}
        pod["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    body = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": spec.metadata,
        "spec": {
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxUnavailable": 0, "maxSurge": MAX_SURGE},
            },
            "progressDeadlineSeconds": 2 * spec.startup_s + 600,
            "selector": {"matchLabels": spec.labels},
            "template": {"metadata": {"labels": spec.labels}, "spec": pod},
        },
    }
    return Manifest(
        "deployment.yaml",
        body,
        {
            "spec.replicas": "absent, as KEDA owns it: applying this file again must not undo "
            "what it decided.",
            "spec.strategy.rollingUpdate.maxUnavailable": "an update starts a new replica and "
            "takes an old one away when the new one is ready. It needs one GPU more meanwhile.",
            "spec.progressDeadlineSeconds": "a replica may need a new machine first, 600 s here, "
            "and twice its time to start.",
            "spec.template.spec.terminationGracePeriodSeconds": f"at least {PRE_STOP_S} s before "
            f"SIGTERM, the drain of {spec.drain_s} s and {SHUTDOWN_S} s to end. What comes after "
            "is SIGKILL, and lost requests.",
            "spec.template.spec.containers.startupProbe": f"{spec.startup_s} s, twice what a "
            "start takes at its slow end. Only then do the other probes begin, so that nothing "
            "ends a replica that is loading. It asks /ready: one whose warm-up fails is started "
            "anew.",
            "spec.template.spec.containers.livenessProbe": "slow to judge, as to end a busy "
            "replica is to lose its requests. While it drains, /health is good and /ready is not.",
            "spec.template.spec.containers.lifecycle.preStop": "proxies still send requests here "
            "until they have heard that the pod goes; it serves them as before.",
            "spec.template.spec.containers.resources": "no limit of CPU: throttled, the thread "
            "that feeds the GPU lets it idle.",
        },
    )


def _container(spec: DeploymentSpec) -> dict[str, Any]:
    limits: dict[str, Any] = {"memory": spec.memory}
    if spec.gpu is not None:
        limits["nvidia.com/gpu"] = 1
    container: dict[str, Any] = {
        "name": "server",
        "image": spec.image,
        "args": [
            "serve",
            f"--model={spec.model}",
            "--host=0.0.0.0",
            "--port=8000",
            f"--max-num-seqs={spec.max_num_seqs}",
            f"--drain={spec.drain_s}",
        ],
        "ports": [{"name": "http", "containerPort": 8000}],
        "startupProbe": _probe(
            "/ready", STARTUP_PERIOD_S, timeout_s=5, failures=spec.startup_s // STARTUP_PERIOD_S
        ),
        "readinessProbe": _probe("/ready", period_s=5, timeout_s=5, failures=2),
        "livenessProbe": _probe("/health", period_s=15, timeout_s=10, failures=4),
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_S}}},
        "resources": {"requests": {"cpu": spec.cpu, "memory": spec.memory}, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    if spec.api_key_secret is not None:
        key = {"name": spec.api_key_secret, "key": "api-key"}
        container["env"] = [{"name": "COURSE_API_KEY", "valueFrom": {"secretKeyRef": key}}]
    return container


def _probe(path: str, period_s: int, timeout_s: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": "http"},
        "periodSeconds": period_s,
        "timeoutSeconds": timeout_s,
        "failureThreshold": failures,
    }


def service(spec: DeploymentSpec) -> Manifest:
    """The address inside the cluster."""
    body = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": spec.metadata,
        "spec": {
            "selector": spec.labels,
            "ports": [{"name": "http", "port": 8000, "targetPort": "http"}],
        },
    }
    return Manifest(
        "service.yaml",
        body,
        {
            "spec.ports": "connections, not requests, are spread over the pods. A client that "
            "keeps one alive stays with one replica; a gateway spreads better.",
        },
    )


def disruption_budget(spec: DeploymentSpec) -> Manifest:
    """How many replicas an eviction may take at once."""
    body = {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": spec.metadata,
        "spec": {
            "maxUnavailable": min(1, spec.min_replicas - 1),
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": spec.labels},
        },
    }
    return Manifest(
        "poddisruptionbudget.yaml",
        body,
        {
            "spec.maxUnavailable": "one at a time, as the next one is warm only after a cold "
            "start; none where one replica is all there may be: scale up before you drain its "
            "node.",
            "spec.unhealthyPodEvictionPolicy": "a replica that does not work must not keep its "
            "machine from being drained.",
        },
    )


def scaled_object(spec: DeploymentSpec) -> Manifest:
    """KEDA's rule, which is `Keda.from_scaled_object` in the simulator."""
    body = {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": spec.metadata,
        "spec": {
            "scaleTargetRef": {"name": spec.name},
            "minReplicaCount": spec.min_replicas,
            "maxReplicaCount": spec.max_replicas,
            "pollingInterval": 15,
            "fallback": {
                "failureThreshold": 3,
                "replicas": spec.fallback_replicas or spec.min_replicas,
                "behavior": "currentReplicasIfHigher",
            },
            "advanced": {
                "horizontalPodAutoscalerConfig": {
                    "behavior": {
                        "scaleUp": {"stabilizationWindowSeconds": 0},
                        "scaleDown": {
                            "stabilizationWindowSeconds": spec.scale_down_window_s,
                            "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
                        },
                    }
                }
            },
            "triggers": [
                {
                    "type": "prometheus",
                    "metricType": "AverageValue",
                    "metadata": {
                        "serverAddress": spec.prometheus,
                        "query": promql(LOAD, spec.series_labels),
                        "threshold": str(spec.requests_per_replica),
                        "ignoreNullValues": "false",
                    },
                }
            ],
        },
    }
    return Manifest(
        "scaledobject.yaml",
        body,
        {
            "spec.minReplicaCount": "never 0: without a replica there are no series, so nothing "
            "would start one.",
            "spec.fallback": "without metrics for 3 polls what runs is kept, and at least "
            "`replicas`; the default behavior would scale down to that number.",
            "spec.advanced.horizontalPodAutoscalerConfig.behavior.scaleUp": "a queue does not "
            "wait: no window.",
            "spec.advanced.horizontalPodAutoscalerConfig.behavior.scaleDown": "a warm replica "
            f"goes after {spec.scale_down_window_s} s without need of it, longer than the "
            f"{spec.ready_s:g} s in which it would come back, and one at a time.",
            "spec.triggers.metricType": "the total over the target. Replicas that still load do "
            "not make the answer larger, and the fallback needs this type.",
            "spec.triggers.metadata.query": "waiting and running. By waiting alone a fleet in "
            "which all are busy and nobody waits would shrink.",
            "spec.triggers.metadata.ignoreNullValues": "KEDA's default takes an empty result for "
            "0: when the metrics are lost it would scale down, and no fallback would start.",
        },
    )


def node_pool(spec: DeploymentSpec) -> Manifest:
    """Karpenter's machines with that GPU, on AWS."""
    assert spec.gpu is not None
    kinds = {f"karpenter.k8s.aws/{name}": v for name, v in KARPENTER_GPUS[spec.gpu].items()}
    kinds["karpenter.sh/capacity-type"] = "on-demand"
    gpus = GPUS_OF_A_MACHINE * math.ceil((spec.max_replicas + MAX_SURGE) / GPUS_OF_A_MACHINE)
    body = {
        "apiVersion": "karpenter.sh/v1",
        "kind": "NodePool",
        "metadata": {"name": spec.name, "labels": spec.labels},
        "spec": {
            "template": {
                "spec": {
                    "nodeClassRef": {
                        "group": "karpenter.k8s.aws",
                        "kind": "EC2NodeClass",
                        "name": spec.node_class,
                    },
                    "requirements": [
                        {"key": key, "operator": "In", "values": [value]}
                        for key, value in kinds.items()
                    ],
                    "taints": [{"key": "nvidia.com/gpu", "value": "true", "effect": "NoSchedule"}],
                    "expireAfter": "Never",
                }
            },
            "disruption": {
                "consolidationPolicy": "WhenEmpty",
                "consolidateAfter": f"{spec.scale_down_window_s}s",
                "budgets": [{"nodes": "1"}],
            },
            "limits": {"nvidia.com/gpu": gpus},
        },
    }
    return Manifest(
        "nodepool.yaml",
        body,
        {
            "spec.template.spec.requirements": "machines on demand: spot ones are taken away with "
            "two minutes' warning, which is a plan of its own.",
            "spec.template.spec.taints": "keeps pods without a GPU off; one of them would keep an "
            "idle machine from being empty.",
            "spec.template.spec.expireAfter": "by default 720h, after which a machine is drained "
            "whether or not another is warm. Drift, when the image changes, replaces first.",
            "spec.disruption.consolidationPolicy": "by default WhenEmptyOrUnderutilized, which "
            "moves a pod to save a machine: a cold start for every replica that it moves.",
            "spec.disruption.consolidateAfter": "by default 0s. As long as the window of scaling "
            "down, an empty machine waits for the next replica; its image is there already.",
            "spec.disruption.budgets": "by default 10 % of the machines at once. One, so that at "
            "most one machine's replicas are cold.",
            "spec.limits": f"for {spec.max_replicas} replicas and {MAX_SURGE} of an update, "
            f"rounded up to machines of {GPUS_OF_A_MACHINE} GPUs. What goes wrong costs no more.",
        },
    )
