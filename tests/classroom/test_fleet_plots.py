"""What is drawn of a fleet is what its simulation found."""

from itertools import pairwise

import matplotlib
import numpy as np
import pandas as pd
import pytest

from course_lib.classroom.plots import (
    plot_autoscaling,
    plot_cold_starts,
    plot_cost,
    plot_fleet,
    plot_frontier,
    plot_policies,
    plot_request_spans,
    plot_signals,
)
from course_lib.classroom.plots.waits import Span, request_spans
from course_lib.fleet.autoscaler import ScalingDecision
from course_lib.fleet.cold_start import ColdStart, Duration
from course_lib.fleet.regions import Outage, Region
from course_lib.fleet.search import Objective, SearchResult
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec, ReplicaSpec
from course_lib.fleet.step_time import FittedStepTime
from course_lib.traces.generators import concurrent_users, in_region, steady

REPLICA = ReplicaSpec(
    FittedStepTime(step_s=0.05), num_blocks=200, max_model_len=512, max_num_seqs=4, usd_per_hour=3.6
)
COLD_START = ColdStart(Duration(20, 20), Duration(5, 5), Duration(10, 10), Duration(5, 5))
SLO_S = 2.0


class TwoWhenAsked:
    def decide(self, metrics, current_replicas):
        wanted = 2 if metrics["num_requests_waiting"] or current_replicas == 2 else current_replicas
        return ScalingDecision(wanted, "somebody waits")


@pytest.fixture(scope="module")
def result():
    trace = concurrent_users(30, at_s=10, prompt_tokens=(20, 40), output_tokens=(100, 100))
    fleet = FleetSpec(
        REPLICA, autoscaler=lambda clock: TwoWhenAsked(), cold_start=COLD_START, scrape_interval_s=5
    )
    return simulate(trace, fleet, until_s=120)


@pytest.fixture(scope="module")
def cold_result():
    """Nothing is warm, so that all wait at the gateway for a cold start."""
    trace = concurrent_users(2, at_s=10, prompt_tokens=(20, 40), output_tokens=(10, 10))
    fleet = FleetSpec(
        REPLICA,
        initial_replicas=0,
        autoscaler=lambda clock: TwoWhenAsked(),
        cold_start=COLD_START,
        scrape_interval_s=5,
    )
    return simulate(trace, fleet, until_s=80)


@pytest.fixture(autouse=True)
def no_screen():
    matplotlib.use("agg")


def title(ax):
    return ax.get_title(loc="left")


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_the_fleet_is_drawn_from_the_tables_with_units(result):
    figure = plot_fleet(result, SLO_S, "Thirty at once")
    arrivals, replicas, queue, kv_cache, ttft = figure.axes
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "requests/s", "replicas", "requests", "%", "s",
    ]  # fmt: skip
    assert ttft.get_xlabel() == "time (s)"
    stairs = arrivals.patches[0].get_data()
    assert (stairs.values * np.diff(stairs.edges)).sum() == pytest.approx(30)
    assert title(replicas) == "Replicas: up to 2"
    assert legend(replicas) == ["ready", "loading", "wanted"]
    assert list(replicas.lines[0].get_ydata()) == list(result.timeline.replicas_wanted)
    assert list(queue.lines[0].get_ydata()) == list(result.timeline.num_requests_running)
    most = result.timeline.num_requests_waiting.max()
    assert title(queue) == f"Queue: up to {most:.0f} waiting, 4 running"
    drawn = 100 * result.timeline.kv_cache_utilization
    assert list(kv_cache.lines[0].get_ydata()) == list(drawn)
    worst_s = result.timeline.ttft_p95_ms.max() / 1000
    assert np.nanmax(ttft.lines[0].get_ydata()) == pytest.approx(worst_s)
    assert f"up to {worst_s:.3g} s" in title(ttft)
    assert list(ttft.lines[1].get_ydata()) == [SLO_S, SLO_S]


def test_a_window_shows_and_counts_only_what_is_in_it(result):
    arrivals, *_, ttft = plot_fleet(result, window_s=(50.0, 80.0)).axes
    assert ttft.get_xlim() == (50.0, 80.0)
    assert title(arrivals) == "Arrivals: 0 of 30 requests"


def test_regions_are_added_up_and_an_outage_is_marked():
    regions = (Region("eu", 2, {"us": 0.1}), Region("us", 1))
    trace = in_region(steady(0.2, 60, prompt_tokens=(20, 40), output_tokens=(5, 5)), "us")
    fleet = FleetSpec(
        REPLICA, regions=regions, outages=(Outage("eu", 30, 50),), cold_start=COLD_START
    )
    result = simulate(trace, fleet, until_s=60)
    _, replicas, by_region, *_ = plot_fleet(result).axes
    assert title(replicas) == "Replicas: up to 3"
    assert "outage (2)" in legend(replicas)
    assert legend(by_region) == ["eu", "us"]
    eu = by_region.lines[0]
    assert list(eu.get_ydata())[:5] == [0, 1, 2, 1, 0] and list(eu.get_xdata())[3] == 30
    assert eu.get_xdata()[-1] == result.duration_s


def test_signals_stand_above_the_queue_in_percent(result):
    gpu, cpu, queue, ttft = plot_signals(result, SLO_S).axes
    assert "DCGM_FI_DEV_GPU_UTIL" in title(gpu)
    assert list(gpu.lines[0].get_ydata()) == list(100 * result.timeline.gpu_utilization)
    assert list(cpu.lines[0].get_ydata()) == list(100 * result.timeline.cpu_utilization)
    assert (gpu.get_ylabel(), cpu.get_ylabel(), queue.get_ylabel()) == ("%", "%", "requests")
    assert ttft.get_ylabel() == "s"


def test_policies_are_counted_beside_their_lines(result, cold_result):
    figure = plot_policies({"warm": result, "cold": cold_result})
    replicas, queue, *counts = figure.axes
    assert list(queue.lines[0].get_ydata()) == list(result.timeline.num_requests_waiting)
    assert [line.get_label() for line in replicas.lines] == ["warm", "cold"]
    widths = {ax.get_title(loc="left"): [bar.get_width() for bar in ax.patches] for ax in counts}
    for name, key in (
        ("replicas started", "starts"),
        ("reversals", "reversals"),
        ("queue-seconds", "queue_s"),
        ("USD", "usd"),
    ):
        assert widths[name] == [result.summary()[key], cold_result.summary()[key]]
    with pytest.raises(ValueError, match="1 to 6 policies"):
        plot_policies({})


def test_cost_adds_up_to_the_gpu_hours(result, cold_result):
    (ax,) = plot_cost({"warm": result, "cold": cold_result}).axes
    ends = {bar.get_y(): bar.get_x() + bar.get_width() for bar in ax.patches}
    paid = [sum(result.gpu_hours.values()), sum(cold_result.gpu_hours.values())]
    assert [ends[y] for y in sorted(ends)] == pytest.approx(paid)
    assert ax.get_xlabel() == "GPU-hours"
    assert f"${result.usd:,.2f}" in ax.texts[-2].get_text().replace("\\", "")


def test_the_frontier_is_that_of_the_search():
    table = pd.DataFrame(
        {
            "policy": ["cheap", "worse", "fast", "middle", "refuses"],
            "usd": [1.0, 2.5, 3.0, 2.0, 0.5],
            "ttft_p95_s": [9.0, 8.0, 0.5, 2.0, 0.4],
            "tpot_p95_s": [0.03] * 5,
            "rejected": [0.0, 0.0, 0.0, 0.0, 0.9],
            "met": [False, False, True, True, False],
        }
    )
    found = SearchResult(table, Objective(ttft_p95_s=SLO_S, tpot_p95_s=0.05))
    (ax,) = plot_frontier(found).axes
    frontier = next(line for line in ax.lines if line.get_label() == "frontier")
    assert list(frontier.get_xdata()) == [1.0, 2.0, 3.0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("dollars", "time to first token, p95 (s)")


def test_cold_starts_have_their_phases_in_order(result):
    (ax,) = plot_cold_starts(result).axes
    (row,) = [label.get_text() for label in ax.get_yticklabels()]
    assert row.startswith("replica-1, at ")
    assert [bar.get_width() for bar in ax.patches[:4]] == [20, 5, 10, 5]
    assert ax.texts[-1].get_text().strip() == "40 s"
    assert ax.get_xlabel() == "time since the start was decided (s)"


def test_a_request_that_waited_for_a_cold_start_says_so(cold_result):
    index = cold_result.requests.index[0]
    spans = request_spans(cold_result, index)
    request = cold_result.requests.loc[index]
    assert [span.phase for span in spans][:2] == ["queue at the gateway", "cold start"]
    cold = spans[1]
    assert cold.end_s - cold.start_s == pytest.approx(40)
    assert spans[-1].phase == "decode" and spans[-1].start_s == pytest.approx(request.ttft_s)
    assert spans[-1].end_s == pytest.approx(request.e2e_s)


def test_spans_follow_one_another_from_arrival_to_the_last_token(result):
    for index, request in result.requests.iterrows():
        spans = request_spans(result, index)
        assert spans[0].start_s == 0 and spans[-1].end_s == pytest.approx(request.e2e_s)
        assert all(a.end_s == b.start_s for a, b in pairwise(spans))
        assert "cold start" not in {span.phase for span in spans}  # one was always ready


def test_request_spans_are_bars_with_the_first_token_marked():
    phases = {"cold start": 3.0, "prefill": 1.0, "decode": 4.0}
    (ax,) = plot_request_spans({"a": phases, "b": [Span("prefill", 0.0, 2.0)]}).axes
    assert [(bar.get_x(), bar.get_width()) for bar in ax.patches] == [
        (0, 3),
        (3, 1),
        (4, 4),
        (0, 2),
    ]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "a\nTTFT 4.0 s", "b\nTTFT 2.0 s",
    ]  # fmt: skip
    assert ax.get_xlabel() == "time since the request arrived (s)"
    with pytest.raises(ValueError, match="unknown phases"):
        plot_request_spans({"a": {"lunch": 1.0}})


def test_an_autoscaling_run_is_drawn_with_what_it_cost(result):
    figure = plot_autoscaling(result, SLO_S, "Thirty at once")
    arrivals, replicas, queue, paid = figure.axes
    assert arrivals.get_title(loc="left") == "Arrivals: 30 requests"
    assert replicas.get_title(loc="left") == "Replicas: up to 2"
    assert queue.get_xlabel() == "time (s)" and queue.get_ylabel() == "requests"
    assert paid.get_xlabel() == "GPU-hours"
    assert sum(bar.get_width() for bar in paid.patches) == pytest.approx(
        sum(result.gpu_hours.values())
    )
    assert paid.texts[-1].get_text() == f"  \\${result.usd:,.2f}"
    assert "above 2 s" in figure.get_supxlabel()
