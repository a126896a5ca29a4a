"""What the notebooks of a fleet let you try: an autoscaler, single requests, incidents.

Each function returns an `Explorer`, which a notebook shows by naming it in the last line of a cell.
"""

from collections.abc import Callable, Mapping

from course_lib.classroom.explorer import Control, Explorer, View
from course_lib.classroom.parts import part
from course_lib.classroom.plots import plot_autoscaling, plot_fleet, plot_request_spans
from course_lib.classroom.plots.waits import request_spans
from course_lib.fleet.autoscaler import Autoscaler, GPUAutoscaler
from course_lib.fleet.cold_start import ColdStart
from course_lib.fleet.kubernetes import (
    Behavior,
    ExternalMetric,
    HorizontalPodAutoscaler,
    ScaleDown,
)
from course_lib.fleet.results import SimulationResult
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import Clock, FleetSpec, ReplicaSpec
from course_lib.traces.generators import bursty, merge, morning_spike, steady
from course_lib.traces.trace import Trace

#: An autoscaler from a cooldown in seconds, a target of requests for each replica, and a clock.
MakeAutoscaler = Callable[[float, float, Clock], Autoscaler]

#: By name. The proportional one is the student's own, once its check has passed.
AUTOSCALERS: dict[str, MakeAutoscaler] = {
    "simple rule": lambda cooldown_s, target, clock: GPUAutoscaler(
        cooldown_s=cooldown_s, clock=clock
    ),
    "proportional": lambda cooldown_s, target, clock: part("autoscaler")(
        target_per_replica=target, window_s=cooldown_s, clock=clock
    ),
    "Kubernetes HPA": lambda cooldown_s, target, clock: HorizontalPodAutoscaler(
        [ExternalMetric("num_requests_waiting + num_requests_running", average_value=target)],
        behavior=Behavior(scale_down=ScaleDown(int(cooldown_s))),
        clock=clock,
    ),
}

# Twenty minutes, so that a slider answers soon; a cold start takes some 200 s of them.
TRACE_S = 1200.0
NIGHT_SHARE = 0.2  # of the peak


def _morning(peak_per_s: float, spike_hour: float, spike_hours: float, seed: int = 0) -> Trace:
    """A day of 24 hours in `TRACE_S`."""
    return morning_spike(
        night_rate_per_s=NIGHT_SHARE * peak_per_s, peak_rate_per_s=peak_per_s,
        spike_hour=spike_hour, ramp_hours=1.0, spike_hours=spike_hours, day_s=TRACE_S, seed=seed,
    )  # fmt: skip


#: Traces by name, from the highest rate in requests/s.
TRACES: dict[str, Callable[[float], Trace]] = {
    "one wave": lambda peak_per_s: _morning(peak_per_s, 4, 8),
    "two waves": lambda peak_per_s: merge(
        _morning(0.9 * peak_per_s, 3, 4), _morning(0.9 * peak_per_s, 13, 4, seed=1)
    ),
    "steady": lambda peak_per_s: steady(0.5 * peak_per_s, TRACE_S),
    "bursts": lambda peak_per_s: bursty(0.5 * peak_per_s, TRACE_S, cv=4),
}

# Before and after a request, what is drawn of the fleet.
MARGIN_S = 120.0


def autoscaler_explorer(
    replica: ReplicaSpec,
    slo_ttft_s: float,
    autoscalers: Mapping[str, MakeAutoscaler] = AUTOSCALERS,
) -> Explorer:
    """A fleet on sliders: what comes, who scales and how, what is warm; who waits, what it costs.

    Args:
        replica: what each replica of the fleet is.
        slo_ttft_s: the objective of the time to first token.
        autoscalers: to choose among, a student's own too.
    """
    controls = {
        "trace": Control("requests", list(TRACES), "one wave", "menu"),
        "peak": Control("at the peak (requests/s)", [0.25, 0.5, 0.75, 1.0, 1.5, 2.0], 1.0),
        "autoscaler": Control("autoscaler", list(autoscalers), "simple rule", "menu"),
        "target": Control("target (requests a replica)", [2, 4, 5, 8, 16, 32], 4),
        "cooldown": Control("cooldown or window (s)", [0, 30, 60, 120, 300, 600], 60),
        "warm": Control("warm pool (replicas)", [0, 1, 2, 4, 8], 0),
        "cold": Control("cold start", [0.1, 0.25, 0.5, 1.0, 2.0], 1.0, form="x {:g}"),
    }

    def draw(
        trace: str,
        peak: float,
        autoscaler: str,
        target: float,
        cooldown: float,
        warm: int,
        cold: float,
    ) -> View:
        node, pull, load, warm_up = (phase.scaled(cold) for phase in ColdStart().phases.values())
        fleet = FleetSpec(
            replica,
            autoscaler=lambda clock: autoscalers[autoscaler](cooldown, target, clock),
            warm_pool=warm,
            cold_start=ColdStart(node, pull, load, warm_up),
        )
        result = simulate(TRACES[trace](peak), fleet)
        found = result.summary()
        text = (
            f"{found['starts']} cold starts, {found['reversals']} reversals, "
            f"{found['queue_s']:,.0f} queue-seconds, p95 TTFT {found['ttft_p95_s']:.2f} s, "
            f"${found['usd']:.2f}. "
        )
        if autoscaler == "simple rule":
            text += "The simple rule has thresholds of its own: the target does not matter to it."
        return View(
            [plot_autoscaling(result, slo_ttft_s, f"{trace.capitalize()}, {autoscaler}")], text
        )

    return Explorer(controls, draw)


def request_timeline_explorer(
    result: SimulationResult, slo_ttft_s: float, most: int = 50
) -> Explorer:
    """Pick a request, the slowest first: its timeline, and the fleet around it.

    Args:
        result: of a simulation.
        slo_ttft_s: the objective of the time to first token.
        most: so many requests to pick from.

    Raises:
        ValueError: no request of this result got a token.
    """
    slowest = result.requests.ttft_s.dropna().nlargest(most)
    if slowest.empty:
        raise ValueError("no request of this result got a token; there is no timeline to draw")
    names = {f"request {index}: TTFT {ttft_s:.2f} s": index for index, ttft_s in slowest.items()}

    def draw(index: int) -> View:
        request = result.requests.loc[index]
        window_s = (
            max(0.0, request.arrival_s - MARGIN_S),
            min(result.duration_s, request.finished_s + MARGIN_S),
        )
        name = f"request {index}"
        spans = plot_request_spans({name: request_spans(result, index)})
        fleet = plot_fleet(result, slo_ttft_s, f"The fleet around {name}", window_s)
        return View([spans, fleet])

    return Explorer({"index": Control("the slowest first", names, slowest.index[0], "menu")}, draw)
