import asyncio
import math
import threading
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib import LLM
from course_lib.data import DEFAULT_MODEL
from course_lib.serving.api import Replica
from course_lib.serving.lifecycle import DrainPolicy, ReplicaState
from course_lib.serving.server import Server
from tests.serving.servers import MODEL, ORDER, load, serving, wait_until


def test_what_fits_the_warning_finishes_and_the_rest_is_retried():
    policy = DrainPolicy(warning_s=120, shutdown_margin_s=20)
    remaining_s = {"status lookup": 12, "refund note": 84, "claims reasoning": 170}
    assert policy.decide(remaining_s) == {
        "status lookup": "finish",
        "refund note": "finish",
        "claims reasoning": "retry",
    }


def test_the_margin_is_kept_for_shutting_down():
    policy = DrainPolicy(120, 20)
    assert policy.decide({"just": 100, "not": 100.1}) == {"just": "finish", "not": "retry"}
    assert DrainPolicy(30, 30).decide({"done": 0, "not": 1}) == {"done": "finish", "not": "retry"}


@given(st.floats(0, 600), st.dictionaries(st.text(), st.floats(0, 1000), max_size=10))
def test_every_request_is_decided_and_none_outlives_the_machine(warning_s, remaining_s):
    decisions = DrainPolicy(warning_s, warning_s / 4).decide(remaining_s)
    assert decisions.keys() == remaining_s.keys()
    for name, decision in decisions.items():
        assert (decision == "finish") == (remaining_s[name] <= warning_s - warning_s / 4)


@pytest.mark.parametrize(
    ("warning_s", "margin_s", "message"),
    [
        (-1, 0, "warning_s must be a number at least 0"),
        (120, -1, "shutdown_margin_s must be a number at least 0"),
        (120, 121, "shutdown_margin_s must be .* at most 120, got 121"),
        (math.nan, 0, "warning_s must be a number"),
        ("120", 0, "warning_s must be a number"),
    ],
)
def test_bad_times_are_refused(warning_s, margin_s, message):
    with pytest.raises(ValueError, match=message):
        DrainPolicy(warning_s, margin_s)


@pytest.mark.parametrize("seconds", [-1, math.nan, True, "12"])
def test_a_bad_remaining_time_is_refused_by_name(seconds):
    with pytest.raises(ValueError, match=r"remaining_s\['refund'\] must be a number at least 0"):
        DrainPolicy(120, 20).decide({"refund": seconds})


# With a server.


class Slow(LLM):
    """Its steps last a while."""

    def __init__(self, step_s: float) -> None:
        super().__init__(DEFAULT_MODEL, num_gpu_blocks_override=600)
        step = self.llm_engine.step

        def slow():
            time.sleep(step_s)
            return step()

        self.llm_engine.step = slow


def test_not_ready_before_the_warm_up_is_over():
    replica = Replica(Slow(0.4), MODEL)
    server = Server(replica, "127.0.0.1", 0, ["Hello", "Goodbye"])
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    answer = httpx.get(f"{server.url}/ready")
    assert (answer.status_code, answer.json()) == (503, {"status": "starting"})
    assert httpx.get(f"{server.url}/health").status_code == 200
    wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def test_the_first_request_finds_the_prefix_that_the_warm_up_left():
    llm = load()
    prompt = llm.chat_prompt(ORDER)["prompt_token_ids"]
    body = {"messages": ORDER, "max_tokens": 2}
    for warm_up, expected in (([], 0), ([prompt], (len(prompt) - 1) // 16 * 16)):
        with serving(load(), warm_up) as server:
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == expected


def test_a_replica_whose_warm_up_fails_stays_out_and_says_why(caplog):
    replica = Replica(load(), MODEL)

    async def scenario():
        replica.engine.start()
        await replica.lifecycle.warm_up([[5] * 9000])
        replica.engine.stop()

    asyncio.run(scenario())
    assert replica.lifecycle.state is ReplicaState.STARTING
    assert "not ready: the warm-up failed, ValueError" in caplog.text


class FinishNothing:
    """A student's policy: everybody goes elsewhere."""

    warning_s, shutdown_margin_s = 30.0, 3.0

    def decide(self, remaining_s):
        return dict.fromkeys(remaining_s, "retry")


class Broken(FinishNothing):
    """A student's policy with a mistake."""

    def decide(self, remaining_s):
        raise KeyError("oops")


@pytest.mark.parametrize("policy", [FinishNothing(), Broken()])
def test_the_drain_policy_can_be_replaced_and_a_broken_one_does_not_keep_the_process(policy):
    server = Server(Replica(load(), MODEL, drain_policy=policy), "127.0.0.1", 0)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    body = {"prompt": "Hello", "max_tokens": 3000, "ignore_eos": True}
    answers = []
    client = threading.Thread(
        target=lambda: answers.append(
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        )
    )
    client.start()
    wait_until(lambda: server.replica.engine.num_unfinished == 1)
    start = time.monotonic()
    server._loop.call_soon_threadsafe(server.drain)
    client.join(30)
    thread.join(30)
    assert not thread.is_alive() and time.monotonic() - start < 20
    (answer,) = answers
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
