"""The oracle of A4.4: reads the ScaledObject as KEDA does, and plays a day of metrics to it.

What the text must say is compared field by field; what it means, decision by decision, with a
`Keda` that is made without any text, and with those of the usual mistakes.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

from course_lib.classroom.checks import Mismatch
from course_lib.classroom.crd import crd_errors, find_crd
from course_lib.classroom.exercises.suspects import Clock, Suspects, difference_of
from course_lib.fleet.keda import Fallback, Keda, PrometheusTrigger
from course_lib.fleet.kubernetes import Behavior, ScaleDown, ScaleUp

WAITING, RUNNING = "num_requests_waiting", "num_requests_running"
LOAD = f"{WAITING} + {RUNNING}"

KEDA_HINTS = {
    "waiting alone": "Waiting alone is the trap: a fleet in which all are busy and nobody waits "
    "would be sent home. The query is waiting + running.",
    "running alone": "Those who wait are load as well. The query is waiting + running.",
    "two triggers": "Of two triggers the larger answer wins. The load is the sum: one trigger, "
    "with waiting + running as its query.",
    "nulls are zero": 'KEDA\'s default takes lost metrics for 0 and scales down. Set '
    'ignoreNullValues: "false" in the metadata of the trigger.',
    "no fallback": "When the metrics stay away, spec.fallback decides: failureThreshold: 3, "
    "replicas, behavior: currentReplicasIfHigher.",
    "fallback shrinks": "A fallback of behavior `static`, the default, scales down to `replicas`. "
    "behavior: currentReplicasIfHigher keeps what runs.",
    "fallback late": "failureThreshold is 3.",
    "fallback of the minimum": "The replicas of the fallback are fallback_replicas.",
    "to zero": "Without minReplicaCount KEDA goes to zero, where no replica reports anything.",
    "no maximum": "Without maxReplicaCount KEDA goes up to 100.",
    "default window": "The window of scaling down stands in spec.advanced."
    "horizontalPodAutoscalerConfig.behavior.scaleDown.stabilizationWindowSeconds; without it, it "
    "is 300 s.",
    "window up": "The window is for scaling down. Going up does not wait.",
    "target of one": "threshold is the target: requests for each replica.",
}  # fmt: skip


def _keda(given: Mapping[str, Any], clock: Clock, mistake: str = "") -> Keda:
    """What the ScaledObject means, or with one of the mistakes."""
    threshold = 1 if mistake == "target of one" else given["target"]
    queries = {
        "waiting alone": (WAITING,),
        "running alone": (RUNNING,),
        "two triggers": (WAITING, RUNNING),
    }.get(mistake, (LOAD,))
    nulls = mistake == "nulls are zero"
    fewest = given["min_replicas"]
    fallback = Fallback(
        6 if mistake == "fallback late" else 3,
        fewest if mistake == "fallback of the minimum" else given["fallback_replicas"],
        "static" if mistake == "fallback shrinks" else "currentReplicasIfHigher",
    )
    window_s = given["window_s"]
    behavior: Behavior | None = Behavior(ScaleUp(), ScaleDown(window_s))
    if mistake == "window up":
        behavior = Behavior(ScaleUp(window_s), ScaleDown(window_s))
    if mistake == "default window":
        behavior = None
    return Keda(
        [PrometheusTrigger(query, threshold, ignore_null_values=nulls) for query in queries],
        0 if mistake == "to zero" else fewest,
        100 if mistake == "no maximum" else given["max_replicas"],
        fallback=None if mistake == "no fallback" else fallback,
        behavior=behavior,
        clock=clock,
    )


def verify_scaled_object(answer: Callable[..., Any], rng: random.Random) -> None:
    """Deployments with names, targets and limits of their own, each through a day of metrics."""
    suspects = Suspects(KEDA_HINTS)
    for _ in range(10):
        job = rng.choice(("chat", "merchant-chat", "support-eu"))
        selector = f'{{job="{job}"}}'
        fewest = rng.randint(1, 4)
        given: dict[str, Any] = {
            "name": f"{job}-{rng.randint(1, 99)}",
            "prometheus": f"http://prometheus-{rng.randint(1, 9)}:9090",
            "waiting": f"sum(vllm:num_requests_waiting{selector})",
            "running": f"sum(vllm:num_requests_running{selector})",
            "target": rng.choice((2, 4, 5, 8)),
            "min_replicas": fewest,
            "max_replicas": fewest + rng.choice((4, 10, 30)),
            "fallback_replicas": fewest + rng.choice((1, 2)),
            "window_s": rng.choice((120, 600, 900)),
        }
        where = f"scaled_object({', '.join(f'{k}={v!r}' for k, v in given.items())})"
        manifest = _manifest(answer(**given), where)
        _check_frame(manifest, given, where)
        clock = Clock(0.0)
        _play(_read(manifest, given, clock, where), given, clock, rng, suspects)
    suspects.accuse()


def _manifest(text: Any, where: str) -> dict[str, Any]:
    if not isinstance(text, str):
        raise Mismatch(f"{where} returned {text!r}", "Return the YAML as one text.")
    try:
        manifest = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Mismatch(
            f"what {where} returned is no YAML: {' '.join(str(error).split())}",
            "YAML goes by its indentation: two spaces for each level, and `- ` before each item of "
            "a list.",
        ) from None
    if not isinstance(manifest, dict):
        raise Mismatch(f"what {where} returned is {manifest!r}, not a mapping of fields")
    return manifest


def _check_frame(manifest: dict[str, Any], given: Mapping[str, Any], where: str) -> None:
    """What says what it is, whom to scale and whom to ask, and the types that the CRD wants."""
    expected = {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata.name": given["name"],
        "spec.scaleTargetRef.name": given["name"],
    }
    for path, value in expected.items():
        found = _at(manifest, path)
        if found != value:
            raise Mismatch(f"{path} of {where}: expected {value!r}, got {found!r}")
    triggers = _at(manifest, "spec.triggers")
    if not isinstance(triggers, list) or not triggers:
        raise Mismatch(
            f"spec.triggers of {where}: expected a list of triggers, got {triggers!r}",
            "One trigger: `- type: prometheus`, and below it `metadata:`.",
        )
    for trigger in triggers:
        metadata = _at(trigger, "metadata")
        for name, value in (metadata if isinstance(metadata, dict) else {}).items():
            if not isinstance(value, str):
                raise Mismatch(
                    f"{name} in the metadata of a trigger of {where}: expected a text, got "
                    f"{value!r}",
                    'The CRD wants texts there, numbers and truth values too: threshold: "4".',
                )
        address = _at(trigger, "metadata.serverAddress")
        if address != given["prometheus"]:
            raise Mismatch(
                f"serverAddress in the metadata of a trigger of {where}: expected "
                f"{given['prometheus']!r}, got {address!r}"
            )
    crd = find_crd()
    for error in crd_errors(manifest, crd) if crd else []:
        raise Mismatch(f"KEDA's CRD refuses what {where} returned: {error}")


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _read(manifest: dict[str, Any], given: Mapping[str, Any], clock: Clock, where: str) -> Keda:
    waiting, running = given["waiting"], given["running"]
    queries = {
        waiting: WAITING,
        running: RUNNING,
        f"{waiting} + {running}": LOAD,
        f"{running} + {waiting}": LOAD,
    }
    for trigger in manifest["spec"]["triggers"]:
        query = " ".join(str(_at(trigger, "metadata.query")).replace("+", " + ").split())
        trigger["metadata"]["query"] = query
    try:
        return Keda.from_scaled_object(manifest["spec"], queries, clock)
    except (ValueError, TypeError, AttributeError) as error:
        raise Mismatch(f"KEDA would not do with what {where} returned: {error}") from None


def _play(
    keda: Keda, given: Mapping[str, Any], clock: Clock, rng: random.Random, suspects: Suspects
) -> None:
    truth = _keda(given, clock)
    mistaken = {name: _keda(given, clock, name) for name in KEDA_HINTS}
    current = given["min_replicas"]
    said = ", ".join(f"{name}={given[name]}" for name in list(given)[4:])
    for metrics in _day(given, rng):
        expected = truth.decide(metrics, current).replicas
        theirs = {name: rule.decide(metrics, current).replicas for name, rule in mistaken.items()}
        seen = ", ".join(f"{name}={value:g}" for name, value in metrics.items())
        where = (
            f"decision of the ScaledObject ({said}) at {clock.now_s:g} s with {current} replicas "
            f"and {seen or 'no metrics'}"
        )
        got = keda.decide(metrics, current).replicas
        agreeing = [name for name, value in theirs.items() if value == got]
        suspects.saw(agreeing, difference_of(got, expected, where))
        current = expected
        clock.now_s += 15


def _day(given: Mapping[str, Any], rng: random.Random) -> Iterator[dict[str, float]]:
    """Quiet, a rush with a queue, all busy and nobody waiting, lost metrics, quiet again."""
    target, most = given["target"], given["max_replicas"]
    busy = float(target * rng.randint(given["min_replicas"] + 3, most))
    rush = {WAITING: float(target * rng.choice((1, most, 2 * most))), RUNNING: busy}
    full = {WAITING: 0.0, RUNNING: busy}
    half = {WAITING: 0.0, RUNNING: float(round(busy / 3))}
    quiet = {WAITING: 0.0, RUNNING: 1.0}
    none = {WAITING: 0.0, RUNNING: 0.0}
    parts: list[tuple[dict[str, float], int]] = [
        (quiet, 2), (rush, rng.randint(2, 12)), (full, 40), ({}, rng.randint(5, 70)), (full, 3),
        (half, rng.randint(4, 20)), (full, 2), (none, 70), ({}, 6), (quiet, 3),
    ]  # fmt: skip
    for metrics, ticks in parts:
        for _ in range(ticks):
            yield metrics
