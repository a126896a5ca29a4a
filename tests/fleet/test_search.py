import functools
import math
import multiprocessing

import pandas as pd
import pytest

from course_lib.fleet import search as search_module
from course_lib.fleet.autoscaler import GPUAutoscaler
from course_lib.fleet.search import Objective, SearchResult, grid, search
from course_lib.fleet.simulator import simulate
from course_lib.fleet.spec import FleetSpec, Gateway, ReplicaSpec
from course_lib.fleet.spot import SpotMarket
from course_lib.fleet.step_time import FittedStepTime
from course_lib.traces.generators import steady

FLEET = FleetSpec(
    ReplicaSpec(
        FittedStepTime(step_s=0.01, prefill_token_s=1e-4),
        num_blocks=2000,
        max_model_len=2048,
        max_num_seqs=4,
    )
)
TRACE = steady(4.0, 60.0, prompt_tokens=(50, 200), output_tokens=(50, 150), seed=1)
OBJECTIVE = Objective(ttft_p95_s=1.0, tpot_p95_s=0.05)
REPLICAS = grid(initial_replicas=[1, 2, 3, 6])


def find(policies=REPLICAS, objective=OBJECTIVE, **arguments):
    return search(TRACE, FLEET, policies, objective, show_progress=False, **arguments)


@pytest.fixture
def no_fork(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])


def test_the_cheapest_that_meets_the_objectives_is_found():
    found = find()
    fast = found.table[found.table.ttft_p95_s <= 1.0]
    assert 0 < len(fast) < len(found.table)  # else nothing was chosen
    assert found.cheapest == fast.sort_values("usd").policy.iloc[0]
    assert found.cheapest in found.reason
    assert found.table.policy.tolist() == list(REPLICAS)
    assert found.table.met.tolist() == [not missed for missed in found.table.missed]


def test_a_row_is_what_the_simulation_of_that_policy_says():
    row = find(processes=1).table.iloc[1]
    summary = simulate(TRACE, FleetSpec(FLEET.replica, initial_replicas=2)).summary()
    for name in ("usd", "ttft_p95_s", "tpot_p95_s"):
        assert row[name] == summary[name]


def test_processes_change_nothing_but_the_time():
    spot = grid(initial_replicas=[1, 3], spot=[None, SpotMarket(reclaims_per_hour=60)])
    alone = find(spot, seed=3, processes=1).table
    pd.testing.assert_frame_equal(find(spot, seed=3, processes=2).table, alone)
    assert not find(spot, seed=4, processes=1).table.equals(alone)


def a_policy_of_this_module(clock, cooldown_s):
    return GPUAutoscaler(cooldown_s=cooldown_s, clock=clock)


def autoscalers():
    return grid(
        autoscaler={
            f"{seconds} s": functools.partial(a_policy_of_this_module, cooldown_s=seconds)
            for seconds in (30, 600)
        }
    )


@pytest.mark.skipif(
    search_module._start_method(None) != "fork", reason="processes cannot be forked here"
)
def test_with_fork_a_policy_may_be_anything():
    local = grid(
        autoscaler={
            f"{s} s": lambda clock, s=s: GPUAutoscaler(cooldown_s=s, clock=clock) for s in (30, 600)
        }
    )
    pd.testing.assert_frame_equal(find(local, processes=2).table, find(local, processes=1).table)


def test_without_fork_what_cannot_be_sent_is_simulated_here_and_the_reason_said(no_fork):
    local = {"a": {"autoscaler": lambda clock: GPUAutoscaler(clock=clock)}, "b": {}}
    with pytest.warns(UserWarning, match="one after another.*module of their own"):
        found = find(local, processes=2)
    pd.testing.assert_frame_equal(found.table, find(local, processes=1).table)


def test_without_fork_functions_of_a_notebook_stay_here(no_fork, monkeypatch):
    monkeypatch.setattr(a_policy_of_this_module, "__module__", "__main__")
    monkeypatch.setattr("__main__.a_policy_of_this_module", a_policy_of_this_module, raising=False)
    work = search_module._Work(TRACE, {"a": autoscalers()["30 s"]}, 0)
    with pytest.warns(UserWarning, match="defined in a notebook or script"):
        assert search_module._start_method(work) is None


def test_without_fork_functions_of_a_module_are_sent(no_fork, monkeypatch):
    policies = grid(autoscaler={"a": functools.partial(GPUAutoscaler, 1, 20, 30.0)})
    assert search_module._start_method(search_module._Work(TRACE, policies, 0)) == "spawn"


def result(*rows, rejected=0.0):
    objective = Objective(1.0, 0.05, rejected)
    table = pd.DataFrame(rows, columns=["policy", "usd", "ttft_p95_s", "tpot_p95_s", "rejected"])
    table["missed"] = [", ".join(objective.missed(row)) for row in table.to_dict("records")]
    table["met"] = table.missed == ""
    return SearchResult(table, objective)


def test_the_frontier_leaves_out_what_another_beats():
    found = result(
        ("dear and fast", 9, 0.2, 0.01, 0),
        ("cheap and slow", 1, 5.0, 0.01, 0),
        ("beaten", 5, 0.9, 0.01, 0),
        ("between", 4, 0.8, 0.01, 0),
        ("as cheap, slower", 4, 0.9, 0.01, 0),
        ("as fast, dearer", 10, 0.2, 0.01, 0),
        ("refuses", 0.5, 0.1, 0.01, 0.3),
        ("serves nobody", 0.1, math.nan, math.nan, 1.0),
    )
    assert found.frontier.policy.tolist() == ["cheap and slow", "between", "dear and fast"]
    assert found.cheapest == "between"


def test_the_share_that_may_be_refused_is_the_objectives():
    row = ("refuses", 1, 0.1, 0.01, 0.02)
    assert result(row).cheapest is None
    assert "rejected 0.02 > 0" in result(row).reason
    assert result(row, rejected=0.02).cheapest == "refuses"


def test_without_a_policy_that_meets_them_the_nearest_is_named_with_what_it_missed():
    found = result(
        ("far", 1, 8.0, 0.04, 0), ("near", 2, 1.5, 0.06, 0), ("nobody", 0, math.nan, math.nan, 1.0)
    )
    assert found.cheapest is None
    assert found.reason == (
        "0 of 3 policies meet the objectives; the nearest is near: "
        "ttft_p95_s 1.5 > 1, tpot_p95_s 0.06 > 0.05"
    )


def test_a_fleet_that_refuses_everyone_is_not_the_cheapest():
    policies = {
        "refuses": {"initial_replicas": 0, "gateway": Gateway(timeout_s=1.0)},
        "serves": {"initial_replicas": 6},
    }
    found = find(policies, processes=1)
    assert found.table.rejected.tolist() == [1.0, 0.0]
    assert found.cheapest == "serves"


def test_a_grid_has_every_combination_by_name():
    short, long = object(), object()
    policies = grid(router={"short": short, "long": long}, warm_pool=[0, 5])
    assert policies == {
        "short, warm_pool 0": {"router": short, "warm_pool": 0},
        "short, warm_pool 5": {"router": short, "warm_pool": 5},
        "long, warm_pool 0": {"router": long, "warm_pool": 0},
        "long, warm_pool 5": {"router": long, "warm_pool": 5},
    }


def failing(clock):
    raise RuntimeError("no such metric")


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_names_its_policy(processes):
    with pytest.raises(RuntimeError, match="no such metric") as caught:
        find({"good": {}, "bad": {"autoscaler": failing}}, processes=processes)
    assert any("in policy 'bad'" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid(warm_pol=[1]), "unknown field of FleetSpec 'warm_pol'; known are replica"),
        (lambda: grid(warm_pool=[]), "warm_pool has no choices"),
        (lambda: grid(warm_pool=[1, 1]), "two policies are called 'warm_pool 1'"),
        (lambda: grid(autoscaler=[GPUAutoscaler]), "autoscaler has .* which needs a name"),
        (lambda: find({}), "policies must have at least one"),
        (lambda: find({"x": {"cooldown_s": 3}}), "unknown field in policy 'x' 'cooldown_s'"),
        (lambda: find({"x": {"warm_pool": -1}}), "policy 'x': warm_pool must be a whole number"),
        (lambda: find(processes=0), "processes must be a whole number of at least 1"),
        (lambda: Objective(0, 1), "ttft_p95_s must be a number above 0"),
        (lambda: Objective(1, 1, 2), "rejected must be a number at least 0 and at most 1"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
