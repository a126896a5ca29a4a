"""Pictures with controls: what a control chooses is what is drawn, with and without ipywidgets.

CI runs this file with ipywidgets 8 and, from `test_colab.py`, with Colab's 7.7.
"""

import asyncio
import base64
import importlib.util
from itertools import pairwise

import matplotlib
import pytest
from matplotlib.figure import Figure

from course_lib.classroom import widgets_fleet
from course_lib.classroom.explorer import NO_WIDGETS, Control, Explorer, View
from course_lib.classroom.incident_explorer import incident_explorer
from course_lib.classroom.incidents.bank import load
from course_lib.classroom.recording import BlockMap
from course_lib.classroom.widgets import batching_explorer, block_map_explorer, sizing_explorer
from course_lib.fleet.cold_start import ColdStart
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec, ReplicaSpec
from course_lib.fleet.step_time import FittedStepTime
from course_lib.sizing.memory import estimate_gpu_requirements
from course_lib.traces.generators import steady

PNG = b"\x89PNG"
VIEW = "application/vnd.jupyter.widget-view+json"
REPLICA = ReplicaSpec(
    FittedStepTime(step_s=0.05),
    num_blocks=200,
    max_model_len=4096,
    max_num_seqs=4,
    usd_per_hour=3.6,
)
SLO_S = 2.0


@pytest.fixture(autouse=True)
def no_screen():
    matplotlib.use("agg")


@pytest.fixture
def no_ipywidgets(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ipywidgets" else found(name)
    )


def noted():
    """A draw function for one control, and what it was asked for."""
    asked = []

    def draw(number):
        asked.append(number)
        if number == 3:
            raise RuntimeError("3 < 4")
        figure = Figure(figsize=(1, 1))
        figure.text(0, 0, f"{number}")
        return View([figure], f"number {number}")

    return draw, asked


def test_moving_a_control_draws_anew_and_coming_back_does_not():
    draw, asked = noted()
    explorer = Explorer({"number": Control("number", [1, 2, 3], 2, form="{} req/s")}, draw)
    first = explorer.picture
    assert explorer.text == "number 2" and first.startswith(PNG)
    assert explorer.widgets["number"].options[0] == ("1 req/s", 1)
    explorer.widgets["number"].value = 1
    assert explorer.text == "number 1" and explorer.picture != first
    explorer.widgets["number"].value = 2
    assert explorer.picture == first and asked == [2, 1]


def test_an_error_is_told_and_the_next_move_mends_it():
    draw, _ = noted()
    explorer = Explorer({"number": Control("number", [1, 2, 3], 2)}, draw)
    before = explorer.picture
    explorer.widgets["number"].value = 3
    assert "RuntimeError: 3 &lt; 4" in explorer.box.children[1].value
    assert explorer.picture == before
    explorer.widgets["number"].value = 2
    assert "number 2" in explorer.box.children[1].value


def test_in_a_running_kernel_several_moves_are_one_picture():
    draw, asked = noted()
    explorer = Explorer({"number": Control("number", [*range(5, 50)], 5)}, draw)

    async def move():
        for number in range(6, 30):
            explorer.widgets["number"].value = number
        while explorer.text != "number 29":
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(move(), 60))
    assert asked == [5, 29]


def test_a_switch_goes_off_when_another_control_moves():
    def draw(number, shown):
        return View([], f"{number} {shown}")

    controls = {"number": Control("number", [1, 2], 1), "shown": Control("show", kind="switch")}
    explorer = Explorer(controls, draw)
    explorer.widgets["shown"].value = True
    assert explorer.text == "1 True"
    explorer.widgets["number"].value = 2
    assert explorer.text == "2 False" and explorer.widgets["shown"].value is False


def test_a_notebook_gets_the_widgets_and_a_picture_for_those_who_only_read():
    draw, _ = noted()
    explorer = Explorer({"number": Control("number", [1, 2], 1)}, draw)
    bundle = explorer._repr_mimebundle_()
    assert bundle[VIEW]["model_id"] == explorer.box.model_id
    assert base64.b64decode(bundle["image/png"]) == explorer.picture
    assert "text/html" not in bundle
    assert Explorer({}, lambda: View([], "<b>no figure</b>"))._repr_mimebundle_()["text/html"]


def test_without_ipywidgets_there_is_the_picture_and_a_sentence(no_ipywidgets, capsys):
    explorer = sizing_explorer(estimate_gpu_requirements)
    assert capsys.readouterr().out.strip() == NO_WIDGETS
    assert explorer.widgets == {} and VIEW not in explorer._repr_mimebundle_()
    assert base64.b64decode(explorer._repr_mimebundle_()["image/png"]).startswith(PNG)


def test_the_sizing_sliders_ask_the_calculator():
    asked = []

    def sizing(*args, **kwargs):
        asked.append((args, kwargs))
        return estimate_gpu_requirements(*args, **kwargs)

    explorer = sizing_explorer(sizing)
    before = explorer.picture
    explorer.widgets["concurrency"].value = 1000
    explorer.widgets["kv"].value = "fp8"
    question = (8.030261248, 32, 8, 128, 2048, 1000), {"weight_bytes": 2.0, "kv_bytes": 1.0}
    assert question in asked and explorer.picture != before
    before = explorer.picture
    explorer.widgets["gpu"].value = "L4_24GB"
    assert explorer.picture != before


def test_the_batch_is_that_of_the_sliders():
    explorer = batching_explorer()
    assert "times as many steps" in explorer.text
    before = explorer.picture
    explorer.widgets["slots"].value = 1
    assert "takes 1.00 times" in explorer.text and explorer.picture != before
    explorer.widgets["num_long"].value = 24
    explorer.widgets["slots"].value = 8
    assert "takes 1.00 times" in explorer.text  # all are equally long, and 8 divides 24


def test_the_block_player_steps_through_the_run_and_lists_the_block_tables():
    owned = {"0": (3, 1), "1": (3, 4)}
    maps = [BlockMap(0, 8, 16, {}, {}, 2), BlockMap(1, 8, 16, owned, {}, 0)]
    explorer = block_map_explorer(maps)
    assert "request 1: 3, 4" in explorer.text
    before = explorer.picture
    explorer.widgets["step"].value = 0
    assert explorer.text == "No block tables" and explorer.picture != before
    assert explorer.widgets["step"].max == 1


def test_the_autoscaler_explorer_simulates_what_the_sliders_say(monkeypatch):
    asked = []

    def watched(trace, fleet):
        asked.append((trace, fleet))
        return simulate(trace, fleet, until_s=120)

    monkeypatch.setattr(widgets_fleet, "simulate", watched)
    explorer = widgets_fleet.autoscaler_explorer(REPLICA, SLO_S)
    before = explorer.picture
    assert "queue-seconds" in explorer.text and "the target does not matter" in explorer.text
    explorer.widgets["warm"].value = 2
    explorer.widgets["cold"].value = 2.0
    fleet = asked[-1][1]
    assert fleet.warm_pool == 2
    assert fleet.cold_start.node_provisioning.p50_s == 2 * ColdStart().node_provisioning.p50_s
    assert len(asked) == 3 and explorer.picture != before
    explorer.widgets["autoscaler"].value = "proportional"
    explorer.widgets["cooldown"].value = 300
    explorer.widgets["target"].value = 8
    scaler = asked[-1][1].autoscaler(lambda: 0.0)
    assert (scaler.window_s, scaler.target_per_replica) == (300, 8)
    explorer.widgets["autoscaler"].value = "Kubernetes HPA"
    hpa = asked[-1][1].autoscaler(lambda: 0.0)
    assert hpa.behavior.scale_down.stabilization_window_seconds == 300
    explorer.widgets["peak"].value = 0.5
    explorer.widgets["trace"].value = "steady"
    assert asked[-1][0].requests == steady(0.25, widgets_fleet.TRACE_S).requests


@pytest.mark.parametrize("name", widgets_fleet.TRACES)
def test_a_higher_peak_is_more_requests_in_the_same_time(name):
    few, many = (widgets_fleet.TRACES[name](peak).requests for peak in (0.5, 2.0))
    assert len(many) > 2 * len(few) > 0
    for requests in (few, many):
        assert requests[0].arrival_s >= 0 and requests[-1].arrival_s < widgets_fleet.TRACE_S
        assert all(a.arrival_s <= b.arrival_s for a, b in pairwise(requests))


def test_the_timeline_explorer_begins_with_the_slowest_request():
    trace = steady(1.0, 60, prompt_tokens=(20, 40), output_tokens=(50, 100))
    result = simulate(trace, FleetSpec(REPLICA))
    explorer = widgets_fleet.request_timeline_explorer(result, SLO_S)
    choice = explorer.widgets["index"]
    assert choice.value == result.requests.ttft_s.idxmax()
    assert choice.options[0][0].startswith(f"request {choice.value}: TTFT")
    before = explorer.picture
    choice.value = choice.options[-1][1]
    assert explorer.picture != before


def test_the_cause_of_an_incident_is_uncovered_and_hidden_again_at_the_next():
    cases = load("practice")[:2]
    explorer = incident_explorer(cases, lambda request, replica: {"queue": request.ttft_s})
    assert explorer.text == "What is the cause?"
    explorer.widgets["uncovered"].value = True
    assert cases[0].cause in explorer.text
    explorer.widgets["index"].value = 1
    assert explorer.text == "What is the cause?"
