"""An autoscaler that grows in proportion to the load: what becomes of the simple rule in A3.

    ProportionalAutoscaler(target_per_replica=4, window_s=300, clock=clock)

It goes up at once and as far as the load needs, and down only when a while has passed in which
less was needed. The load is requests, waiting and running, and the KV cache.
"""

from collections.abc import Mapping
from typing import Any

from course_lib.fleet.autoscaler import ScalingDecision
from course_lib.fleet.proportional_base import (
    LOAD_METRICS,
    ProportionalBase,
    StabilizationWindow,
    replicas_for_load,
)
from course_lib.validation import whole_number


class ProportionalAutoscaler(ProportionalBase):
    """As many replicas as the load needs; fewer only after `window_s` in which fewer did.

    A metric that is absent could not be measured: what the others need counts, but the fleet gets
    no smaller.

    Args:
        settings: those of `ProportionalBase`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.window = StabilizationWindow(self.window_s, self.clock)

    def decide(self, metrics: Mapping[str, float], current_replicas: int) -> ScalingDecision:
        """Decide once.

        Args:
            metrics: `LOAD_METRICS`, those that could be measured. Others are ignored.
            current_replicas: those there are, loading ones included, draining ones not.

        Raises:
            ValueError: `current_replicas` is not a whole number of at least 0.
        """
        current = whole_number("current_replicas", current_replicas, at_least=0)
        known = {name: metrics[name] for name in LOAD_METRICS if name in metrics}
        load = {**dict.fromkeys(LOAD_METRICS, 0.0), **known}
        needed = replicas_for_load(
            load, current, self.target_per_replica, self.target_kv_cache, self.tolerance
        )
        reason = (
            f"num_requests_waiting {load['num_requests_waiting']:g} + num_requests_running "
            f"{load['num_requests_running']:g} at {self.target_per_replica:g} each, "
            f"kv_cache_utilization {load['kv_cache_utilization']:g} of {self.target_kv_cache:g}: "
            f"{needed} needed"
        )
        if missing := [name for name in LOAD_METRICS if name not in known]:
            needed = max(needed, current)
            reason += f"; {', '.join(missing)} could not be measured, so no fewer"

        wanted = self.window.stabilize(needed, current)
        if wanted > needed:
            reason += f"; up to {wanted} in the last {self.window_s:g} s"
        replicas = min(max(wanted, self.min_replicas), self.max_replicas)
        if replicas != wanted:
            limit = "min_replicas" if replicas == self.min_replicas else "max_replicas"
            reason = f"{limit} {replicas}; {reason}"
        return ScalingDecision(replicas, reason)
