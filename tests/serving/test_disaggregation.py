import math

import pytest

from course_lib.serving.disaggregation import should_benchmark_split_pools


@pytest.mark.parametrize(
    ("ttft_p95_ms", "tpot_p95_ms", "answer"),
    [
        (820, 44, False),  # short chats
        (2450, 93, True),  # long documents
        (2450, 44, False),
        (820, 93, False),
        (1500, 60, False),  # at the objective is not beyond it
    ],
)
def test_split_only_when_both_objectives_are_missed(ttft_p95_ms, tpot_p95_ms, answer):
    assert should_benchmark_split_pools(ttft_p95_ms, tpot_p95_ms, 1500, 60) is answer


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("bad", [-1, math.nan, True, "60"])
def test_bad_times_are_refused_by_name(position, bad):
    names = ["ttft_p95_ms", "tpot_p95_ms", "ttft_slo_ms", "tpot_slo_ms"]
    arguments = [820, 44, 1500, 60]
    arguments[position] = bad
    with pytest.raises(ValueError, match=f"{names[position]} must be a number"):
        should_benchmark_split_pools(*arguments)


def test_an_objective_of_nothing_is_refused():
    with pytest.raises(ValueError, match="tpot_slo_ms must be a number above 0"):
        should_benchmark_split_pools(820, 44, 1500, 0)
