"""Manifests are valid, fit each other and the server, and scale as intended."""

import copy
import math
import re

import kubernetes_validate
import pytest
import typer
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from course_lib.classroom.crd import crd_errors, find_crd
from course_lib.cli import app
from course_lib.data import DATA_DIR
from course_lib.fleet.cold_start import ColdStart, Duration
from course_lib.fleet.keda import Keda
from course_lib.fleet.manifest_spec import KARPENTER_GPUS, DeploymentSpec, read_spec
from course_lib.fleet.manifests import LOAD, manifests, scaled_object, write_manifests
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec, ReplicaSpec
from course_lib.fleet.step_time import FittedStepTime
from course_lib.serving.guard import Guard
from course_lib.sizing.catalog import gpus
from course_lib.traces.generators import morning_spike
from tests.fleet.controllers import RUNNING, WAITING, Clock, replicas_of

BUILT_IN = {"Deployment", "Service", "PodDisruptionBudget", "ConfigMap"}
CRDS = {
    "ScaledObject": "keda.sh_scaledobjects.yaml",
    "NodePool": "karpenter.sh_nodepools.yaml",
}
GOOD = {"name": "llm", "image": "registry.example:5000/team/llm:1.2"}
SPEC = DeploymentSpec(**GOOD)
SPECS = {
    "as a rule": SPEC,
    "the least": DeploymentSpec(**GOOD, min_replicas=1, max_replicas=1),
    "CPUs only": DeploymentSpec(**GOOD, gpu=None, cpu="500m", memory="1.5Gi"),
    "with a key, by digest": DeploymentSpec(
        "llm", f"llm:1@sha256:{64 * 'a'}", namespace="1st", api_key_secret="key", gpu="A100_80GB"
    ),
    "slow and large": DeploymentSpec(
        "l" + 49 * "x", "llm:1", max_replicas=100, fallback_replicas=50, ready_s=903.5,
        scale_down_window_s=3600, drain_s=600, termination_grace_s=700,
    ),
}  # fmt: skip
runner = CliRunner()


def objects(spec: DeploymentSpec) -> dict[str, dict]:
    """What a cluster reads from the files, by kind."""
    read = [yaml.safe_load(manifest.text()) for manifest in manifests(spec)]
    return {body["kind"]: body for body in read}


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request):
    return request.param


def at(body, path):
    """All values at a path such as "spec.rules.for"; lists are walked through."""
    found = [body]
    for name in re.findall(r"(?:^|\.)([^.]+)", path):
        found = [
            part[name]
            for value in found
            for part in (value if isinstance(value, list) else [value])
            if name in part
        ]
    return found


def changed(body, path, value):
    """A copy in which the first value at a path is another one."""
    body = copy.deepcopy(body)
    *parents, name = path.split(".")
    holder = at(body, ".".join(parents))[0]
    (holder[0] if isinstance(holder, list) else holder)[name] = value
    return body


# Against the schemas.


def check_built_in(body):
    # Before 1.30 there is no preStop.sleep.
    for version in ("1.30", "1.37"):
        kubernetes_validate.validate(body, version, strict=True)


def check_custom(body):
    """Against the CRD; a field that it does not know is refused, as kubectl would."""
    file_name = CRDS[body["kind"]]
    crd = find_crd(file_name)
    if crd is None:
        pytest.skip(f"the schema ../shared/data/schemas/{file_name} is not there")
    assert crd_errors(body, crd) == []


def test_built_in_kinds_are_valid(spec):
    found = objects(spec)
    assert set(found) >= BUILT_IN
    for kind in BUILT_IN:
        check_built_in(found[kind])


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", "spec.strategy.rollingUpdate.maxSurge", [1]),
        ("Deployment", "spec.replica", 3),
        ("Deployment", "spec.template.spec.containers.startupProbe.failureThreshold", "72"),
        ("Deployment", "spec.template.spec.containers.lifecycle.preStop", {"nap": {"seconds": 5}}),
        ("Service", "spec.ports.port", "http"),
        ("PodDisruptionBudget", "spec.maxUnavailable", 0.5),
        ("ConfigMap", "data", {"llm.json": {"title": "llm"}}),
    ],
)
def test_a_built_in_kind_with_a_mistake_is_not_valid(kind, path, value):
    with pytest.raises(kubernetes_validate.ValidationError):
        check_built_in(changed(objects(SPEC)[kind], path, value))


def test_custom_kinds_fit_their_definitions(spec):
    found = objects(spec)
    check_custom(found["ScaledObject"])
    if spec.gpu is None:
        assert "NodePool" not in found
    else:
        check_custom(found["NodePool"])


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("ScaledObject", "apiVersion", "keda.sh/v1"),
        ("ScaledObject", "spec.pollInterval", 15),
        ("ScaledObject", "spec.minReplicaCount", -1),
        ("ScaledObject", "spec.fallback.behavior", "keep"),
        ("ScaledObject", "spec.triggers.metadata.threshold", 24),
        ("ScaledObject", "spec.scaleTargetRef", {}),
        ("NodePool", "spec.disruption.consolidateAfter", "10 minutes"),
        ("NodePool", "spec.disruption.consolidationPolicy", "Never"),
        ("NodePool", "spec.disruption.budgets.nodes", 1),
        ("NodePool", "spec.template.spec.expireAfter", "30d"),
        ("NodePool", "spec.expireAfter", "Never"),
        ("NodePool", "spec.template.spec.requirements.operator", "Is"),
    ],
)
def test_a_custom_kind_with_a_mistake_does_not_fit(kind, path, value):
    with pytest.raises(AssertionError):
        check_custom(changed(objects(SPEC)[kind], path, value))


# How they fit each other, the server and the machines.


def test_every_reference_finds_its_object(spec):
    found = objects(spec)
    pod = found["Deployment"]["spec"]["template"]
    for selector in (
        found["Deployment"]["spec"]["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        found["PodMonitor"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    assert found["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == spec.name
    assert found["Deployment"]["metadata"]["name"] == spec.name
    ports = {port["name"] for port in container["ports"]}
    assert {at(container, f"{probe}.httpGet.port")[0] for probe in PROBES} == ports
    assert at(found["Service"], "spec.ports.targetPort") == [*ports]
    assert at(found["PodMonitor"], "spec.podMetricsEndpoints.port") == [*ports]
    job = pod["metadata"]["labels"][found["PodMonitor"]["spec"]["jobLabel"]]
    query = at(found["ScaledObject"], "spec.triggers.metadata.query")[0]
    assert set(re.findall(r'job="([^"]*)"', query)) == {job}
    assert set(re.findall(r'namespace="([^"]*)"', query)) == {spec.namespace}


PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def test_the_server_takes_its_arguments_and_answers_its_probes_without_a_key(spec):
    (container,) = objects(spec)["Deployment"]["spec"]["template"]["spec"]["containers"]
    command, *arguments = container["args"]
    serve = typer.main.get_command(app).commands[command]
    options = serve.make_context(command, arguments).params
    assert options["host"] == "0.0.0.0"
    assert options["port"] == container["ports"][0]["containerPort"]
    assert options["drain"] == spec.drain_s
    assert options["max_num_seqs"] == spec.max_num_seqs
    assert {at(container, f"{probe}.httpGet.path")[0] for probe in PROBES} <= Guard.OPEN
    assert at(objects(spec)["PodMonitor"], "spec.podMetricsEndpoints.path")[0] in Guard.OPEN


def test_no_request_is_lost_when_a_pod_ends_or_is_replaced(spec):
    deployment = objects(spec)["Deployment"]["spec"]
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    pod = deployment["template"]["spec"]
    pre_stop_s = at(pod, "containers.lifecycle.preStop.sleep.seconds")[0]
    # A second after the drain the server closes what is still open.
    assert pod["terminationGracePeriodSeconds"] > pre_stop_s + spec.drain_s + 1
    probe = at(pod, "containers.startupProbe")[0]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 2 * spec.ready_s
    assert deployment["progressDeadlineSeconds"] > spec.startup_s
    assert "replicas" not in deployment


def test_evictions_leave_a_replica(spec):
    allowed = objects(spec)["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    assert allowed == (1 if spec.min_replicas > 1 else 0)


def test_warm_machines_stay_and_there_is_room_for_all(spec):
    if spec.gpu is None:
        assert "nvidia.com/gpu" not in str(objects(spec))
        return
    found = objects(spec)
    pool, pod = found["NodePool"]["spec"], found["Deployment"]["spec"]["template"]["spec"]
    assert pool["disruption"]["consolidationPolicy"] == "WhenEmpty"
    seconds = int(pool["disruption"]["consolidateAfter"].removesuffix("s"))
    assert seconds >= spec.ready_s
    assert pool["template"]["spec"]["expireAfter"] == "Never"
    assert at(pod, "containers.resources.limits")[0]["nvidia.com/gpu"] == 1
    surge = at(found["Deployment"], "spec.strategy.rollingUpdate.maxSurge")[0]
    assert pool["limits"]["nvidia.com/gpu"] >= spec.max_replicas + surge
    assert pod["nodeSelector"] == {"karpenter.sh/nodepool": found["NodePool"]["metadata"]["name"]}
    (taint,), (toleration,) = pool["template"]["spec"]["taints"], pod["tolerations"]
    assert (taint["key"], taint["effect"]) == (toleration["key"], toleration["effect"])


def test_every_gpu_of_the_catalogue_can_be_asked_for():
    assert set(KARPENTER_GPUS) == set(gpus())


def test_every_reason_is_of_a_field_that_is_there(spec):
    for manifest in manifests(spec):
        assert manifest.why, manifest.file_name
        for path, reason in manifest.why.items():
            present = at(manifest.body, path) != []
            assert present != reason.startswith("absent"), f"{manifest.file_name}: {path}"


# How the ScaledObject scales.


def simulated(body):
    """KEDA, made of what was written, and its clock."""
    clock = Clock()
    (trigger,) = body["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    return Keda.from_scaled_object(body["spec"], {query: LOAD}, clock), clock


def load(waiting, running):
    return {WAITING: waiting, RUNNING: running}


@st.composite
def specs(draw):
    low = draw(st.integers(1, 5))
    high = draw(st.integers(low, 40))
    ready_s = draw(st.integers(1, 900))
    return DeploymentSpec(
        **GOOD,
        min_replicas=low,
        max_replicas=high,
        fallback_replicas=draw(st.none() | st.integers(low, high)),
        requests_per_replica=draw(st.integers(1, 64)),
        ready_s=ready_s,
        scale_down_window_s=draw(st.integers(ready_s, 3600)),
    )


def scaled(spec):
    return yaml.safe_load(scaled_object(spec).text())


def check_lost_metrics_take_nobody_away(body, spec):
    keda, clock = simulated(body)
    overload = load(0, 2 * spec.requests_per_replica * spec.max_replicas)
    before = replicas_of(keda, clock, spec.min_replicas, [overload] * 12)[-1]
    assert before == spec.max_replicas
    assert replicas_of(keda, clock, before, [{}] * 300) == [before] * 300


def check_a_busy_fleet_in_which_nobody_waits_stays(body, spec):
    keda, clock = simulated(body)
    busy = load(0, spec.requests_per_replica * spec.max_replicas)
    assert set(replicas_of(keda, clock, spec.max_replicas, [busy] * 300)) == {spec.max_replicas}


def check_a_quiet_fleet_shrinks_late_and_slowly(body, spec):
    keda, clock = simulated(body)
    syncs = 300 + 5 * spec.max_replicas
    counts = replicas_of(keda, clock, spec.max_replicas, [load(0, 0)] * syncs)
    stays = -(-spec.scale_down_window_s // 15)
    assert counts[:stays] == [spec.max_replicas] * stays
    for earlier, later in zip(counts, counts[4:], strict=False):  # 60 s
        assert later >= earlier - 1
    assert counts[-1] == spec.min_replicas


CHECKS = (
    check_lost_metrics_take_nobody_away,
    check_a_busy_fleet_in_which_nobody_waits_stays,
    check_a_quiet_fleet_shrinks_late_and_slowly,
)


@settings(max_examples=30)  # hours of syncs each
@given(specs())
def test_it_decides_as_intended(spec):
    for check in CHECKS:
        check(scaled(spec), spec)


@pytest.mark.parametrize(
    ("path", "value", "check"),
    [
        ("spec.triggers.metadata.ignoreNullValues", "true", CHECKS[0]),
        ("spec.fallback.behavior", "static", CHECKS[0]),
        ("spec.triggers.metadata.threshold", "200", CHECKS[1]),
        ("spec.minReplicaCount", 0, CHECKS[2]),
        (
            "spec.advanced.horizontalPodAutoscalerConfig.behavior.scaleDown",
            {"stabilizationWindowSeconds": 0},
            CHECKS[2],
        ),
        (
            "spec.advanced.horizontalPodAutoscalerConfig.behavior.scaleDown",
            {"stabilizationWindowSeconds": 600},
            CHECKS[2],
        ),
    ],
)
def test_a_scaled_object_with_a_mistake_does_not(path, value, check):
    check(scaled(SPEC), SPEC)
    with pytest.raises(AssertionError):
        check(changed(scaled(SPEC), path, value), SPEC)


@given(specs(), st.lists(st.none() | st.integers(0, 5000), min_size=1, max_size=60))
def test_it_never_leaves_its_limits_and_never_shrinks_blindly(spec, loads):
    keda, clock = simulated(scaled(spec))
    current = spec.min_replicas
    for running in loads:
        metrics = {} if running is None else load(0, running)
        (replicas,) = replicas_of(keda, clock, current, [metrics])
        assert spec.min_replicas <= replicas <= spec.max_replicas
        assert running is not None or replicas >= current
        current = replicas


def assert_as_many(found, needed):
    """Rounded up, but the HPA is content with a tenth less."""
    assert needed / 1.1 <= found <= math.ceil(needed)


@given(specs(), st.integers(0, 5000))
def test_a_steady_load_gets_as_many_replicas_as_it_needs(spec, running):
    keda, clock = simulated(scaled(spec))
    counts = replicas_of(keda, clock, spec.min_replicas, [load(0, running)] * 12)
    needed = running / spec.requests_per_replica
    assert_as_many(counts[-1], min(max(needed, spec.min_replicas), spec.max_replicas))


@given(specs())
def test_a_blind_start_has_the_fallbacks_replicas(spec):
    keda, clock = simulated(scaled(spec))
    counts = replicas_of(keda, clock, spec.min_replicas, [{}] * 12)
    assert_as_many(counts[-1], spec.fallback_replicas or spec.min_replicas)


def test_a_fleet_on_it_survives_its_morning():
    """In the simulator, with cold starts: every request is served, the fleet comes and goes."""
    spec = DeploymentSpec(
        **GOOD, max_replicas=8, requests_per_replica=4, ready_s=60, scale_down_window_s=120
    )
    body = scaled(spec)["spec"]
    query = body["triggers"][0]["metadata"]["query"]
    fleet = FleetSpec(
        ReplicaSpec(FittedStepTime(step_s=0.05), num_blocks=4000, max_model_len=32768),
        initial_replicas=spec.min_replicas,
        autoscaler=lambda clock: Keda.from_scaled_object(body, {query: LOAD}, clock),
        cold_start=ColdStart(*(Duration(s, s) for s in (30, 10, 15, 5))),
    )
    morning = morning_spike(
        night_rate_per_s=0.1, peak_rate_per_s=3, spike_hours=4, day_s=7200, seed=1
    )
    result = simulate(morning, fleet)
    assert set(result.requests.status) == {"finished"}
    wanted = result.decisions.wanted.tolist()
    assert min(wanted) == wanted[-1] == spec.min_replicas
    assert max(wanted) >= 3 * spec.min_replicas


# What is asked for.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name must be a Kubernetes name: at most 50 .* got ''"),
        ({"name": "Merchant_Chat"}, "name must be a Kubernetes name"),
        ({"name": "7b"}, "name must begin with a letter"),
        ({"name": "llm-"}, "no hyphen first or last"),
        ({"name": "l" * 51}, "at most 50"),
        ({"name": 7}, "name must be a Kubernetes name"),
        ({"namespace": "-eu"}, "namespace must be a Kubernetes name: at most 63"),
        ({"namespace": "my ns"}, "namespace must be"),
        ({"api_key_secret": "Key"}, "api_key_secret must be"),
        ({"image": ""}, "image must be an image with its tag or digest"),
        ({"image": "llm"}, "tag or digest"),
        ({"image": "registry.example:5000/llm"}, "tag or digest"),
        ({"image": "llm:1 --privileged"}, "tag or digest"),
        ({"model": "models/llm"}, "model must be an absolute path"),
        ({"cpu": 2}, "cpu must be a quantity"),
        ({"memory": "8 GB"}, "memory must be a quantity"),
        ({"gpu": "B200"}, "unknown gpu 'B200'; known are L4_24GB"),
        ({"min_replicas": 0}, "min_replicas must be a whole number of at least 1"),
        ({"min_replicas": 5, "max_replicas": 4}, "min_replicas must be at most .* got 5 and 4"),
        ({"max_replicas": 2.5}, "max_replicas must be a whole number"),
        ({"requests_per_replica": 65}, "requests_per_replica must be .* from 1 to 64, got 65"),
        ({"fallback_replicas": 1}, "fallback_replicas must be .* from 2 to 10, got 1"),
        ({"fallback_replicas": 11}, "fallback_replicas must be .* from 2 to 10, got 11"),
        ({"ready_s": 0}, "ready_s must be"),
        ({"ready_s": 601}, "scale_down_window_s must be at least ready_s, 601: .* got 600"),
        ({"scale_down_window_s": 3601}, "scale_down_window_s must be .* to 3600"),
        ({"drain_s": 85}, "termination_grace_s must be at least 95: .* drain_s 85, .* got 90"),
        ({"prometheus": "prometheus:9090"}, "prometheus must be a URL"),
        ({"ttft_p95_ms": 0}, "ttft_p95_ms must be"),
        ({"queue_age_s": -1}, "queue_age_s must be"),
        ({"kv_cache_utilization": 90}, "kv_cache_utilization must be"),
        ({"replicas": 3}, "has 'replicas'; known are name, image"),
        ({"image": None}, "image must be"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_written(tmp_path, changes, message):
    path = tmp_path / "llm.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    with pytest.raises(ValueError, match=message):
        read_spec(path)
    result = runner.invoke(app, ["manifests", str(path), "--out", str(tmp_path / "k8s")])
    assert result.exit_code == 1
    assert re.search(message, " ".join(result.output.split()))
    assert "Traceback" not in result.output
    assert not (tmp_path / "k8s").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: llm", "lacks 'image'"),
        ("- llm", "must hold names and values"),
        ("", "must hold names and values"),
        ("name: [llm", "is no YAML"),
        ("7: llm", "has 7; known are"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, text, message):
    path = tmp_path / "llm.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_spec(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    result = runner.invoke(app, ["manifests", str(tmp_path / "none.yaml"), "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "none.yaml" in result.output
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_example_that_ships(tmp_path):
    result = runner.invoke(app, ["manifests", "--out", str(tmp_path / "a" / "k8s")])
    assert result.exit_code == 0, result.output
    files = sorted((tmp_path / "a" / "k8s").iterdir())
    assert [path.name for path in files] == [
        "dashboard.yaml", "deployment.yaml", "nodepool.yaml", "poddisruptionbudget.yaml",
        "podmonitor.yaml", "prometheusrule.yaml", "scaledobject.yaml", "service.yaml",
    ]  # fmt: skip
    example = read_spec(DATA_DIR / "kubernetes" / "merchant-chat.yaml")
    for path in files:
        assert path.read_text().startswith("# ")
        assert str(path) in result.output.replace("\n", "")
        assert objects(example)[yaml.safe_load(path.read_text())["kind"]]


def test_writing_again_replaces_what_is_there(tmp_path):
    (scaled_before,) = [p for p in write_manifests(SPEC, tmp_path) if p.stem == "scaledobject"]
    write_manifests(DeploymentSpec(**GOOD, max_replicas=7), tmp_path)
    assert yaml.safe_load(scaled_before.read_text())["spec"]["maxReplicaCount"] == 7
