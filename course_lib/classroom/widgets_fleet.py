"""Sliders over the fleet simulator: an autoscaler before a morning spike, and single requests.

Each picture is also to be had without widgets, from the function of `plots` that draws it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets

from course_lib.classroom.plots import plot_fleet, plot_request_spans
from course_lib.classroom.plots.waits import request_spans
from course_lib.classroom.widgets import _dropdown, _png, _slider
from course_lib.fleet.autoscaler import Autoscaler, GPUAutoscaler
from course_lib.fleet.cold_start import ColdStart, Duration
from course_lib.fleet.kubernetes import ExternalMetric, HorizontalPodAutoscaler
from course_lib.fleet.proportional import ProportionalAutoscaler
from course_lib.fleet.results import SimulationResult
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import Clock, FleetSpec, ReplicaSpec
from course_lib.traces.generators import morning_spike

#: An autoscaler from a cooldown in seconds, a target of requests for each replica, and a clock.
MakeAutoscaler = Callable[[float, float, Clock], Autoscaler]

AUTOSCALERS: dict[str, MakeAutoscaler] = {
    "simple rule": lambda cooldown_s, target, clock: GPUAutoscaler(
        cooldown_s=cooldown_s, clock=clock
    ),
    "proportional": lambda cooldown_s, target, clock: ProportionalAutoscaler(
        target_per_replica=target, window_s=cooldown_s, clock=clock
    ),
    "Kubernetes HPA": lambda cooldown_s, target, clock: HorizontalPodAutoscaler(
        [ExternalMetric("num_requests_waiting + num_requests_running", average_value=target)],
        clock=clock,
    ),
}

# A day in an hour, so that the spike of six hours lasts 15 minutes: longer than a cold start.
DAY_S = 3600.0

# Before and after a request, what is drawn of the fleet.
MARGIN_S = 120.0


def autoscaler_explorer(
    replica: ReplicaSpec,
    slo_ttft_s: float,
    autoscalers: Mapping[str, MakeAutoscaler] = AUTOSCALERS,
) -> ipywidgets.Widget:
    """A morning spike on sliders: how high, who scales, how long a cold start lasts.

    Args:
        replica: what each replica of the fleet is.
        slo_ttft_s: the objective of the time to first token.
        autoscalers: to choose among, a student's own too.
    """
    controls = {
        "autoscaler": _dropdown("autoscaler", list(autoscalers), "simple rule"),
        "peak": _slider("peak req/s", [0.5, 1, 1.5, 2, 3], 1),
        "cooldown": _slider("cooldown s", [0, 30, 60, 120, 300, 600], 60),
        "target": _slider("target each", [2, 5, 10, 20, 40], 10),
        "warm": _slider("warm pool", [0, 1, 2, 4, 8], 0),
        "cold": _slider("cold start %", [10, 25, 50, 100, 200], 100),
    }
    picture, text = ipywidgets.Image(format="png"), ipywidgets.HTML()

    def draw(_: Any = None) -> None:
        chosen = {name: control.value for name, control in controls.items()}
        make = autoscalers[chosen["autoscaler"]]
        fleet = FleetSpec(
            replica,
            autoscaler=lambda clock: make(chosen["cooldown"], chosen["target"], clock),
            warm_pool=chosen["warm"],
            cold_start=scaled_cold_start(chosen["cold"] / 100),
        )
        trace = morning_spike(
            night_rate_per_s=0.2, peak_rate_per_s=chosen["peak"], spike_hour=7.0, ramp_hours=1.0,
            spike_hours=6.0, day_s=DAY_S,
        )  # fmt: skip
        result = simulate(trace, fleet)
        picture.value = _png(plot_fleet(result, slo_ttft_s, "A morning, a day in an hour"))
        found = result.summary()
        text.value = (
            f"{found['starts']} replicas started, {found['reversals']} reversals, "
            f"{found['queue_s']:,.0f} queue-seconds, p95 TTFT {found['ttft_p95_s']:.2f} s, "
            f"${found['usd']:.2f}"
        )

    return _explorer(controls, draw, [text, picture])


def request_timeline_explorer(
    result: SimulationResult, slo_ttft_s: float, most: int = 50
) -> ipywidgets.Widget:
    """Pick a request, the slowest first: its timeline, and the fleet around it.

    Args:
        result: of a simulation.
        slo_ttft_s: the objective of the time to first token.
        most: so many requests to pick from.

    Raises:
        ValueError: no request got a token.
    """
    slowest = result.requests.ttft_s.dropna().nlargest(most)
    if slowest.empty:
        raise ValueError("no request of this result got a token; there is no timeline to draw")
    names = {f"request {index}: TTFT {ttft_s:.2f} s": index for index, ttft_s in slowest.items()}
    controls = {"request": _dropdown("request", list(names), "")}
    timeline, fleet = ipywidgets.Image(format="png"), ipywidgets.Image(format="png")

    def draw(_: Any = None) -> None:
        index = names[controls["request"].value]
        name = f"request {index}"
        timeline.value = _png(plot_request_spans({name: request_spans(result, index)}))
        request = result.requests.loc[index]
        window_s = (
            max(0.0, request.arrival_s - MARGIN_S),
            min(result.duration_s, request.finished_s + MARGIN_S),
        )
        picture = plot_fleet(result, slo_ttft_s, f"The fleet around {name}", window_s)
        fleet.value = _png(picture)

    return _explorer(controls, draw, [timeline, fleet])


def scaled_cold_start(factor: float) -> ColdStart:
    """The default cold start, all its phases longer or shorter by a factor."""
    node, pull, load, warm_up = (
        Duration(factor * phase.p50_s, factor * phase.p95_s)
        for phase in ColdStart().phases.values()
    )
    return ColdStart(node, pull, load, warm_up)


def _explorer(
    controls: Mapping[str, Any], draw: Callable[..., None], shown: list[ipywidgets.Widget]
) -> ipywidgets.Widget:
    """Controls in rows of two above what they change."""
    for control in controls.values():
        control.observe(draw, names="value")
    draw()
    boxes = list(controls.values())
    rows = [ipywidgets.HBox(boxes[first : first + 2]) for first in range(0, len(boxes), 2)]
    return ipywidgets.VBox([*rows, *shown])
