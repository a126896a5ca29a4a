"""Who gets in: each refusal by its reason, exact token buckets, and nobody starves."""

import math
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.engine.batch import StepResult
from course_lib.engine.block_pool import BlockPool
from course_lib.engine.request import Request
from course_lib.engine.sampling_params import SamplingParams
from course_lib.engine.scheduler import Scheduler
from course_lib.serving.admission import AdmissionPolicy
from course_lib.serving.admission_base import (
    MAX_TENANTS,
    AdmissionBase,
    AdmissionDecision,
    Arrival,
    EngineLoad,
    TenantLimits,
    TokenBucket,
)
from course_lib.serving.load_client import TrafficClass, Workload
from course_lib.serving.load_client import load as run_load
from tests.serving.servers import load, serving


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def busy(**changes: Any) -> EngineLoad:
    """All slots taken, nobody waits."""
    values = {
        "num_running": 8, "max_num_seqs": 8, "num_waiting": 0, "num_waiting_tokens": 0,
        "oldest_waiting_age_s": 0.0, "kv_cache_usage": 0.5,
    }  # fmt: skip
    return EngineLoad(**{**values, **changes})


def arrival(**changes: Any) -> Arrival:
    values = {
        "tenant": "a", "priority_class": "interactive", "prompt_tokens": 100, "max_tokens": 50,
    }  # fmt: skip
    return Arrival(**{**values, **changes})


BATCH = arrival(priority_class="batch")


@pytest.mark.parametrize(
    ("limits", "load", "reason", "says", "retry_after_s"),
    [
        (
            {"max_num_queued_reqs": 4}, busy(num_waiting=4), "max_num_queued_reqs",
            "4 requests wait", 1,
        ),
        ({"max_num_queued_reqs": 0}, busy(), "max_num_queued_reqs", "all 8 slots are taken", 1),
        (
            {"max_num_queued_tokens": 1000},
            busy(num_waiting=2, num_waiting_tokens=901),
            "max_num_queued_tokens", "901 prompt tokens wait, and at most 1000 may", 1,
        ),
        (
            {"max_queue_age_s": 5}, busy(num_waiting=1, oldest_waiting_age_s=7.1),
            "queue_age", "waited 7.1 s, and 5 s is the limit", 4,
        ),
        (
            {"max_queue_age_s": 5}, busy(num_waiting=1, oldest_waiting_age_s=500),
            "queue_age", "waited 500.0 s", 60,
        ),
        (
            {"kv_high_watermark": 0.9}, busy(kv_cache_usage=0.91), "kv_cache_usage",
            "91% full, above the watermark of 90%", 1,
        ),
    ],
)  # fmt: skip
def test_overload_is_503_with_its_reason(
    limits: dict[str, Any], load: EngineLoad, reason: str, says: str, retry_after_s: int
) -> None:
    decision = AdmissionPolicy(**limits).decide(arrival(), load)
    assert not decision.admitted
    assert (decision.status, decision.reason) == (503, reason)
    assert says in decision.message and decision.message.endswith("try again later")
    assert decision.retry_after_s == retry_after_s


@pytest.mark.parametrize(
    ("limits", "load"),
    [
        ({"max_num_queued_reqs": 4}, busy(num_waiting=3)),
        ({"max_num_queued_tokens": 1000}, busy(num_waiting=2, num_waiting_tokens=900)),
        ({"max_queue_age_s": 5}, busy(num_waiting=1, oldest_waiting_age_s=5.0)),
        ({"kv_high_watermark": 0.9}, busy(kv_cache_usage=0.9)),
        # What runs in the next step does not queue, whatever the limits of the queue.
        (
            {"max_num_queued_reqs": 0, "kv_high_watermark": 0.5},
            busy(num_running=7, kv_cache_usage=0.9),
        ),
        ({"max_num_queued_reqs": 0}, busy(num_running=3, num_waiting=4)),
    ],
)  # fmt: skip
def test_at_the_limit_is_still_within_it(limits: dict[str, Any], load: EngineLoad) -> None:
    assert AdmissionPolicy(**limits).decide(arrival(), load).admitted


def test_batch_may_fill_only_its_share_of_the_queue() -> None:
    policy = AdmissionPolicy(max_num_queued_reqs=10, batch_queue_share=0.3)
    for waiting in range(12):
        load = busy(num_waiting=waiting)
        assert policy.decide(arrival(), load).admitted == (waiting < 10)
        assert policy.decide(BATCH, load).admitted == (waiting < 3)
    assert policy.decide(BATCH, busy(num_running=7)).admitted
    nothing = AdmissionPolicy(batch_queue_share=0)
    assert not nothing.decide(BATCH, busy()).admitted
    assert nothing.decide(BATCH, busy(num_running=7)).admitted


def test_several_completions_need_several_slots() -> None:
    policy = AdmissionPolicy(max_num_queued_reqs=4)
    assert policy.decide(arrival(num_sequences=4), busy()).admitted
    assert not policy.decide(arrival(num_sequences=5), busy()).admitted
    assert policy.decide(arrival(num_sequences=7), busy(num_running=5)).admitted
    assert not policy.decide(arrival(num_sequences=8), busy(num_running=5)).admitted
    # More than slots and queue together could never get in otherwise.
    assert policy.decide(arrival(num_sequences=100), busy(num_running=0)).admitted


# Tenants.

IDLE = busy(num_running=0)


def test_a_bucket_is_exact() -> None:
    clock = Clock()
    bucket = TokenBucket(2.0, 6.0, clock)
    for _ in range(6):
        assert bucket.wait_s(1) == 0
        bucket.take(1)
    assert bucket.wait_s(1) == 0.5
    assert bucket.wait_s(4) == 2.0
    clock.now += 0.5
    assert bucket.wait_s(1) == 0
    clock.now += 1000
    assert bucket.wait_s(6) == 0
    # Larger than the bucket: a full one lets it through and owes the rest.
    assert bucket.wait_s(20) == 0
    bucket.take(20)
    assert bucket.wait_s(1) == (14 + 1) / 2.0
    clock.now += 7.0
    assert bucket.wait_s(1) == 0.5


@given(
    rate=st.floats(0.1, 1000),
    burst_s=st.floats(0.1, 100),
    arrivals=st.lists(st.tuples(st.floats(0, 20), st.integers(1, 300)), max_size=60),
)
def test_a_bucket_never_lets_through_more_than_its_rate(
    rate: float, burst_s: float, arrivals: list[tuple[float, int]]
) -> None:
    clock = Clock()
    policy = AdmissionPolicy(
        tenant=TenantLimits(prompt_tokens_per_s=rate, burst_s=burst_s), clock=clock
    )
    size, start, taken, largest = max(1.0, rate * burst_s), clock.now, 0, 0
    for wait_s, tokens in arrivals:
        clock.now += wait_s
        decision = policy.decide(arrival(prompt_tokens=tokens), IDLE)
        if decision.admitted:
            taken, largest = taken + tokens, max(largest, tokens)
        else:
            assert decision.status == 429 and decision.retry_after_s >= 1
            # Who comes back when told to gets in.
            later = Clock()
            later.now = clock.now + decision.retry_after_s
            level = policy.buckets["a"]["tenant_prompt_tokens"].level
            assert level + decision.retry_after_s * rate >= min(tokens, size) - 1e-6
        # The last one may be larger than the bucket; it is paid for before the next.
        assert taken - largest <= size + rate * (clock.now - start) + 1e-6


def test_refused_requests_cost_nothing_and_each_limit_has_its_reason() -> None:
    clock = Clock()
    limits = TenantLimits(
        requests_per_s=1, prompt_tokens_per_s=100, generation_tokens_per_s=50, burst_s=4
    )
    policy = AdmissionPolicy(tenant=limits, clock=clock)
    assert policy.decide(arrival(prompt_tokens=300, max_tokens=100), IDLE).admitted
    for _ in range(5):
        refused = policy.decide(arrival(prompt_tokens=200, max_tokens=1), IDLE)
        assert refused.reason == "tenant_prompt_tokens" and refused.retry_after_s == 1
        assert "tenant 'a' has used up its tenant prompt tokens" in refused.message
        refused = policy.decide(arrival(prompt_tokens=1, max_tokens=200), IDLE)
        assert refused.reason == "tenant_generation_tokens" and refused.retry_after_s == 2
        # Refused for the load: that costs nothing either.
        full = busy(num_waiting=10_000)
        assert policy.decide(arrival(), full).reason == "max_num_queued_reqs"
    for _ in range(3):
        assert policy.decide(arrival(prompt_tokens=33, max_tokens=33), IDLE).admitted
    refused = policy.decide(arrival(prompt_tokens=0, max_tokens=0), IDLE)
    assert refused.reason == "tenant_requests"
    assert policy.decide(arrival(tenant="b"), IDLE).admitted  # has buckets of its own


def test_tenants_are_bounded_in_number() -> None:
    clock = Clock()
    policy = AdmissionPolicy(tenant=TenantLimits(requests_per_s=0.001, burst_s=1000), clock=clock)
    assert policy.decide(arrival(tenant="busy"), IDLE).admitted
    for index in range(MAX_TENANTS + 500):
        policy.decide(arrival(tenant=str(index)), IDLE)
        if index % 1000 == 0:
            assert not policy.decide(arrival(tenant="busy"), IDLE).admitted
    assert len(policy.buckets) == MAX_TENANTS
    assert "busy" in policy.buckets and "0" not in policy.buckets


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_queued_reqs", -1),
        ("max_num_queued_reqs", 1.5),
        ("max_num_queued_tokens", 0),
        ("max_num_queued_tokens", math.nan),
        ("max_queue_age_s", 0),
        ("max_queue_age_s", math.inf),
        ("kv_high_watermark", 0),
        ("kv_high_watermark", 1.1),
        ("batch_queue_share", -0.1),
        ("batch_queue_share", True),
        ("batch_delay_s", -1),
    ],
)
def test_bad_limits_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        AdmissionPolicy(**{name: value})


@pytest.mark.parametrize(
    "name", ["requests_per_s", "prompt_tokens_per_s", "generation_tokens_per_s", "burst_s"]
)
@pytest.mark.parametrize("value", [0, -1, math.nan, "7"])
def test_bad_limits_of_tenants_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number above 0"):
        TenantLimits(**{name: value})


# Nobody starves.


@pytest.mark.slow
def test_batch_gets_through_a_door_that_interactive_requests_besiege() -> None:
    """Several times more chats than fit keep the queue full; reports still get in."""
    classes = (TrafficClass("chat", 0.95), TrafficClass("report", 0.05, priority=1))
    policy = AdmissionPolicy(max_num_queued_reqs=8, batch_delay_s=0.5)
    with serving(load(max_num_seqs=2), admission=policy) as server:
        report = run_load(
            server.url,
            Workload(
                rate_per_s=120, duration_s=4, prompt_tokens=20, output_tokens=20,
                vocab_size=1000, classes=classes,
            ),
            show_progress=False,
        )  # fmt: skip
    chats, reports = report.of_class("chat"), report.of_class("report")
    assert chats.outcomes["refused"] > len(chats.records) / 2
    assert len(reports.served) >= 4 and len(reports.records) > 8
    assert len(reports.served) / len(reports.records) > len(chats.served) / len(chats.records)


def test_batch_progresses_under_interactive_load_that_never_ends() -> None:
    """The engine's own scheduler, steps of 50 ms, and four times as many users as slots."""
    clock = Clock()
    policy = AdmissionPolicy(batch_delay_s=5.0, clock=clock)
    scheduler = Scheduler(
        BlockPool(400, 16), max_num_seqs=4, max_num_batched_tokens=256, max_model_len=512,
        clock=clock,
    )  # fmt: skip
    served_s: dict[str, list[float]] = {"interactive": [], "batch": []}
    requests: dict[str, Request] = {}

    def arrive(kind: Any, number: int) -> None:
        load = busy(
            num_running=len(scheduler.running),
            max_num_seqs=4,
            num_waiting=len(scheduler.waiting),
        )
        decision = policy.decide(arrival(priority_class=kind), load)
        assert decision.admitted
        request = Request(
            f"{kind}-{number}",
            [1] * 40,
            SamplingParams(max_tokens=20, ignore_eos=True),
            arrival_time=clock.now,
            priority=decision.priority,
        )
        requests[request.request_id] = request
        scheduler.add_request(request)

    num_batch = 0
    for step in range(4000):
        while sum(name.startswith("interactive") for name in requests) < 16:
            arrive("interactive", step * 100 + len(requests))
        if step % 100 == 0:  # a burst of batch work every five seconds, less than there is room for
            for _ in range(3):
                num_batch += 1
                arrive("batch", num_batch)
        batch = scheduler.schedule()
        clock.now += 0.05
        sampled = [
            [7] if entry.end == entry.request.num_tokens else [] for entry in batch.scheduled
        ]
        for output in scheduler.update(batch, StepResult(sampled)):
            if output.finished:
                request = requests.pop(output.request_id)
                served_s[output.request_id.split("-")[0]].append(request.metrics.ttft_s or 0)

    assert num_batch - len(served_s["batch"]) <= 9  # those of the last seconds
    assert min(served_s["batch"]) > max(served_s["interactive"])  # interactive goes first
    assert max(served_s["batch"]) <= max(served_s["interactive"]) + 5.0 + 1.0


# A policy of one's own.


class OnlyShort(AdmissionBase):
    """Refuses what asks for more than ten tokens."""

    def decide(self, arrival: Arrival, load: EngineLoad) -> AdmissionDecision:
        if arrival.max_tokens > 10:
            return AdmissionDecision(
                False, reason="too_greedy", message="ten is enough", status=429, retry_after_s=7
            )
        return AdmissionDecision(True)


def test_the_policy_can_be_replaced() -> None:
    with serving(load(), admission=OnlyShort()) as server:
        url = f"{server.url}/v1/completions"
        assert httpx.post(url, json={"prompt": "a", "max_tokens": 10}).status_code == 200
        answer = httpx.post(url, json={"prompt": "a", "max_tokens": 6, "n": 2, "seed": 1})
        assert answer.status_code == 429 and answer.headers["retry-after"] == "7"
        assert answer.json()["error"] == {
            "message": "ten is enough", "type": "rate_limit_error", "param": None,
            "code": "too_greedy",
        }  # fmt: skip
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'reason="too_greedy"} 1.0' in metrics
