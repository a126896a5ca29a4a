"""What one has to say to run the server on Kubernetes: a `DeploymentSpec`, or a small YAML file.

`course manifests` turns it into the manifests of `course_lib.fleet.manifests`. A specification
that a cluster would refuse, or that would lose requests, is refused here.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from course_lib.validation import known_name, number, whole_number

#: For each GPU of the catalogue the labels by which Karpenter finds machines with it on AWS. The
#: name alone does not tell an A100 of 40 GB from one of 80 GB; their memory (MiB) does.
KARPENTER_GPUS: Mapping[str, Mapping[str, str]] = {
    "L4_24GB": {"instance-gpu-name": "l4"},
    "A10G_24GB": {"instance-gpu-name": "a10g"},
    "L40S_48GB": {"instance-gpu-name": "l40s"},
    "A100_40GB": {"instance-gpu-name": "a100", "instance-gpu-memory": "40960"},
    "A100_80GB": {"instance-gpu-name": "a100", "instance-gpu-memory": "81920"},
    "H100_80GB": {"instance-gpu-name": "h100"},
    "H200_141GB": {"instance-gpu-name": "h200"},
}

# Between the decision to end a pod and its SIGTERM: the time for every proxy to hear of it.
PRE_STOP_S = 5

# After the drain: closing connections, stopping the engine, ending Python.
SHUTDOWN_S = 5

# Between two questions whether a replica has started.
STARTUP_PERIOD_S = 5

# Names get suffixes (`keda-hpa-...`, `...-dashboard`), and a label's value has at most 63.
_LONGEST_NAME = 50
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_TAG, _DIGEST = r":\w[\w.-]*", r"@sha256:[0-9a-f]{64}"
_IMAGE = re.compile(rf"[a-z0-9][^\s:@]*(:\d+/[^\s:@]+)?({_TAG}|({_TAG})?{_DIGEST})")
_QUANTITY = re.compile(r"(\d+(\.\d+)?)(m|[KMGT]i?)?")


@dataclass(frozen=True)
class DeploymentSpec:
    """One model on one kind of GPU, from a minimum to a maximum of replicas.

    Args:
        name: of all that is written.
        image: of the server, with a tag or a digest: what runs must not change by itself.
        model: directory of the checkpoint in the container.
        namespace: to put it into; it must be there.
        gpu: of the catalogue, one for each replica, as the server drives one. None: only CPUs.
        cpu: cores that a replica requests, such as "4".
        memory: that a replica requests, such as "16Gi".
        min_replicas: never fewer. At zero no replica reports metrics, so nothing would start one.
        max_replicas: never more.
        requests_per_replica: waiting and running requests that one replica is to have.
        max_num_seqs: requests that a replica runs at once.
        fallback_replicas: at least so many while the metrics are lost; the minimum if not given.
            More that run are kept in any case.
        ready_s: from a container's start until it is ready, at the slow end of what was measured.
        scale_down_window_s: how long fewer must have been enough before one is taken away.
        drain_s: for requests to finish in after SIGTERM.
        termination_grace_s: until Kubernetes kills a pod that was told to end.
        prometheus_release: Helm release of the Prometheus operator that shall scrape.
        prometheus: address of the server that KEDA asks.
        node_class: the EC2NodeClass of new machines.
        api_key_secret: a Secret whose `api-key` clients must show, if there is one.
        ttft_p95_ms: more than this for two minutes is an alert.
        queue_age_s: the same, for the oldest waiting request.
        kv_cache_utilization: the same, for the mean of the replicas, 0 to 1.

    Raises:
        ValueError: a value is not good, or two of them do not go together.
    """

    name: str
    image: str
    model: str = "/app/data/models/merchant-chat"
    namespace: str = "default"
    gpu: str | None = "L4_24GB"
    cpu: str = "2"
    memory: str = "8Gi"
    min_replicas: int = 2
    max_replicas: int = 10
    requests_per_replica: int = 24
    max_num_seqs: int = 64
    fallback_replicas: int | None = None
    ready_s: float = 180
    scale_down_window_s: int = 600
    drain_s: int = 60
    termination_grace_s: int = 90
    prometheus_release: str = "kube-prometheus-stack"
    prometheus: str = "http://prometheus-operated.monitoring.svc:9090"
    node_class: str = "default"
    api_key_secret: str | None = None
    ttft_p95_ms: float = 2000
    queue_age_s: float = 10
    kv_cache_utilization: float = 0.9

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        self._check_names()
        self._check_scaling()
        self._check_times()
        number("ttft_p95_ms", self.ttft_p95_ms, above=0)
        number("queue_age_s", self.queue_age_s, above=0)
        number("kv_cache_utilization", self.kv_cache_utilization, above=0, at_most=1)

    @property
    def labels(self) -> dict[str, str]:
        """What marks its objects and finds its pods."""
        return {"app.kubernetes.io/name": self.name}

    @property
    def metadata(self) -> dict[str, Any]:
        """Name, namespace and labels of its objects."""
        return {"name": self.name, "namespace": self.namespace, "labels": self.labels}

    @property
    def series_labels(self) -> dict[str, str]:
        """What its time series have in Prometheus, by its PodMonitor."""
        return {"namespace": self.namespace, "job": self.name}

    @property
    def startup_s(self) -> int:
        """How long a container may take to be ready before it is started anew."""
        return STARTUP_PERIOD_S * math.ceil(2 * self.ready_s / STARTUP_PERIOD_S)

    def _check_names(self) -> None:
        _kubernetes_name("name", self.name, _LONGEST_NAME)
        if not self.name[0].isalpha():
            raise ValueError(
                f"name must begin with a letter, as a Service's does; got {self.name!r}"
            )
        _kubernetes_name("namespace", self.namespace)
        _kubernetes_name("node_class", self.node_class)
        _kubernetes_name("prometheus_release", self.prometheus_release)
        if self.api_key_secret is not None:
            _kubernetes_name("api_key_secret", self.api_key_secret)
        _text("image", self.image, _IMAGE, "an image with its tag or digest, such as llm:1.2")
        _text("model", self.model, re.compile(r"/\S+"), "an absolute path in the container")
        _text("cpu", self.cpu, _QUANTITY, 'a quantity such as "4" or "500m"')
        _text("memory", self.memory, _QUANTITY, 'a quantity such as "16Gi"')
        _text("prometheus", self.prometheus, re.compile(r"https?://\S+"), "a URL")
        if self.gpu is not None:
            object.__setattr__(self, "gpu", known_name("gpu", self.gpu, KARPENTER_GPUS))

    def _check_scaling(self) -> None:
        whole_number("min_replicas", self.min_replicas)
        whole_number("max_replicas", self.max_replicas)
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                "min_replicas must be at most max_replicas, got "
                f"{self.min_replicas} and {self.max_replicas}"
            )
        whole_number("max_num_seqs", self.max_num_seqs)
        # Beyond it a full replica would count as one that has room.
        whole_number("requests_per_replica", self.requests_per_replica, at_most=self.max_num_seqs)
        if self.fallback_replicas is not None:
            whole_number(
                "fallback_replicas",
                self.fallback_replicas,
                at_least=self.min_replicas,
                at_most=self.max_replicas,
            )

    def _check_times(self) -> None:
        number("ready_s", self.ready_s, above=0)
        whole_number("scale_down_window_s", self.scale_down_window_s, at_most=3600)
        if self.scale_down_window_s < self.ready_s:
            raise ValueError(
                f"scale_down_window_s must be at least ready_s, {self.ready_s:g}: a replica that "
                f"is taken away is not back sooner; got {self.scale_down_window_s}"
            )
        whole_number("drain_s", self.drain_s)
        whole_number("termination_grace_s", self.termination_grace_s)
        needed_s = PRE_STOP_S + self.drain_s + SHUTDOWN_S
        if self.termination_grace_s < needed_s:
            raise ValueError(
                f"termination_grace_s must be at least {needed_s}: {PRE_STOP_S} s before SIGTERM, "
                f"drain_s {self.drain_s}, {SHUTDOWN_S} s to end; got {self.termination_grace_s}"
            )


def read_spec(path: Path) -> DeploymentSpec:
    """The specification that a YAML file holds, by the names of `DeploymentSpec`.

    Raises:
        ValueError: the file is no mapping, a name is unknown or missing, or a value is not good.
        OSError: it cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold names and values, such as `name: llm`")
    known = {field.name: field for field in fields(DeploymentSpec)}
    for name in content:
        if name not in known:
            raise ValueError(f"{path} has {name!r}; known are {', '.join(known)}")
    for name, field in known.items():
        if field.default is MISSING and name not in content:
            raise ValueError(f"{path} lacks {name!r}")
    try:
        return DeploymentSpec(**content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _kubernetes_name(field: str, value: Any, longest: int = 63) -> None:
    if not isinstance(value, str) or len(value) > longest or not _NAME.fullmatch(value):
        raise ValueError(
            f"{field} must be a Kubernetes name: at most {longest} lower-case letters, digits and "
            f"hyphens, no hyphen first or last; got {value!r}"
        )


def _text(field: str, value: Any, pattern: re.Pattern[str], wanted: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{field} must be {wanted}, got {value!r}")
