"""What the simulator is for: the effects that the course teaches, in their directions."""

import pytest

from benchmarks import autoscaling as classic

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    return {name: result.summary() for name, result in classic.experiment().items()}


def test_every_request_is_served_whatever_the_policy(found):
    requests = len(classic.morning(seed=1).requests)
    assert {summary["requests_finished"] for summary in found.values()} == {requests}


def test_the_cooldowns_are_what_they_are_called():
    assert classic.ColdStart().ready_time_s(0.5) > classic.SHORT_COOLDOWN_S
    assert classic.LONG_COOLDOWN_S > classic.LULL_S


def test_a_long_cooldown_reverses_less_and_queues_longer(found):
    short, long = found[classic.SHORT], found[classic.LONG]
    assert long["reversals"] < short["reversals"]
    assert long["starts"] < short["starts"]
    assert long["queue_s"] > 2 * short["queue_s"]


def test_a_window_on_the_way_down_alone_ends_the_flapping(found):
    without, window = found[classic.NO_WINDOW], found[classic.WINDOW]
    assert without["reversals"] >= len(classic.WAVES_S)
    assert window["reversals"] <= 1  # the last way down
    assert window["starts"] == classic.MAX_REPLICAS - 1  # each once
    assert window["queue_s"] < without["queue_s"]
    assert window["queue_s"] < found[classic.SHORT]["queue_s"]


@pytest.mark.parametrize("name", [classic.WARM_POOL, classic.FORECAST])
def test_warm_pool_and_forecast_remove_the_cold_queue(found, name):
    reactive = found[classic.WINDOW]
    assert found[name]["queue_s"] < reactive["queue_s"] / 4
    assert found[name]["ttft_p95_s"] < reactive["ttft_p95_s"] / 2


def test_the_warm_pool_has_a_price_and_the_forecast_a_lower_one(found):
    warm, forecast = found[classic.WARM_POOL], found[classic.FORECAST]
    assert warm["gpu_hours_standby"] > 0
    assert warm["usd"] > found[classic.WINDOW]["usd"]
    assert found[classic.LONG]["usd"] < forecast["usd"] < warm["usd"]
