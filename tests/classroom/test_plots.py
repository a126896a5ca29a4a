"""The plots state what was measured: titles, units, and the numbers of the request."""

import matplotlib
import pytest

from course_lib.classroom.plots import plot_request_timeline
from course_lib.engine.request import RequestMetrics


@pytest.fixture(autouse=True)
def no_screen():
    matplotlib.use("agg")


def test_the_timeline_names_queue_prefill_ttft_and_tpot_in_milliseconds():
    metrics = RequestMetrics(
        arrival_time=50.0,
        first_scheduled_time=50.002,
        token_times=[50.030, 50.040, 50.060],
        finished_time=50.060,
    )
    figure = plot_request_timeline(metrics, "Order A-1842")
    lanes, latencies = figure.axes
    assert lanes.get_title(loc="left") == "Order A-1842: where the time went"
    assert [label.get_text() for label in lanes.get_yticklabels()] == [
        "queue  2 ms",
        "prefill  28 ms",
        "decode  30 ms",
    ]
    assert [text.get_text().strip() for text in lanes.texts] == ["TTFT 30 ms"]
    assert latencies.get_title(loc="right") == "TPOT 15 ms"
    assert [bar.get_height() for bar in latencies.patches] == pytest.approx([10, 20])
    assert latencies.get_xlabel() == "time since the request arrived (ms)"
    assert "TTFT" in figure.get_supxlabel()


def test_a_reply_of_one_token_has_no_tpot():
    figure = plot_request_timeline(RequestMetrics(0.0, 0.001, [0.02], 0.02))
    assert len(figure.axes[1].patches) == 0
    assert figure.axes[1].get_title(loc="right") == ""


def test_a_request_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no tokens yet"):
        plot_request_timeline(RequestMetrics(0.0, 0.001))
