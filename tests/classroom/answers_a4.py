"""Answers to the exercises of A4: right ones in several styles, and wrong ones of typical kinds."""

import json
import math
import time

from course_lib.fleet.autoscaler import ScalingDecision
from course_lib.fleet.warm_pool import Backlog, ColdStartPlanBase, WarmPoolCost

# A4.1


def backlog_in_order(
    node_s, image_gb, network_gbit_per_s, weights_gib, disk_gb_per_s, warm_up_s,
    arrivals_per_min, served_before_per_min, served_after_per_min,
):  # fmt: skip
    """Right: one phase after the other, and every case by itself."""
    ready_s = node_s
    ready_s += image_gb * 8 / network_gbit_per_s
    ready_s += weights_gib * 1024**3 / 1e9 / disk_gb_per_s
    ready_s += warm_up_s
    grows_per_s = (arrivals_per_min - served_before_per_min) / 60
    queue = grows_per_s * ready_s
    if queue <= 0:
        return Backlog(ready_s, 0, 0)
    if served_after_per_min <= arrivals_per_min:
        return Backlog(ready_s, queue, math.inf)
    return Backlog(ready_s, queue, queue * 60 / (served_after_per_min - arrivals_per_min))


class Answer:
    """Right: not the course's class, but one with the same fields."""

    def __init__(self, ready_s, queue, drain_s):
        self.ready_s, self.queue, self.drain_s = ready_s, queue, drain_s


def backlog_by_names(**given):
    """Right: a sum over phases, and an object of its own."""
    phases = {
        "node": given["node_s"],
        "pull": given["image_gb"] / (given["network_gbit_per_s"] / 8),
        "load": given["weights_gib"] * 1.073741824 / given["disk_gb_per_s"],
        "warm": given["warm_up_s"],
    }
    ready_s = sum(phases.values())
    waiting = max(given["arrivals_per_min"] - given["served_before_per_min"], 0) * ready_s / 60
    spare = given["served_after_per_min"] - given["arrivals_per_min"]
    drain_s = 0.0
    if waiting:
        drain_s = 60 * waiting / spare if spare > 0 else float("inf")
    return Answer(ready_s, waiting, drain_s)


def _backlog_with(**changed):
    """The right one with some of what it is given scaled before, or of what it gives after."""

    def answer(**given):
        scaled = {n: v * changed[n] if n in changed else v for n, v in given.items()}
        right = backlog_in_order(**scaled)
        result = {
            name: getattr(right, name) * changed.get(name, 1)
            for name in ("ready_s", "queue", "drain_s")
        }
        return Backlog(**result)

    return answer


backlog_in_bytes = _backlog_with(image_gb=1 / 8)
backlog_bits_the_wrong_way = _backlog_with(image_gb=1 / 64)
backlog_gib_as_gb = _backlog_with(weights_gib=1e9 / 2**30)
backlog_gib_the_wrong_way = _backlog_with(weights_gib=(1e9 / 2**30) ** 2)
backlog_without_warm_up = _backlog_with(warm_up_s=0)
backlog_per_minute = _backlog_with(queue=60, drain_s=60)
backlog_drains_in_minutes = _backlog_with(drain_s=1 / 60)


def backlog_longest_phase(**given):
    right = backlog_in_order(**given)
    longest = max(
        given["node_s"],
        given["image_gb"] * 8 / given["network_gbit_per_s"],
        given["weights_gib"] * 2**30 / 1e9 / given["disk_gb_per_s"],
        given["warm_up_s"],
    )
    share = longest / right.ready_s if right.ready_s else 1
    return Backlog(longest, right.queue * share, right.drain_s * share if right.queue else 0.0)


def backlog_of_all_arrivals(**given):
    right = backlog_in_order(**given)
    queue = given["arrivals_per_min"] / 60 * right.ready_s
    spare = (given["served_after_per_min"] - given["arrivals_per_min"]) / 60
    drain_s = 0.0 if queue == 0 else queue / spare if spare > 0 else math.inf
    return Backlog(right.ready_s, queue, drain_s)


def backlog_below_zero(**given):
    right = backlog_in_order(**given)
    rate = (given["arrivals_per_min"] - given["served_before_per_min"]) / 60
    return Backlog(right.ready_s, rate * right.ready_s, right.drain_s)


def backlog_nobody_comes_later(**given):
    right = backlog_in_order(**given)
    after = given["served_after_per_min"] / 60
    drain_s = 0.0 if right.queue == 0 else right.queue / after if after else math.inf
    return Backlog(right.ready_s, right.queue, drain_s)


def backlog_always_ends(**given):
    right = backlog_in_order(**given)
    spare = (given["served_after_per_min"] - given["arrivals_per_min"]) / 60
    return Backlog(right.ready_s, right.queue, right.queue / spare)


# A4.2


def pool_step_by_step(
    customers_per_min, ramp_min, requests_per_customer_per_min, ready_s, capacity_per_s,
    usd_per_hour, hours_per_day=24,
):  # fmt: skip
    """Right: customers, requests, replicas, dollars."""
    customers = customers_per_min * min(ready_s / 60, ramp_min)
    requests_per_s = customers * requests_per_customer_per_min / 60
    replicas = math.ceil(requests_per_s / capacity_per_s)
    return WarmPoolCost(replicas, replicas * usd_per_hour * hours_per_day)


def pool_in_seconds(**given):
    """Right: a slope in requests/s for each second, and the ceiling without math."""
    slope = given["customers_per_min"] * given["requests_per_customer_per_min"] / 3600
    seconds = given["ready_s"]
    if seconds > 60 * given["ramp_min"]:
        seconds = 60 * given["ramp_min"]
    share = round(slope * seconds / given["capacity_per_s"], 9)
    replicas = -int(-share // 1)
    hourly = replicas * given["usd_per_hour"]
    return WarmPoolCost(replicas, hourly * given["hours_per_day"])


def _pool_with(**changed):
    def answer(**given):
        return pool_step_by_step(**{name: changed.get(name, v) for name, v in given.items()})

    return answer


pool_beyond_the_ramp = _pool_with(ramp_min=math.inf)
pool_of_the_whole_ramp = _pool_with(ready_s=math.inf)
pool_paid_all_day = _pool_with(hours_per_day=24)
pool_paid_one_hour = _pool_with(hours_per_day=1)


def pool_ready_in_minutes(**given):
    return pool_step_by_step(**{**given, "ready_s": 60 * given["ready_s"]})


def pool_per_minute(**given):
    return pool_step_by_step(**{**given, "capacity_per_s": given["capacity_per_s"] / 60})


def _pool_rounded(rounding):
    def answer(**given):
        minutes = min(given["ready_s"] / 60, given["ramp_min"])
        load = given["customers_per_min"] * minutes * given["requests_per_customer_per_min"] / 60
        replicas = rounding(load / given["capacity_per_s"])
        return WarmPoolCost(replicas, replicas * given["usd_per_hour"] * given["hours_per_day"])

    return answer


pool_rounded_down = _pool_rounded(math.floor)
pool_rounded = _pool_rounded(round)
pool_one_more = _pool_rounded(lambda share: int(share) + 1)


# A4.3


class PlainPlan(ColdStartPlanBase):
    """Right: small methods, each of which a wrong version below replaces."""

    def decide(self, current_replicas):
        now = self.clock()
        loads = [self.load(step) for step in self.steps(now)]
        needed = self.rounded(self.of(loads) / self.capacity_per_replica)
        return ScalingDecision(self.standby(needed, current_replicas), f"{needed} needed")

    def steps(self, now):
        first = int(now // self.step_s)
        last = int((now + self.ready_time_s) // self.step_s)
        return range(first, last + 1)

    def load(self, step):
        return self.forecast[step % len(self.forecast)]

    def of(self, loads):
        return max(loads)

    def rounded(self, share):
        return math.ceil(share)

    def standby(self, needed, current):
        return self.clamp(needed - current)

    def clamp(self, standby):
        return min(max(standby, self.min_standby), self.max_standby)


class WalkingPlan(ColdStartPlanBase):
    """Right: walks from step to step, and keeps what each step needs from the beginning."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.needs = [-int(-load // self.capacity_per_replica) for load in self.forecast]

    def decide(self, current_replicas):
        begin_s = self.clock()
        end_s, highest = begin_s + self.ready_time_s, 0
        at_s = begin_s - begin_s % self.step_s
        while at_s <= end_s:
            place = int(at_s % (self.step_s * len(self.needs)) / self.step_s)
            highest = max(highest, self.needs[place])
            at_s += self.step_s
        more = highest - current_replicas
        more = self.min_standby if more < self.min_standby else more
        return ScalingDecision(min(more, self.max_standby), f"the next rush needs {highest}")


class NowAlone(PlainPlan):
    def steps(self, now):
        return [int(now // self.step_s)]


class EndAlone(PlainPlan):
    def steps(self, now):
        return [int((now + self.ready_time_s) // self.step_s)]


class LastStepLeftOut(PlainPlan):
    def steps(self, now):
        return list(super().steps(now))[:-1] or [int(now // self.step_s)]


class ThisStepLeftOut(PlainPlan):
    def steps(self, now):
        return list(super().steps(now))[1:] or [int(now // self.step_s)]


class OneStepTooMany(PlainPlan):
    def steps(self, now):
        steps = super().steps(now)
        return range(steps.start, steps.stop + 1)


class NoNewDay(PlainPlan):
    def load(self, step):
        return self.forecast[min(step, len(self.forecast) - 1)]


class IndexBeyond(PlainPlan):
    def load(self, step):
        return self.forecast[step]


class MeanLoad(PlainPlan):
    def of(self, loads):
        return sum(loads) / len(loads)


class SumOfLoads(PlainPlan):
    def of(self, loads):
        return sum(loads)


class CurrentForgotten(PlainPlan):
    def standby(self, needed, current):
        return self.clamp(needed)


class RoundedDown(PlainPlan):
    def rounded(self, share):
        return int(share)


class Rounded(PlainPlan):
    def rounded(self, share):
        return round(share)


class NoLimits(PlainPlan):
    def clamp(self, standby):
        return standby


class NoMinimum(PlainPlan):
    def clamp(self, standby):
        return min(standby, self.max_standby)


class NoMaximum(PlainPlan):
    def clamp(self, standby):
        return max(standby, self.min_standby)


class LimitsTooEarly(PlainPlan):
    def standby(self, needed, current):
        return max(0, self.clamp(needed) - current)


class MinimumOnTop(PlainPlan):
    def clamp(self, standby):
        return min(max(standby, 0) + self.min_standby, self.max_standby)


class RealTimePlan(PlainPlan):
    def decide(self, current_replicas):
        self.clock = time.time
        return super().decide(current_replicas)


class NumberAlone(PlainPlan):
    def decide(self, current_replicas):
        return super().decide(current_replicas).replicas


class NoReason(PlainPlan):
    def decide(self, current_replicas):
        return ScalingDecision(super().decide(current_replicas).replicas, "")


# A4.4


def yaml_as_text(
    name, prometheus, waiting, running, target, min_replicas, max_replicas, fallback_replicas,
    window_s,
):  # fmt: skip
    """Right: one text with places."""
    return f"""\
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {name}
spec:
  scaleTargetRef:
    name: {name}
  minReplicaCount: {min_replicas}
  maxReplicaCount: {max_replicas}
  fallback:
    failureThreshold: 3
    replicas: {fallback_replicas}
    behavior: currentReplicasIfHigher
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        scaleDown:
          stabilizationWindowSeconds: {window_s}
  triggers:
    - type: prometheus
      metadata:
        serverAddress: {prometheus}
        query: {waiting} + {running}
        threshold: "{target}"
        ignoreNullValues: "false"
"""


def yaml_as_json(**given):
    """Right: JSON is YAML; the query the other way round; says some defaults."""
    metadata = {
        "serverAddress": given["prometheus"],
        "query": f"{given['running']}+{given['waiting']}",
        "threshold": f"{given['target']}.0",
        "ignoreNullValues": "false",
        "activationThreshold": "0",
    }
    down = {"stabilizationWindowSeconds": given["window_s"]}
    behavior = {"scaleDown": down, "scaleUp": {"stabilizationWindowSeconds": 0}}
    spec = {
        "scaleTargetRef": {"name": given["name"], "kind": "Deployment"},
        "minReplicaCount": given["min_replicas"],
        "maxReplicaCount": given["max_replicas"],
        "pollingInterval": 15,
        "fallback": {
            "failureThreshold": 3,
            "replicas": given["fallback_replicas"],
            "behavior": "currentReplicasIfHigher",
        },
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": behavior}},
        "triggers": [{"type": "prometheus", "metricType": "AverageValue", "metadata": metadata}],
    }
    name = {"name": given["name"]}
    return json.dumps(
        {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": name, "spec": spec}
    )


def _yaml_with(old, new):
    """The right text with a part of it replaced; both may name what is given."""

    def answer(**given):
        text = yaml_as_text(**given)
        assert old.format(**given) in text
        return text.replace(old.format(**given), new.format(**given))

    return answer


yaml_waiting_alone = _yaml_with("{waiting} + {running}", "{waiting}")
yaml_running_alone = _yaml_with("{waiting} + {running}", "{running}")
yaml_nulls_are_zero = _yaml_with('        ignoreNullValues: "false"\n', "")
yaml_number_as_threshold = _yaml_with('threshold: "{target}"', "threshold: {target}")
yaml_without_minimum = _yaml_with("  minReplicaCount: {min_replicas}\n", "")
yaml_without_maximum = _yaml_with("  maxReplicaCount: {max_replicas}\n", "")
yaml_fallback_shrinks = _yaml_with("    behavior: currentReplicasIfHigher\n", "")
yaml_fallback_of_the_minimum = _yaml_with(
    "replicas: {fallback_replicas}", "replicas: {min_replicas}"
)
yaml_fallback_late = _yaml_with("failureThreshold: 3", "failureThreshold: 6")
yaml_without_fallback = _yaml_with(
    "  fallback:\n    failureThreshold: 3\n    replicas: {fallback_replicas}\n"
    "    behavior: currentReplicasIfHigher\n",
    "",
)
yaml_default_window = _yaml_with(
    "  advanced:\n    horizontalPodAutoscalerConfig:\n      behavior:\n        scaleDown:\n"
    "          stabilizationWindowSeconds: {window_s}\n",
    "",
)
yaml_window_is_cooldown = _yaml_with(
    "  advanced:\n    horizontalPodAutoscalerConfig:\n      behavior:\n        scaleDown:\n"
    "          stabilizationWindowSeconds: {window_s}\n",
    "  cooldownPeriod: {window_s}\n",
)
yaml_window_up = _yaml_with(
    "        scaleDown:\n",
    "        scaleUp:\n          stabilizationWindowSeconds: {window_s}\n        scaleDown:\n",
)
yaml_target_of_one = _yaml_with('threshold: "{target}"', 'threshold: "1"')
yaml_two_triggers = _yaml_with(
    "{waiting} + {running}",
    '{waiting}\n        threshold: "{target}"\n        ignoreNullValues: "false"\n'
    "    - type: prometheus\n      metadata:\n        serverAddress: {prometheus}\n"
    "        query: {running}",
)
yaml_of_another_deployment = _yaml_with("    name: {name}", "    name: server")
yaml_of_another_kind = _yaml_with("ScaledObject", "ScaledJob")
yaml_with_a_value_trigger = _yaml_with(
    "- type: prometheus", "- type: prometheus\n      metricType: Value"
)
yaml_with_a_wrong_field = _yaml_with("minReplicaCount", "minReplicas")
yaml_without_indentation = _yaml_with("    failureThreshold", " failureThreshold")


def yaml_as_a_dict(**given):
    return json.loads(yaml_as_json(**given))


RIGHT = {
    "A4.1": [backlog_in_order, backlog_by_names],
    "A4.2": [pool_step_by_step, pool_in_seconds],
    "A4.3": [PlainPlan, WalkingPlan],
    "A4.4": [yaml_as_text, yaml_as_json],
}
WRONG = {
    "A4.1": [
        backlog_in_bytes,
        backlog_per_minute,
        backlog_gib_as_gb,
        backlog_nobody_comes_later,
        backlog_always_ends,
        backlog_bits_the_wrong_way,
        backlog_gib_the_wrong_way,
        backlog_without_warm_up,
        backlog_longest_phase,
        backlog_of_all_arrivals,
        backlog_below_zero,
        backlog_drains_in_minutes,
    ],
    "A4.2": [
        pool_of_the_whole_ramp,
        pool_beyond_the_ramp,
        pool_ready_in_minutes,
        pool_per_minute,
        pool_rounded_down,
        pool_rounded,
        pool_one_more,
        pool_paid_all_day,
        pool_paid_one_hour,
    ],
    "A4.3": [
        NowAlone,
        EndAlone,
        CurrentForgotten,
        NoNewDay,
        NoMaximum,
        LastStepLeftOut,
        ThisStepLeftOut,
        OneStepTooMany,
        IndexBeyond,
        MeanLoad,
        SumOfLoads,
        RoundedDown,
        Rounded,
        NoLimits,
        NoMinimum,
        LimitsTooEarly,
        MinimumOnTop,
        RealTimePlan,
        NumberAlone,
        NoReason,
    ],
    "A4.4": [
        yaml_waiting_alone,
        yaml_nulls_are_zero,
        yaml_number_as_threshold,
        yaml_fallback_shrinks,
        yaml_default_window,
        yaml_running_alone,
        yaml_two_triggers,
        yaml_without_minimum,
        yaml_without_maximum,
        yaml_without_fallback,
        yaml_fallback_late,
        yaml_fallback_of_the_minimum,
        yaml_window_is_cooldown,
        yaml_window_up,
        yaml_target_of_one,
        yaml_of_another_deployment,
        yaml_of_another_kind,
        yaml_with_a_value_trigger,
        yaml_with_a_wrong_field,
        yaml_without_indentation,
        yaml_as_a_dict,
    ],
}
