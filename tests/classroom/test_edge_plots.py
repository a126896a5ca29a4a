"""The pictures of the serving edge show each request once: served, late, or refused and why."""

import matplotlib
import pytest

from course_lib.classroom.plots import (
    plot_back_pressure,
    plot_outcomes,
    plot_queue,
    plot_token_bucket,
)
from course_lib.serving.load_report import SLO, LoadReport, RequestRecord
from course_lib.serving.scrape import QueueSample


@pytest.fixture(autouse=True)
def no_screen():
    matplotlib.use("agg")


def record(index: int, ttft_s: float | None, reason: str = "", kind: str = "chat") -> RequestRecord:
    made = RequestRecord(index, kind, 10, 2, start_s=index / 2)
    if ttft_s is None:
        made.outcome, made.reason, made.status = "refused", reason, 503
    else:
        made.chunk_times_s = [made.start_s + ttft_s]
        made.output_tokens, made.status = 1, 200
    return made


def report(*records: RequestRecord) -> LoadReport:
    return LoadReport(
        "http://x", "m", "completions", {}, SLO(ttft_s=1.0, tpot_s=0.2), "", 5.0, 0.1, records
    )


OPEN = report(record(0, 0.2), record(1, 2.0), record(2, 4.0))
BOUNDED = report(
    record(0, 0.2),
    record(1, None, "max_num_queued_reqs"),
    record(2, 0.4, kind="report"),
    record(3, None, "queue_age", kind="report"),
)


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_back_pressure_has_a_panel_a_run_on_one_scale():
    figure = plot_back_pressure({"open": OPEN, "bounded": BOUNDED})
    open_door, bounded = figure.axes
    assert open_door.get_title(loc="left") == "open: TTFT p95 3.8 s"
    assert bounded.get_title(loc="left") == "bounded: TTFT p95 0.39 s"
    assert legend(open_door) == ["served (3)"]
    assert legend(bounded) == ["served (2)", "refused (2)"]
    assert open_door.get_ylim() == bounded.get_ylim()
    assert open_door.get_ylabel() == "time to first token (s)"
    assert "1 s" in figure.get_supxlabel()


def test_a_report_without_requests_is_refused():
    with pytest.raises(ValueError, match="no requests"):
        plot_back_pressure({"open": report()})


def test_a_run_in_which_all_were_refused_has_no_p95():
    figure = plot_back_pressure({"closed": report(record(0, None, "queue_age"))})
    assert figure.axes[0].get_title(loc="left") == "closed"
    assert legend(figure.axes[0]) == ["refused (1)"]


def test_queue_depth_and_age_say_how_far_they_went():
    samples = [QueueSample(t / 10, 4, t, t / 5, 0.5) for t in range(6)]
    vllm = [QueueSample(t / 10, 4, 2 * t, None, 0.5) for t in range(6)]
    depths, ages = plot_queue({"ours": samples, "vLLM": vllm}, max_age_s=2.0).axes
    assert legend(depths) == ["ours: up to 5", "vLLM: up to 10"]
    assert legend(ages) == ["ours: up to 1.0 s"]
    assert depths.get_ylabel() == "requests" and ages.get_ylabel() == "s"
    with pytest.raises(ValueError, match="no samples"):
        plot_queue({"ours": []})


def test_a_queue_of_vllm_alone_has_no_age():
    vllm = [QueueSample(t / 10, 4, 2 * t, None, 0.5) for t in range(6)]
    _, ages = plot_queue({"vLLM": vllm}).axes
    assert ages.get_legend() is None


def test_outcomes_count_each_request_once_in_a_row_for_each_class():
    (ax,) = plot_outcomes({"open": OPEN, "bounded": BOUNDED}).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "open: chat", "bounded: chat", "bounded: report",
    ]  # fmt: skip
    assert legend(ax) == [
        "served in time", "served late", "refused: max_num_queued_reqs", "refused: queue_age",
    ]  # fmt: skip
    assert sum(bar.get_width() for bar in ax.patches) == 7
    assert ax.get_xlabel() == "requests"


def test_a_bucket_shows_who_was_served_and_never_more_than_it_holds():
    figure = plot_token_bucket(2, 3, [(0, 3), (0.5, 2), (1, 2), (5, 1)])
    (ax,) = figure.axes
    assert ax.get_title(loc="left") == "A bucket of 3, filled at 2/s: 3 served, 1 refused"
    times, levels = ax.lines[0].get_data()
    assert max(levels) == 3 and min(levels) == 0
    assert list(times) == sorted(times)
    assert list(zip(*ax.lines[2].get_data(), strict=True)) == [(0, 0), (1, 0), (5, 2)]
    assert list(zip(*ax.lines[3].get_data(), strict=True)) == [(0.5, 1.0)]
