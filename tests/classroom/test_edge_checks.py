"""The checks of A2 name the mistake, and what they let pass stands in front of the real server."""

import random
from pathlib import Path

import httpx
import pytest

from course_lib import LLM
from course_lib.classroom.checks import CheckFailed, check
from course_lib.classroom.exercises import a2
from course_lib.classroom.parts import load_object, part
from course_lib.data import DEFAULT_MODEL
from course_lib.serving.admission_base import TenantLimits
from course_lib.serving.api import Replica
from course_lib.serving.server import BackgroundServer
from tests.classroom import answers_a2 as answers
from tests.classroom.hints import hint_shown

HINTS = [
    ("A2.1", answers.NeverRefills, "never refills"),
    ("A2.1", answers.RefillsBeyondItsSize, "cannot hold more than `size`"),
    ("A2.1", answers.RefillsTheSameTimeTwice, "updated_s = now"),
    ("A2.1", answers.CountsWholeSeconds, "do not round the time"),
    ("A2.1", answers.EmptyAtFirst, "full at first"),
    ("A2.1", answers.LargeCostsNeverPass, "min(cost, size)"),
    ("A2.1", answers.AskingTakes, "only asks"),
    ("A2.1", answers.RefusedPays, "pays nothing"),
    ("A2.1", answers.ForgivesDebts, "That is a debt"),
    ("A2.1", answers.TakesNothing, "lowers the level"),
    ("A2.1", answers.WaitsInTokens, "in seconds"),
    ("A2.1", answers.RealTime, "Ask self.clock()"),
    ("A2.2", answers.arrival_strict, "may be never"),
    ("A2.2", answers.arrival_strict_then_time, "may be never"),
    ("A2.2", answers.arrival_of_all_alike, "`batch_delay_s` later"),
    ("A2.2", answers.arrival_batch_earlier, "batch_delay_s is added"),
    ("A2.2", answers.arrival_of_mixed_units, "multiply the sum by 1000"),
    ("A2.2", answers.arrival_in_seconds, "too coarse"),
    ("A2.2", answers.arrival_latest_first, "a later arrival has a larger one"),
    ("A2.2", answers.arrival_in_fractions, "whole number"),
    ("A2.3", answers.OneTooMany, "the queue is full"),
    ("A2.3", answers.OneTooFew, "replies may wait"),
    ("A2.3", answers.CountsOneReply, "num_sequences"),
    ("A2.3", answers.BatchFillsTheQueue, "may fill only int("),
    ("A2.3", answers.NoQueueAge, "Rule 1"),
    ("A2.3", answers.NoTokenLimit, "Rule 4"),
    ("A2.3", answers.NoWatermark, "Rule 5"),
    ("A2.3", answers.WatermarkReachedIsTooMuch, "at the limit it is still allowed"),
    ("A2.3", answers.OneBucketForAll, "buckets of its own"),
    ("A2.3", answers.NoTenantLimits, "Rule 6"),
    ("A2.3", answers.NobodyPays, "`take` its cost"),
    ("A2.3", answers.RefusedByTheBucketPays, "A request that is refused pays nothing"),
    ("A2.3", answers.SomeBucketsPay, "From all buckets or from none"),
    ("A2.3", answers.OverloadPays, "refused for overload pays nothing"),
    ("A2.3", answers.TenantsFirst, "Overload is looked at first"),
    ("A2.3", answers.NoBurst, "`burst_s` seconds of its rate"),
    ("A2.3", answers.StatusesMixedUp, "429 says that this tenant"),
    ("A2.3", answers.AlwaysTooManyRequests, "503 that the server is overloaded"),
    ("A2.3", answers.NoRetryAfter, "when to come back"),
    ("A2.3", answers.RetryRoundedDown, "Round up"),
    ("A2.3", answers.RetryInFractions, "whole seconds"),
    ("A2.3", answers.SaysNothing, "The client reads `message`"),
    ("A2.3", answers.StrictPriority, "virtual arrival"),
    ("A2.3", answers.ReturnsTruth, "Return an `AdmissionDecision`"),
    ("A2.4", answers.quantile_upper_edge, "upper edge"),
    ("A2.4", answers.quantile_lower_edge, "lower edge"),
    ("A2.4", answers.quantile_middle, "middle"),
    ("A2.4", answers.quantile_not_cumulative, "add up already"),
    ("A2.4", answers.quantile_infinite, "last finite edge"),
    ("A2.4", answers.quantile_percent, "not a percentage"),
    ("A2.4", answers.quantile_zero_without_observations, "math.nan"),
    ("A2.4", answers.quantile_of_the_finite_ones, "the last count"),
]


@pytest.mark.parametrize(
    ("exercise", "answer", "hint"), HINTS, ids=lambda v: getattr(v, "__name__", "")
)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_mistake_gets_the_hint_that_fits_it(exercise, answer, hint: str, seed: int) -> None:
    assert hint in hint_shown(exercise, answer, seed)


def test_the_message_names_the_first_arrival_that_differs_and_the_load() -> None:
    with pytest.raises(CheckFailed) as failure:
        check("A2.3", answers.StatusesMixedUp, seed=1)
    difference = str(failure.value).splitlines()[1]
    assert "First difference: arrival " in difference
    assert "EngineLoad(num_running=" in difference and "limits: max_num_queued_reqs=" in difference
    assert "to be refused with 503" in difference and "it refused with 429" in difference


def test_the_message_tells_the_calls_of_a_bucket() -> None:
    with pytest.raises(CheckFailed, match=r"after take\(8\) at 0 s.*: expected 0.25, got 0.5"):
        check("A2.1", answers.NeverRefills, seed=1)


def test_the_servers_own_parts_keep_the_rules_that_the_checks_ask_for() -> None:
    for seed in range(5):
        for exercise in a2.EXERCISES:
            exercise.verify(load_object(exercise.reference), random.Random(seed))


@pytest.mark.slow
@pytest.mark.parametrize("policy", answers.RIGHT["A2.3"])
def test_a_policy_that_passed_is_saved_and_stands_before_the_real_server(
    policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))
    check("A2.3", policy)
    saved = part("admission")
    assert saved.__name__ == policy.__name__ and saved is not policy
    admission = saved(tenant=TenantLimits(requests_per_s=0.01, burst_s=200.0))
    llm = LLM(DEFAULT_MODEL, num_gpu_blocks_override=500)
    body = {"prompt": [500, 501, 502], "max_tokens": 2}
    with BackgroundServer(Replica(llm, "merchant-chat", admission)) as server:
        answered = [
            httpx.post(f"{server.url}/v1/completions", json=body, headers={"X-Tenant": tenant})
            for tenant in ("acme", "acme", "acme", "zenith")
        ]
    assert [answer.status_code for answer in answered] == [200, 200, 429, 200]
    assert answered[2].json()["error"]["code"] == "tenant_requests"
    assert 90 <= int(answered[2].headers["Retry-After"]) <= 100
