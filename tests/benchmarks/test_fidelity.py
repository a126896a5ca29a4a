"""What the fidelity benchmark says of its figures, whatever they are."""

import json

import pytest

from benchmarks import fidelity
from course_lib.data import DEFAULT_MODEL
from course_lib.engine.request import RequestMetrics
from course_lib.fleet.calibration import Calibration
from course_lib.fleet.spec import ReplicaSpec
from course_lib.fleet.step_time import FittedStepTime
from course_lib.traces.trace import Trace, TraceRequest


def verdict(predicted, *real):
    (row,) = fidelity.compare(
        "w", [{"figure": p} for p in predicted], [{"figure": r} for r in real]
    )
    return row


@pytest.mark.parametrize(
    ("predicted", "real", "expected"),
    [
        (109.0, [100.0] * 5, "good"),
        (91.0, [100.0] * 5, "good"),
        (111.0, [100.0] * 5, "off"),
        (89.0, [100.0] * 5, "off"),
        (121.0, [100.0] * 5, "bad"),
        (79.0, [100.0] * 5, "bad"),
        # A spread of 30 %, from 85 to 115, allows an error of as much.
        (129.0, [85.0, 100.0, 100.0, 100.0, 115.0], "good"),
        (131.0, [85.0, 100.0, 100.0, 100.0, 115.0], "off"),
        (161.0, [85.0, 100.0, 100.0, 100.0, 115.0], "bad"),
    ],
)
def test_a_prediction_may_be_off_by_a_tenth_or_by_the_spread_of_the_runs(predicted, real, expected):
    row = verdict([predicted], *real)
    assert row["verdict"] == expected
    assert row["real"] == pytest.approx(100)
    assert row["error"] == pytest.approx(predicted / 100 - 1)


def test_what_is_compared_is_the_mean_of_the_rounds_on_both_sides():
    row = verdict([90.0, 130.0], 95.0, 105.0)
    assert row["predicted"] == pytest.approx(110)
    assert (row["lowest"], row["highest"]) == (95, 105)
    assert row["spread"] == pytest.approx(0.1)


def test_prediction_and_run_are_measured_alike():
    """A run that goes as predicted has the figures of the prediction."""
    trace = Trace("two", (TraceRequest(0.0, 30, 4), TraceRequest(9.0, 50, 1)))
    spec = ReplicaSpec(
        FittedStepTime(step_s=0.5, prefill_token_s=0.01), num_blocks=50, max_model_len=512
    )
    calibration = Calibration("model", "engine", spec, ())
    run = [
        RequestMetrics(0.0, 0.0, [0.8, 1.3, 1.8, 2.3], 2.3),
        RequestMetrics(9.0, 9.0, [10.0], 10.0),
    ]
    real = fidelity.real(run)
    assert fidelity.predicted(trace, calibration) == pytest.approx(real)
    assert real["mean TTFT (ms)"] == pytest.approx(900)
    assert real["p95 TTFT (ms)"] == pytest.approx(990)
    assert real["mean TPOT (ms)"] == pytest.approx(500)  # the second one has no such time
    assert real["throughput (tokens/s)"] == pytest.approx(0.5)


def test_the_workloads_are_three_that_the_shipped_model_can_serve():
    traces = fidelity.workloads(15.0, 1.0)
    assert [trace.name for trace in traces] == ["steady", "bursty", "long-prompt surge"]
    longest = json.loads((DEFAULT_MODEL / "config.json").read_text())["max_position_embeddings"]
    for trace in traces:
        assert len(trace.requests) > 15
        assert trace.duration_s < 15
        assert max(r.prompt_tokens + r.output_tokens for r in trace.requests) <= longest
    assert max(r.prompt_tokens for r in traces[0].requests) <= 256
    assert sum(r.prompt_tokens >= 600 for r in traces[2].requests) >= 3
    busier = fidelity.workloads(15.0, 3.0)[0]
    assert len(busier.requests) > 2 * len(traces[0].requests)
